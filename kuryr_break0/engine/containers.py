# SPDX-License-Identifier: Apache-2.0

"""Searches the namespaces of the node for unbound containers.

An unbound container has no record, so the ledger does not show the container.
This module finds the macvlan of the container on an interface of the node.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import itertools
from typing import Collection, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0.engine.plan import is_others
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model
from kuryr_break0 import policy


class Reason(enum.Enum):
    """The reason why an address is not bound. It is a label of a metric."""

    MODE = 'mode'
    OTHER_PARENT = 'other_parent'
    NOT_ALLOWED = 'not_allowed'
    DUPLICATE = 'duplicate'
    REFUSED = 'refused'
    #: Another container of the node has a claim on the address.
    CLAIMED = 'claimed'
    NOT_DISCOVERED = 'not_discovered'
    TENTATIVE = 'tentative'
    NO_ADDRESS = 'no_address'
    #: The agent will bind the address, or has logged an error.
    PENDING = 'pending'


#: Maximum number of reported addresses. A container can create thousands of
#: macvlans in its own namespaces, with thousands of addresses each.
MAX_UNSERVED = 2 ** 12
#: Sockets of Docker and Podman.
ENGINE_SOCKETS = '/run/docker.sock', '/run/podman/podman.sock'
#: Reasons that :mod:`kuryr_break0.discovery.finder` logs at once.
FINDERS = (Reason.NOT_ALLOWED, Reason.DUPLICATE, Reason.REFUSED,
           Reason.CLAIMED, Reason.PENDING)
PASSING = (Reason.NOT_DISCOVERED, Reason.TENTATIVE, Reason.NO_ADDRESS,
           Reason.PENDING)


@dataclasses.dataclass(frozen=True)
class Unserved:
    """An address that is not bound, or an interface without an address.

    :ivar name: name of the container; None if no record contains the name.
        This module does not ask the container engine for the name, because an
        answer can take seconds
    """

    macvlan: kernel.Macvlan
    name: Optional[str]
    address: Optional[model.IPAddress]
    reason: Reason
    text: str

    def __str__(self) -> str:
        netns = self.macvlan.netns
        return '%s, on %s in %s, is not bound: %s' % (
            self.address or 'an interface', self.macvlan.link.name,
            '%s (%s)' % (self.name, netns) if self.name else netns, self.text)


def of_interface(options: config.Options, macvlan: kernel.Macvlan
                 ) -> Optional[tuple[Reason, str]]:
    """Return the reason why an interface must not be bound, or None."""
    if macvlan.link.mode != 'bridge':
        return Reason.MODE, ('its macvlan is in %s mode, but only macvlans '
                             'in bridge mode reach break0' % macvlan.link.mode)
    required = options.parent
    if required is not None and macvlan.parent != required:
        return Reason.OTHER_PARENT, (
            'it is on %s, but [break0] parent is %s%s' % (
                macvlan.parent, required, '' if kernel.has_interface(required)
                else ', and there is no such interface'))
    return None


def unserved(snapshot: Snapshot, ledger: Ledger) -> list[Unserved]:
    """Return the unbound addresses in all namespaces of the node.

    The search takes about 0.2 ms for each namespace.

    :returns: at most MAX_UNSERVED addresses
    :raises SystemRefused: if this process cannot see all namespaces
    """
    return list(itertools.islice(itertools.chain.from_iterable(
        each_unserved(snapshot, ledger, kernel.FULL_LIMITS)), MAX_UNSERVED))


def each_unserved(snapshot: Snapshot, ledger: Ledger, limits: kernel.Limits
                  ) -> Iterator[list[Unserved]]:
    """Yield the unbound addresses of each namespace of the node.

    A namespace that cannot be entered is skipped, because it may be ending.

    :param limits: the limits of the reads from each namespace
    :raises SystemRefused: if this process cannot see all namespaces
    """
    judge = _Judge(snapshot, ledger)
    for location in kernel.find_namespaces(snapshot.options.proc_dirs):
        yield [each for macvlan in kernel.list_macvlans_at(location, limits)
               for each in judge.judge(macvlan)]


def blindness() -> str:
    """Return the reason why unbound containers cannot be shown, or ''."""
    return '' if kernel.read_capabilities() >> kernel.CAP_SYS_ADMIN & 1 else (
        'containers that are not bound: this process lacks CAP_SYS_ADMIN')


def network_of(address: model.IPAddress) -> model.IPNetwork:
    """Return the network of an address, by the routes of the node.

    If the best route to the address is a default route or a host route, or if
    there is no route, the prefix length is 24 for IPv4, and 64 for IPv6.
    """
    with kernel.Netlink() as netlink:
        # An unbound address has no route through break0, so the look-up
        # returns the route through the parent.
        route = netlink.lookup(address)
    length = route.dst_len if route is not None and route.dst else 0
    if not 0 < length < address.max_prefixlen:
        length = 24 if address.version == 4 else 64
    return ipaddress.ip_network((address, length), strict=False)


class _Judge:
    """Compares interfaces of containers with a snapshot."""

    def __init__(self, snapshot: Snapshot, ledger: Ledger) -> None:
        self._snapshot = snapshot
        self._options = snapshot.options
        self._policy = policy.Policy(snapshot.options)
        self._is_attended = ledger.heartbeat.age() is not None
        self._names = {claim.namespace: claim.pod for claims
                       in snapshot.contents.claims.values() for claim in claims
                       if claim.pod and claim.namespace}
        options, devices = snapshot.options, {
            parent.index for parent in snapshot.parents.values()}
        #: the foreign routes that our routes must not replace, by address
        self._foreign = {
            route.dst: route for route in snapshot.routes.host
            if route.table == options.route_table and is_others(
                route, devices, options.route_protocol)}

    def judge(self, macvlan: kernel.Macvlan) -> Iterator[Unserved]:
        parent = self._snapshot.parents.get(macvlan.parent)
        if parent is not None and parent.ownership.is_foreign:
            return  # the macvlan may be in the records of that ledger
        if not self._options.discover and any(
                _is_of(claim, macvlan) for address in macvlan.addresses
                for claim in self._snapshot.contents.claims.get(address, ())):
            # Without discovery, the program that bound one address of the
            # macvlan decides about the other addresses too.
            return
        of_all = of_interface(self._options, macvlan)
        name = self._names.get(macvlan.namespace)
        for address in macvlan.addresses:
            claims = [*self._snapshot.contents.claims.get(address, ())]
            if not any(_is_of(claim, macvlan) for claim in claims) and (
                    address not in self._snapshot.contents.unreadable):
                yield Unserved(macvlan, name, address, *(
                    of_all or self._of_address(macvlan, address, claims)))
        if not macvlan.addresses and macvlan.is_whole and not any(
                _is_of(claim, macvlan) for claims
                in self._snapshot.contents.claims.values()
                for claim in claims):
            yield Unserved(macvlan, name, None, *(of_all or (
                Reason.NO_ADDRESS, 'it has no address yet')))

    def _of_address(self, macvlan: kernel.Macvlan, address: model.IPAddress,
                    claims: Collection[model.Record]) -> tuple[Reason, str]:
        reason = self._policy.refusal(address, model.Origin.DISCOVERED,
                                      self._snapshot.facts)
        if reason is not None:
            return (Reason.NOT_ALLOWED if reason == policy.NOT_ALLOWED
                    else Reason.REFUSED), 'it is ' + reason
        if address in macvlan.duplicates:
            return Reason.DUPLICATE, ('duplicate address detection has '
                                      'found it on another host')
        if address in macvlan.unproven:
            return Reason.TENTATIVE, ('duplicate address detection has not '
                                      'ended yet')
        route = self._foreign.get(address)
        if route is not None:
            return Reason.REFUSED, problems.foreign_text(route)
        living = [claim for claim in claims
                  if claim not in self._snapshot.gone]
        if living:
            return Reason.CLAIMED, 'it belongs to %s' % living[0].owner
        if not self._options.enabled:
            return Reason.NOT_DISCOVERED, '[break0] enabled is false'
        if not self._options.discover:
            return Reason.NOT_DISCOVERED, ('no program has bound it, and '
                                           '[break0] discover is false')
        if not self._is_attended:
            return Reason.NOT_DISCOVERED, 'no agent is running'
        try:
            kernel.find_source(address)
        except PermissionError:
            return Reason.REFUSED, 'it is ' + policy.NO_HOST
        return Reason.PENDING, ('the agent has not bound it yet. If it is '
                                'still unbound after a minute, read the log '
                                'of the agent')


def _is_of(claim: model.Record, macvlan: kernel.Macvlan) -> bool:
    if claim.namespace is None:
        return claim.mac in (None, macvlan.link.mac)
    return claim.namespace.is_same(macvlan.namespace)
