# SPDX-License-Identifier: Apache-2.0

"""Computes the changes that reconcile the kernel with the ledger.

The functions do no I/O. Routes and neighbours with our protocol number and
without a record are ``unclaimed``. :func:`compute` does not delete unclaimed
items: the ledger may have been lost, or an item may belong to another ledger.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Collection, Container, Iterable, Mapping, Optional

from kuryr_break0 import exceptions
from kuryr_break0 import model


@dataclasses.dataclass(frozen=True)
class Plan:
    """The changes of one break0, each part sorted by kind and address.

    :ivar set: items to add, or to replace if the kernel has another value
    :ivar unset: our items to delete
    :ivar foreign: for each address, the foreign route with the lowest metric
        that conflicts with the pod's route. The address gets no items, unless
        the kernel already has the pod's route
    :ivar unclaimed: our items without a record
    """

    set: tuple[model.Item, ...] = ()
    unset: tuple[model.Item, ...] = ()
    foreign: tuple[model.HostRoute, ...] = ()
    unclaimed: tuple[model.Item, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.unset)


@dataclasses.dataclass(frozen=True)
class Outcome(Plan):
    """The changes of a sync on all parents; a dry run only plans them.

    :ivar devices: defects of break0s, each with the name of the break0
    :ivar pods: owners of the pod sides that differed
    :ivar released: claims on addresses that the sandbox has released, with the
        reasons
    :ivar missing: claims on addresses that the interface lacks, with a
        description
    :ivar rebuilt: records that were rebuilt from routes and neighbours
    :ivar gone: claims of sandboxes that are proven not to exist
    :ivar unjudged: claims of sandboxes that may have ended, with the reason
        why their state is unknown
    :ivar refused: reason for refusal, by address; these addresses get no items
    :ivar errors: errors of single items or addresses
    """

    devices: tuple[tuple[str, str], ...] = ()
    pods: tuple[model.Owner, ...] = ()
    released: Mapping[model.Record, str] = dataclasses.field(
        default_factory=dict)
    missing: Mapping[model.Record, str] = dataclasses.field(
        default_factory=dict)
    rebuilt: tuple[model.Record, ...] = ()
    gone: tuple[model.Record, ...] = ()
    unjudged: Mapping[model.Record, str] = dataclasses.field(
        default_factory=dict)
    refused: Mapping[model.IPAddress, str] = dataclasses.field(
        default_factory=dict)
    errors: tuple[exceptions.Break0Error, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.devices or self.pods or self.rebuilt or self.gone
                    or self.released or super().__bool__())


def is_others(route: model.HostRoute, devices: Collection[Optional[int]],
              protocol: int) -> bool:
    """Return whether a route is foreign.

    A foreign route has another interface than the break0s, and another
    protocol number than ours.

    :param devices: ifindexes of break0s
    :param protocol: our protocol number
    """
    return route.oif not in devices and route.protocol != protocol


def compute(desired: Mapping[model.IPAddress, Collection[model.Item]],
            present: Iterable[model.Item], *, device: int, protocol: int,
            withdrawn: Container[model.IPAddress] = (),
            claimed: Container[model.IPAddress] = (),
            unreadable: Container[model.IPAddress] = (),
            is_refilled: bool = False) -> Plan:
    """Return the changes that turn the present items into the desired ones.

    A route on break0, or with our protocol number, is not foreign. If such a
    route has the table and the metric of a pod's route, the plan replaces it.

    All other routes are foreign. While the pod's route does not exist, each
    foreign route to the address in the same table is a conflict, because the
    pod's route has the lowest metric and would override the foreign route.
    Once the pod's route exists, only a foreign route with the same metric is a
    conflict. The plan deletes only routes that are on break0 and have our
    protocol number.

    :param desired: items that the addresses of pods must have, by address
    :param present: host routes of the node, and permanent neighbours and guard
        entries of break0
    :param device: ifindex of break0
    :param protocol: our protocol number
    :param withdrawn: addresses that must not have items on this break0
    :param claimed: addresses with a record, for any break0
    :param unreadable: addresses with an unreadable record
    :param is_refilled: whether the guard will be loaded again. The plan then
        sets guard entries for unclaimed addresses too, because otherwise the
        new guard would cut off the pods with these addresses
    """
    kept: set[model.Item] = set()
    held: set[model.IPAddress] = set()
    foreign: dict[model.IPAddress, model.HostRoute] = {}
    unset: list[model.Item] = []
    unclaimed: list[model.Item] = []
    pairs: set[model.Pair] = set()
    routes = {item.dst: item for items in desired.values()
              for item in model.of_kind(model.HostRoute, items)}
    for item in present:
        if isinstance(item, model.Pair):
            pairs.add(item)
            continue
        desired_items = desired.get(item.dst, ())
        if item in desired_items:
            kept.add(item)
        if isinstance(item, model.HostRoute):
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
            if model.of_kind(model.Neighbour, desired_items):
                continue
        if ours and (desired_items or item.dst in withdrawn):
            unset.append(item)
        elif ours and item.dst not in claimed:
            unclaimed.append(item)
    foreign = {address: route for address, route in foreign.items()
               if address not in held
               or route.metric == routes[address].metric}
    # While a foreign route prevents the route of an address, the address
    # needs neither neighbour nor guard entry.
    blocked = {address for address in foreign if routes[address] not in kept}
    missing = [item for address, items in desired.items()
               if address not in blocked for item in items
               if item not in kept]
    admitted = set(model.of_kind(model.Pair, missing))
    doubtful = {item.dst for item in unclaimed}
    if is_refilled:
        macs = {each.dst: each.mac
                for each in model.of_kind(model.Neighbour, unclaimed)}
        missing += {model.Pair.of(address, macs.get(address))
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


def _by_metric(route: model.HostRoute) -> tuple[int, ...]:
    return (route.metric or 0, *model.address_order(route.dst), route.table,
            route.protocol, route.oif or 0)


def _by_order(item: model.Item) -> tuple[Any, ...]:
    """Return a sort key: routes, neighbours, guard entries; by address."""
    if isinstance(item, model.HostRoute):
        return (0, *model.address_order(item.dst), item.table, item.protocol,
                item.oif or 0, item.metric or 0)
    if isinstance(item, model.Neighbour):
        return 1, *model.address_order(item.dst)
    return 2, *model.address_order(item.dst), item.mac or b''
