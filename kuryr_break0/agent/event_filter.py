# SPDX-License-Identifier: Apache-2.0

"""Decides which events of the kernel require a sync."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Container, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0.engine.plan import Outcome
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model
from kuryr_break0 import policy


class EventFilter:
    """Filter for netlink events.

    Most events need no sync: new interfaces that are moved into a pod, routes
    of other programs, and the agent's own changes. A pod can cause any number
    of events, for example by switching promiscuous mode. So an event causes a
    sync only if the event changes a stored interface, address or next hop, or
    if the event shows another route or neighbour of an address than the record
    of the address requires.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = policy.Policy(options)
        #: names of all break0s and their parents
        self._names: set[str] = set()
        #: recorded names of break0s, by parent
        self._device_names: dict[str, str] = {}
        #: name and ifindex of each existing break0, by parent
        self._devices: dict[str, tuple[str, int]] = {}
        #: the events that the last sync has caused
        self._own_events: frozenset[kernel.Event] = frozenset()
        #: addresses that the last sync refused, for example next hops
        self._refused: Container[model.IPAddress] = ()
        #: source addresses of routes, read since the last sync, by parent
        #: and subnet
        self._sources: dict[tuple[str, Any], Optional[model.IPAddress]] = {}
        self._links: dict[int, Any] = {}
        self._addresses: set[tuple[int, Any]] = set()
        self._next_hops: set[model.IPAddress] = set()
        #: whether an interface has addresses of services, by ifindex
        self._has_services: dict[Optional[int], bool] = {}

    def prepare(self) -> None:
        """Store the state of interfaces and addresses before a sync.

        A change during the sync then differs from the stored state, and causes
        another sync.

        :raises Break0Error: if the kernel cannot be read
        """
        with kernel.Netlink() as netlink:
            self._links = self._read_links(netlink)
            self._addresses = set(netlink.addresses())

    def update(self, outcome: Outcome = Outcome()) -> None:
        """Store the changes of a sync, and the resulting state of all break0s.

        :raises Break0Error: if the kernel cannot be read
        """
        self._own_events = frozenset(_make_events(outcome))
        self._refused = outcome.refused
        # The kernel deletes some routes without an event, so a stored next hop
        # may be outdated. Keep only the next hops that the sync refused. A new
        # route through any other next hop then counts as a change.
        self._next_hops.intersection_update(outcome.refused)
        self._sources.clear()
        identity = None
        with contextlib.suppress(exceptions.LedgerUnavailable):
            identity = self._ledger.identity()
        devices = identity.devices if identity else {}
        self._device_names = devices
        names = {self._options.device, *devices.values()}
        self._names = {*names, *devices}
        if self._options.parent is not None:
            self._names.add(self._options.parent)
        with kernel.Netlink() as netlink:
            links = self._read_links(netlink)
            indexes = {link.name: link.index for link in links.values()}
            self._devices = {parent: (name, indexes[name])
                             for parent, name in devices.items()
                             if name in indexes}
            ours = {index for index, link in links.items()
                    if link.name in names}
            self._links = {**links, **{
                index: link for index, link in self._links.items()
                if index in links and index not in ours}}
            self._addresses = {
                *(each for each in self._addresses if each[0] not in ours),
                *(each for each in netlink.addresses()
                  if each.ifindex in ours)}
        self._has_services.clear()

    def _read_links(self, netlink: kernel.Netlink) -> dict[int, kernel.Link]:
        links = map(netlink.link, self._names)
        return {link.index: _select_fields(link) for link in links
                if link is not None}

    def include_loss(self, events: Iterable[kernel.Event]) -> bool:
        """Return whether a break0 or its parent was deleted or set down.

        Before the kernel deletes an interface, it sets the interface down, and
        sends an event for each neighbour. These events can fill the buffer of
        the socket, and the event of the interface is then lost. So if events
        were lost, this method reads the state of all break0s from the kernel.
        """
        is_incomplete = False
        for event in events:
            if event.kind == 'link' and (
                    event.ifindex in self._links or event.link is not None
                    and event.link.name in self._names) and (
                    event.is_gone or event.link is not None
                    and not event.link.up):
                return True
            is_incomplete |= event.kind == 'lost'
        return is_incomplete and self._is_any_down()

    def _is_any_down(self) -> bool:
        """Return whether the break0 of an existing parent is gone or down."""
        with contextlib.suppress(exceptions.KernelRefused), \
                kernel.Netlink() as netlink:
            for parent, name in self._device_names.items():
                link = netlink.link(name)
                if (link is None or not link.up) and (
                        netlink.link(parent) is not None):
                    return True
        return False

    def include(self, event: kernel.Event) -> bool:
        """Return whether an event may require a repair."""
        if event.kind == 'link':
            return self._update_link(event)
        if event.kind == 'address':
            place = event.ifindex or 0, event.dst
            changed = (place in self._addresses) == event.is_gone
            (self._addresses.discard if event.is_gone
             else self._addresses.add)(place)
            return changed and (not self._is_service_link(event.ifindex)
                                or self._is_recorded(event.dst))
        if event.kind == 'route':
            return self._update_next_hops(event) or self._is_different(event)
        if event.kind == 'nexthop':
            return self._update_next_hops(event)
        if event.kind == 'neighbour':
            return (self._is_break0(event.ifindex)
                    and self._is_different(event))
        return True  # events were lost

    def _is_break0(self, ifindex: Optional[int]) -> bool:
        return any(ifindex == each for _, each in self._devices.values())

    def _is_different(self, event: kernel.Event) -> bool:
        """Return whether a route or neighbour differs from its record.

        An event that the last sync has caused is no difference.
        """
        if event.dst is None or event in self._own_events or (
                not self._is_recorded(event.dst)):
            return False
        desired = self._find_desired(event.dst)
        if event.kind == 'neighbour':
            return (None if event.is_gone else event.item) != next(
                iter(model.of_kind(model.Neighbour, desired)), None)
        return event.is_gone or event.item not in desired

    def _find_desired(self, address: model.IPAddress
                      ) -> tuple[model.Entry, ...]:
        """Return the entries that an address must have in the kernel.

        :returns: an empty tuple if the address has no readable record, or no
            break0
        """
        record = None
        with contextlib.suppress(exceptions.LedgerUnavailable):
            record = self._ledger.records.get(address)
        if record is None or record.parent not in self._devices:
            return ()
        device, index = self._devices[record.parent]
        # As in a snapshot, all routes into a subnet have one source address.
        key = record.parent, next((
            subnet for subnet in record.subnets if address in subnet), address)
        if key not in self._sources:
            self._sources[key] = self._policy.source(record, device)
        return self._policy.items(record, index, self._sources[key])

    def _update_next_hops(self, event: kernel.Event) -> bool:
        """Add a new route's next hops, or remove a deleted route's next hops.

        Store each new next hop in the ledger too. If the route is deleted
        before the next sync, the sync cannot read the next hop, although a
        container may already have the address of the next hop.

        :returns: whether a recorded address became a next hop, or may have
            ceased to be one
        """
        gateways = {each.gateway for each in event.next_hops}
        if event.is_gone:
            self._next_hops -= gateways
            return any(map(self._is_recorded, gateways))
        new = gateways - self._next_hops
        if not new:
            return False
        self._next_hops |= new
        self._ledger.add_next_hops(new)
        return any(map(self._is_recorded, new))

    def _is_service_link(self, index: Optional[int]) -> bool:
        """Return whether an interface has addresses of services."""
        if index not in self._has_services:
            self._has_services[index] = policy.has_services(index)
        return self._has_services[index]

    def _update_link(self, event: kernel.Event) -> bool:
        """Store an interface's new state; return whether to sync."""
        link, index = event.link, event.ifindex
        if link is None or index is None:
            return True
        if index not in self._links:
            # If an interface is deleted or set down, the kernel deletes its
            # IPv4 routes without events (fib_table_flush). An address that the
            # last sync refused as a next hop may now be allowed.
            if self._refused and (event.is_gone or not link.up):
                return True
            # If a macvtap is deleted, a sync drops the claims of its virtual
            # machine.
            return (link.kind == 'macvtap' if event.is_gone
                    else link.name in self._names)
        before = self._links[index]
        self._links[index] = None if event.is_gone else _select_fields(link)
        return bool(self._links[index] != before)

    def _is_recorded(self, address: Optional[model.IPAddress]) -> bool:
        return address is not None and self._ledger.records.exists(address)


def _make_events(outcome: Outcome) -> Iterator[kernel.Event]:
    """Return the events that the changes of a sync cause."""
    for items, gone in (outcome.set, False), (outcome.unset, True):
        for route in model.of_kind(model.HostRoute, items):
            yield kernel.Event('route', gone, route.oif, dst=route.dst,
                               item=route)
    for each in model.of_kind(model.Neighbour, outcome.set):
        yield kernel.Event('neighbour', False, each.ifindex, dst=each.dst,
                           item=each)
    for each in model.of_kind(model.Neighbour, outcome.unset):
        # Before the kernel deletes a neighbour, it reports the neighbour as
        # failed.
        for gone in (False, True):
            yield kernel.Event('neighbour', gone, each.ifindex, dst=each.dst)


def _select_fields(link: kernel.Link) -> kernel.Link:
    """Return a copy of a link, to compare it with another copy.

    The copies have fixed values in the fields that need no sync if they
    change.
    """
    return dataclasses.replace(link, carrier=True, group=0)
