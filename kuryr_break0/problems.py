# SPDX-License-Identifier: Apache-2.0

"""Describes the problems of a snapshot, for status, CHECK and metrics."""

from __future__ import annotations

from typing import Iterable, Iterator

from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.model import Pair
from kuryr_break0.snapshot import Parent
from kuryr_break0.snapshot import Snapshot


def address_problems(seen: Snapshot) -> dict[IPAddress, str]:
    """Return a problem of each address that has one, sorted by address.

    A problem stops traffic to the address, or is a difference that a sync
    repairs.
    """
    problems = {address: 'it is ' + reason
                for address, reason in seen.refused.items()}
    for parent in seen.parents.values():
        problems.update(_on(parent, seen))
    for record in seen.gone:
        if record.address not in seen.live:
            problems[record.address] = 'its sandbox is gone'
    for address, rivals in seen.rivals.items():
        problems.setdefault(address, 'it is claimed by %s too' % (
            ', '.join(rival.owner_text for rival in rivals)))
    for address in seen.contents.unreadable:
        problems[address] = 'its record in the ledger cannot be read'
    return {address: problems[address]
            for address in sorted(problems, key=address_order)}


def _on(parent: Parent, seen: Snapshot) -> dict[IPAddress, str]:
    problems: dict[IPAddress, str] = {}
    for address, record in parent.live.items():
        if parent.conflict is not None:
            problems[address] = str(parent.conflict)
        elif (record.netns is not None and parent.node is not None
                and record.configured != parent.node.digest):
            problems[address] = ('its container is not configured to '
                                 'reach the node')
        elif address not in parent.desired and (
                address not in seen.refused):
            problems[address] = 'IPv6 is disabled on ' + parent.device
    for neighbour in of_kind(Neighbour, parent.plan.set):
        problems[neighbour.dst] = 'its neighbour entry is ' + (
            'wrong' if neighbour.dst in parent.neighbours else 'missing')
    for route in of_kind(HostRoute, parent.plan.set):
        problems[route.dst] = 'its route is ' + (
            'wrong' if route.dst in parent.routes else 'missing')
    for route in of_kind(HostRoute, parent.plan.unset):
        problems.setdefault(route.dst, 'it has a route too many')
    for route in parent.plan.foreign:
        problems[route.dst] = foreign_text(route)
    for address, (through, get) in parent.astray.items():
        problems.setdefault(address, 'it is not reached through %s but %s. '
                            'See: ip route get %s; ip -%d rule' % (
                                parent.device, through, get, address.version))
    for item in parent.plan.unclaimed:
        problems[item.dst] = 'no container claims it'
    return problems


def node_problems(seen: Snapshot) -> Iterator[str]:
    """Return the problems of the ledger and of all break0s."""
    if seen.is_lost:
        yield ('the ledger in %s was lost; a sync rebuilds it'
               % seen.options.state_dir)
    if seen.stranger is not None:
        yield str(exceptions.DeviceConflict(
            device=seen.stranger.name, found=seen.stranger.description,
            expected='a macvlan in bridge mode on the parent of pods'))
    if seen.unjudged:
        yield unjudged_problem(seen)
    for parent in seen.parents.values():
        yield from parent_problems(parent)


def parent_problems(parent: Parent) -> Iterator[str]:
    """Return the problems of one break0.

    Without pods, only a conflict, another ledger or a difference of the guard
    entries is a problem.
    """
    if parent.conflict is not None:
        yield str(parent.conflict)
    elif parent.link is None and parent.live:
        yield '%s is missing on %s, but %d addresses are bound' % (
            parent.device, parent.name, len(parent.live))
    elif parent.link is not None:
        if parent.other is not None:
            yield '%s belongs to the ledger %s in %s' % (
                parent.device, *parent.other)
        for text in () if parent.guard else guard_text(
                parent.plan.set, parent.plan.unset):
            yield '%s: %s' % (parent.device, text)
        if not parent.live:
            return
        if parent.parent is not None and not parent.parent.carrier:
            yield '%s, the parent of %s, %s' % (
                parent.name, parent.device, 'has no carrier'
                if parent.parent.up else 'is down')
        for text in (*(text for _, text in parent.differences), *(
                [parent.guard] if parent.guard else [])):
            yield '%s: %s' % (parent.device, text)
        if (any(address.version == 6 for address in parent.live)
                and all(kind != 'ipv6' for kind, _ in parent.differences)
                and kernel.read_sysctl(device.DISABLE_IPV6
                                       % parent.device) != 0):
            yield '%s: %s' % (parent.device, device.ipv6_text(parent.device))


def unjudged_problem(seen: Snapshot) -> str:
    """Describe the claims of sandboxes that may have ended.

    :returns: empty if there are none
    """
    for record, reason in seen.unjudged.items():
        return ('cannot find out whether the sandboxes of %d addresses '
                'still exist, so they stay bound, as %s of %s: %s' % (
                    len(seen.unjudged), record.address, record.owner_text,
                    reason))
    return ''


def foreign_text(route: HostRoute) -> str:
    """Describe the foreign route that conflicts with a pod's route."""
    return 'it has a route of another program, through %s with protocol %s' % (
        kernel.format_ifname(route.oif), route.protocol)


def guard_text(added: Iterable[Item], deleted: Iterable[Item]
               ) -> Iterator[str]:
    """Return a text with the numbers of missing and stale guard entries.

    It counts addresses, which can have several guard entries each.

    :param added: items to set; all but guard entries are ignored
    :param deleted: items to delete; all but guard entries are ignored
    :returns: nothing if there are no such entries
    """
    missing, stale = (len({pair.dst for pair in of_kind(Pair, items)})
                      for items in (added, deleted))
    if missing or stale:
        yield ('its guard lacks the entries of %d addresses, and has stale '
               'ones of %d' % (missing, stale))
