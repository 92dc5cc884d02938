# SPDX-License-Identifier: Apache-2.0

"""Computes what must change so that the kernel matches the ledger.

A pure function. It deletes nothing that merely has no record: a ledger can be
lost or be another's. Such items are ``unclaimed``.
"""

from __future__ import annotations

import dataclasses
from typing import Collection, Iterable, Mapping, Optional

from kuryr_break0 import exceptions
from kuryr_break0.model import address_order
from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted


@dataclasses.dataclass(frozen=True)
class Plan:
    """The difference. Neighbours are set before routes, and go after them.

    :ivar replace: routes to set, in place of what is there
    :ivar delete: our routes that must go
    :ivar foreign: routes of others that are in the way of a pod's route, the
        best one of each address. Left alone, and ours is not set; or, where
        they are taken over, those that ours is set in place of, or before
    :ivar learn: neighbours to set, in place of what is there
    :ivar forget: our neighbours that must go
    :ivar unclaimed: our routes and neighbours of addresses without a record
    :ivar blocked: addresses that get nothing, because of a foreign route
    """

    replace: tuple[HostRoute, ...] = ()
    delete: tuple[HostRoute, ...] = ()
    foreign: tuple[HostRoute, ...] = ()
    learn: tuple[Neighbour, ...] = ()
    forget: tuple[Neighbour, ...] = ()
    unclaimed: tuple[Entry, ...] = ()
    blocked: frozenset[IPAddress] = dataclasses.field(
        default=frozenset(), compare=False)

    @property
    def changes(self) -> tuple[Entry, ...]:
        """Return all that is to be set or deleted."""
        return (*self.learn, *self.replace, *self.delete, *self.forget)

    def __bool__(self) -> bool:
        return bool(self.changes)


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


def compute(desired: Mapping[IPAddress, Wanted],
            routes: Iterable[HostRoute], neighbours: Iterable[Neighbour] = (),
            *, device: int, protocol: int, takeover: bool = False,
            withdrawn: Collection[IPAddress] = (),
            elsewhere: Collection[IPAddress] = ()) -> Plan:
    """Compare what must be with what is, for one break0.

    A route that is on break0, or carries our protocol number, was set for a
    pod, so in the way of a pod's route it is replaced. All else belongs to
    others, at any metric: ours is the best, so it would override them. One
    that comes when ours is there, with another metric, takes no part. Only
    what is both is ever deleted.

    :param desired: what the addresses of pods must have
    :param routes: the host routes of the node
    :param neighbours: the permanent neighbours on break0
    :param device: ifindex of break0
    :param withdrawn: addresses that are known to be nobody's any more
    :param elsewhere: addresses that have a record, but not for this break0
    """
    present: set[IPAddress] = set()
    held: set[IPAddress] = set()
    foreign: dict[IPAddress, HostRoute] = {}
    delete, forget = [], []
    unclaimed: list[Entry] = []
    for route in routes:
        wanted = desired.get(route.dst)
        ours = route.oif == device and route.protocol == protocol
        if wanted is not None and route.table == wanted.route.table:
            if route == wanted.route:
                present.add(route.dst)
            if is_others(route, (device,), protocol):
                foreign[route.dst] = min(
                    route, foreign.get(route.dst, route), key=_by_metric)
            elif route.metric == wanted.route.metric:
                held.add(route.dst)
            elif ours:
                delete.append(route)
        elif ours and (wanted is not None or route.dst in withdrawn):
            delete.append(route)
        elif ours and route.dst not in elsewhere:
            unclaimed.append(route)
    known = set()
    for neighbour in neighbours:
        wanted = desired.get(neighbour.dst)
        ours = (neighbour.ifindex == device
                and neighbour.protocol == protocol)
        if wanted is not None and wanted.neighbour is not None:
            if neighbour == wanted.neighbour:
                known.add(neighbour.dst)
        elif ours and (wanted is not None or neighbour.dst in withdrawn):
            forget.append(neighbour)
        elif ours and neighbour.dst not in elsewhere:
            unclaimed.append(neighbour)
    foreign = {address: route for address, route in foreign.items()
               if address not in held
               or route.metric == desired[address].route.metric}
    # What is refused gets nothing else either.
    blocked = set() if takeover else set(foreign) - present
    settled, answered = present | blocked, known | blocked
    return Plan(
        replace=tuple(sorted((
            wanted.route for wanted in desired.values()
            if wanted.route.dst not in settled), key=_by_order)),
        delete=tuple(sorted(delete, key=_by_order)),
        foreign=tuple(sorted(foreign.values(), key=_by_order)),
        learn=tuple(sorted((
            wanted.neighbour for wanted in desired.values()
            if wanted.neighbour is not None
            and wanted.neighbour.dst not in answered), key=_by_order)),
        forget=tuple(sorted(forget, key=_by_order)),
        unclaimed=tuple(sorted(unclaimed, key=_by_order)),
        blocked=frozenset(blocked))


def _by_metric(route: HostRoute) -> tuple[int, ...]:
    return (route.metric or 0, *_by_order(route))


def _by_order(item: Entry) -> tuple[int, ...]:
    """Return a sort key: by address, routes before neighbours."""
    if isinstance(item, HostRoute):
        return (*address_order(item.dst), item.table, item.protocol,
                item.oif or 0, item.metric or 0)
    return (*address_order(item.dst), 2 ** 32)
