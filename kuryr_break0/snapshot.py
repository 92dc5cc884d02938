# SPDX-License-Identifier: Apache-2.0

"""Ledger and kernel at one moment, and what is wrong by that.

The reconciler, status, metrics and doctor all use this, so that they agree.
:mod:`kuryr_break0.actual` reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.guard import Pairs
from kuryr_break0.guard import said
from kuryr_break0 import kernel
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger import identity
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted
from kuryr_break0.plan import Plan


@dataclasses.dataclass(frozen=True)
class Parent:
    """An interface with pods on it, and its break0.

    :ivar device: the name of its break0
    :ivar parent: None if there is no such interface
    :ivar present: the interface that has the name of its break0, if any
    :ivar link: its break0; None if there is none that can be used
    :ivar conflict: why it cannot be used, or the parent is not there
    :ivar other: the ledger that its break0 belongs to, if not this one
    :ivar differences: what its break0 is, and should not be
    :ivar guard: what is wrong with the table of its guard, if anything
    :ivar guard_missing: what that does not let pass, and should
    :ivar guard_extra: what that lets pass, and should not
    :ivar live: the records of its pods, the newest claim on each address
    :ivar desired: what these addresses must have
    :ivar plan: the difference to what they have
    :ivar routes, neighbours, addresses: what its break0 has
    :ivar node: what its pods must know of the node; None without break0
    """

    name: str
    device: str
    parent: Optional[kernel.Link]
    present: Optional[kernel.Link]
    link: Optional[kernel.Link]
    conflict: Optional[exceptions.Break0Error]
    other: Optional[Alias]
    differences: tuple[str, ...]
    guard: Optional[str]
    guard_missing: Pairs
    guard_extra: Pairs
    live: dict[IPAddress, Record]
    desired: dict[IPAddress, Wanted]
    plan: Plan
    routes: dict[IPAddress, HostRoute]
    neighbours: dict[IPAddress, Neighbour]
    addresses: tuple[IPAddress, ...]
    node: Optional[NodeAddresses]

    @property
    def index(self) -> int:
        """ifindex of its break0; 0, the kernel's number for none."""
        return self.link.index if self.link is not None else 0

    def problems(self) -> Iterator[str]:
        """Return what is wrong with break0 itself; nothing without pods."""
        if self.conflict is not None:
            yield str(self.conflict)
        elif self.link is None and self.live:
            yield '%s is missing on %s, but %d addresses are bound' % (
                self.device, self.name, len(self.live))
        elif self.link is not None:
            if self.other is not None:
                yield '%s belongs to the ledger %s in %s' % (
                    self.device, *self.other)
            for text in said(self.guard_missing, self.guard_extra):
                yield '%s: %s' % (self.device, text)
            if not self.live:
                return
            if self.parent is not None and not self.parent.carrier:
                yield '%s, the parent of %s, %s' % (
                    self.name, self.device, 'has no carrier'
                    if self.parent.up else 'is down')
            for text in (*self.differences, *(
                    [self.guard] if self.guard else [])):
                yield '%s: %s' % (self.device, text)
            if (any(address.version == 6 for address in self.live)
                    and kernel.read_sysctl('ipv6/conf/%s/disable_ipv6'
                                           % self.device) != 0):
                yield ('%s: IPv6 is disabled, but there are containers with '
                       'IPv6 addresses. Enable it: sysctl -w net/ipv6/conf/'
                       '%s/disable_ipv6=0; kuryr-break0 sync' % (
                           self.device, self.device))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What was read at one moment, and what follows from it.

    :ivar contents: of the ledger
    :ivar is_steady: whether nothing was being bound or unbound meanwhile
    :ivar identity: of the ledger; None if it was never used
    :ivar parents: by their names
    :ivar own: the addresses of the node
    :ivar routes: the routes of the node
    :ivar live: the newest claim of an existing sandbox on each address
    :ivar rivals: earlier claims of sandboxes that exist too
    :ivar gone: claims of sandboxes that are proven not to exist
    :ivar unjudged: those of sandboxes that may exist or not, and why that
        cannot be found out
    :ivar refused: what is against which address
    :ivar stranger: an interface named as [break0] device that is none
    :ivar unclaimed: addresses with routes or neighbours of ours on a break0,
        and no record
    """

    options: config.Options
    contents: Contents
    is_steady: bool
    identity: Optional[Identity]
    parents: dict[str, Parent]
    own: frozenset[IPAddress]
    routes: kernel.Routes
    live: dict[IPAddress, Record]
    rivals: dict[IPAddress, tuple[Record, ...]]
    gone: tuple[Record, ...]
    unjudged: dict[Record, str]
    refused: dict[IPAddress, str]
    stranger: Optional[kernel.Link]

    @property
    def unclaimed(self) -> dict[IPAddress, Parent]:
        return {item.dst: parent for parent in self.parents.values()
                for item in parent.plan.unclaimed}

    @property
    def is_lost(self) -> bool:
        """Return whether the ledger that bound pods here was lost."""
        return any(map(self.follows, self.parents.values()))

    @property
    def unjudged_problem(self) -> str:
        """Say that sandboxes may be gone; empty if it is known of each."""
        for record, reason in self.unjudged.items():
            return ('cannot find out whether the sandboxes of %d addresses '
                    'still exist, so they stay bound, as %s of %s: %s' % (
                        len(self.unjudged), record.address, record.whose,
                        reason))
        return ''

    def is_others(self, parent: Parent) -> bool:
        """Return whether a break0 is another ledger's, and stays so."""
        return parent.other is not None and not self.follows(parent)

    def follows(self, parent: Parent) -> bool:
        """Return whether a break0 is of a ledger that this one replaces."""
        return parent.other is not None and identity.follows(
            self.identity, self.options.state_dir, parent.other,
            parent.device)

    def parent_of(self, address: IPAddress) -> Optional[Parent]:
        """Return the parent of an address; None if it is not known."""
        record = self.live.get(address)
        if record is not None:
            return self.parents.get(record.parent)
        return self.unclaimed.get(address)

    def interfaces(self) -> list[list[Record]]:
        """Return the records of each interface of each pod."""
        return by_interface(self.live.values())

    def problems(self) -> dict[IPAddress, str]:
        """Return what stops traffic to which address, or differs."""
        problems = {address: 'it is ' + reason
                    for address, reason in self.refused.items()}
        for parent in self.parents.values():
            problems.update(self._problems_on(parent))
        for record in self.gone:
            if record.address not in self.live:
                problems[record.address] = 'its sandbox is gone'
        for address, rivals in self.rivals.items():
            problems.setdefault(address, 'it is claimed by %s too' % (
                ', '.join(rival.whose for rival in rivals)))
        for address in self.contents.unreadable:
            problems[address] = 'its record in the ledger cannot be read'
        return {address: problems[address]
                for address in sorted(problems, key=address_order)}

    def node_problems(self) -> Iterator[str]:
        """Return what is wrong with a break0, or with the ledger."""
        if self.is_lost:
            yield ('the ledger in %s was lost; a sync rebuilds it'
                   % self.options.state_dir)
        if self.stranger is not None:
            yield str(exceptions.DeviceConflict(
                device=self.stranger.name, found='a %s' % (
                    self.stranger.kind or 'physical interface'),
                expected='a macvlan in bridge mode on the parent of pods'))
        if self.unjudged:
            yield self.unjudged_problem
        for parent in self.parents.values():
            yield from parent.problems()

    def _problems_on(self, parent: Parent) -> dict[IPAddress, str]:
        problems: dict[IPAddress, str] = {}
        for address, record in parent.live.items():
            if parent.conflict is not None:
                problems[address] = str(parent.conflict)
            elif (record.netns is not None and parent.node is not None
                    and record.configured != parent.node.digest):
                problems[address] = ('its container is not configured to '
                                     'reach the node')
            elif address not in parent.desired and (
                    address not in self.refused):
                problems[address] = 'IPv6 is disabled on ' + parent.device
        for neighbour in parent.plan.learn:
            problems[neighbour.dst] = 'its neighbour entry is ' + (
                'wrong' if neighbour.dst in parent.neighbours else 'missing')
        for route in parent.plan.replace:
            problems[route.dst] = 'its route is ' + (
                'wrong' if route.dst in parent.routes else 'missing')
        for route in parent.plan.delete:
            problems.setdefault(route.dst, 'it has a route too many')
        for route in parent.plan.foreign:
            problems[route.dst] = (
                'it has a route of others, on %s with protocol %s' %
                (kernel.name_of(route.oif), route.protocol))
        for item in parent.plan.unclaimed:
            problems[item.dst] = 'no container claims it'
        return problems


def by_interface(records: Iterable[Record]) -> list[list[Record]]:
    """Return records by the interface that they are of.

    Its owners can differ, where a record was rebuilt; and its parents, while
    it is made again on another one.
    """
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault((
            record.namespace or record.owner.container_id,
            record.owner.ifname, record.parent), []).append(record)
    return list(found.values())


def items_of(parent: Parent) -> list[Item]:
    """List the routes and neighbours on a break0."""
    return [*parent.routes.values(), *parent.neighbours.values()]
