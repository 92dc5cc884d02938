# SPDX-License-Identifier: Apache-2.0

"""Computes what must change so that the kernel matches the ledger.

A pure function. It deletes nothing that merely has no record: a ledger can be
lost or be another's. Such items are ``unclaimed``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Collection, Container, Iterable, Mapping, Optional

from kuryr_break0 import exceptions
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.model import Owner
from kuryr_break0.model import Pair
from kuryr_break0.model import Record


@dataclasses.dataclass(frozen=True)
class Plan:
    """The difference, each part in order: by kind, then by address.

    :ivar set: items to set, in place of what is there
    :ivar unset: our items to delete
    :ivar foreign: routes of others in the way of a pod's route, the best one
        of each address. Such a route stays, and the address gets nothing;
        or it is taken over, and ours is set in its place or before it
    :ivar unclaimed: our items of addresses without a record
    """

    set: tuple[Item, ...] = ()
    unset: tuple[Item, ...] = ()
    foreign: tuple[HostRoute, ...] = ()
    unclaimed: tuple[Item, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.unset)


@dataclasses.dataclass(frozen=True)
class Outcome(Plan):
    """What there was to do on all parents, and what it came to.

    :ivar devices: what break0 was and should not be, by its name
    :ivar pods: the sandboxes whose pod side differed
    :ivar released: records of addresses that their sandbox has released, and
        how that is known
    :ivar missing: records whose interface lacks the address for now, and
        what is known of that
    :ivar rebuilt: records that were made of what the kernel holds
    :ivar gone: records whose sandbox is proven not to exist
    :ivar unjudged: records of which that cannot be found out, and why
    :ivar refused: what is against which address, which gets nothing
    :ivar errors: what failed
    """

    devices: tuple[tuple[str, str], ...] = ()
    pods: tuple[Owner, ...] = ()
    released: Mapping[Record, str] = dataclasses.field(default_factory=dict)
    missing: Mapping[Record, str] = dataclasses.field(default_factory=dict)
    rebuilt: tuple[Record, ...] = ()
    gone: tuple[Record, ...] = ()
    unjudged: Mapping[Record, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[IPAddress, str] = dataclasses.field(default_factory=dict)
    errors: tuple[exceptions.Break0Error, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.devices or self.pods or self.rebuilt or self.gone
                    or self.released or super().__bool__())


def is_others(route: HostRoute, devices: Collection[Optional[int]],
              protocol: int) -> bool:
    """Return whether a route was set by another program, and for no pod.

    :param devices: ifindexes of break0s
    """
    return route.oif not in devices and route.protocol != protocol


def compute(desired: Mapping[IPAddress, Collection[Item]],
            present: Iterable[Item], *, device: int, protocol: int,
            takeover: bool = False, withdrawn: Container[IPAddress] = (),
            claimed: Container[IPAddress] = (),
            unreadable: Container[IPAddress] = (),
            is_refilled: bool = False) -> Plan:
    """Compare the items that must be with those that are, for one break0.

    A route that is on break0, or carries our protocol number, was set for a
    pod, so in the way of a pod's route it is replaced. All others are
    foreign, at any metric: ours is the best, so it would override them. One
    that comes when ours is there, with another metric, takes no part. Only a
    route that is both is ever deleted.

    :param desired: the items that the addresses of pods must have
    :param present: the host routes of the node, the permanent neighbours on
        break0 and the entries of its guard
    :param device: ifindex of break0
    :param withdrawn: addresses whose claims on this break0 have ended
    :param claimed: addresses that have a record, maybe for another break0
    :param unreadable: addresses whose record cannot be read
    :param is_refilled: whether the guard is loaded again: then it admits
        addresses without a record as well, whose pods would be cut off
    """
    kept: set[Item] = set()
    held: set[IPAddress] = set()
    foreign: dict[IPAddress, HostRoute] = {}
    unset: list[Item] = []
    unclaimed: list[Item] = []
    pairs: set[Pair] = set()
    routes = {item.dst: item for items in desired.values()
              for item in of_kind(HostRoute, items)}
    for item in present:
        if isinstance(item, Pair):
            pairs.add(item)
            continue
        wanted = desired.get(item.dst, ())
        if item in wanted:
            kept.add(item)
        if isinstance(item, HostRoute):
            route = routes.get(item.dst)
            ours = item.oif == device and item.protocol == protocol
            if route is not None and item.table == route.table:
                if is_others(item, (device,), protocol):
                    foreign[item.dst] = min(
                        item, foreign.get(item.dst, item), key=_by_metric)
                elif item.metric == route.metric:
                    held.add(item.dst)
                elif ours:
                    unset.append(item)
                continue
        else:
            ours = item.ifindex == device and item.protocol == protocol
            if of_kind(Neighbour, wanted):
                continue
        if ours and (wanted or item.dst in withdrawn):
            unset.append(item)
        elif ours and item.dst not in claimed:
            unclaimed.append(item)
    foreign = {address: route for address, route in foreign.items()
               if address not in held
               or route.metric == routes[address].metric}
    # An address that gets no route gets nothing else either.
    blocked = set() if takeover else {
        address for address in foreign if routes[address] not in kept}
    missing = [item for address, items in desired.items()
               if address not in blocked for item in items
               if item not in kept]
    admitted = set(of_kind(Pair, missing))
    doubtful = {item.dst for item in unclaimed}
    if is_refilled:
        macs = {each.dst: each.mac for each in of_kind(Neighbour, unclaimed)}
        missing += {Pair.of(address, macs.get(address))
                    for address in doubtful} - admitted
    for pair in pairs - admitted:
        if pair.dst in doubtful:
            unclaimed.append(pair)
        elif pair.dst not in unreadable:
            unset.append(pair)
    return Plan(
        tuple(sorted((item for item in missing if item not in pairs),
                     key=_by_order)),
        tuple(sorted(unset, key=_by_order)),
        tuple(sorted(foreign.values(), key=_by_order)),
        tuple(sorted((item for item in unclaimed
                      if item.dst not in unreadable), key=_by_order)))


def _by_metric(route: HostRoute) -> tuple[int, ...]:
    return (route.metric or 0, *address_order(route.dst), route.table,
            route.protocol, route.oif or 0)


def _by_order(item: Item) -> tuple[Any, ...]:
    """Return a sort key: routes, neighbours, guard entries; by address."""
    if isinstance(item, HostRoute):
        return (0, *address_order(item.dst), item.table, item.protocol,
                item.oif or 0, item.metric or 0)
    if isinstance(item, Neighbour):
        return 1, *address_order(item.dst)
    return 2, *address_order(item.dst), item.mac or b''
