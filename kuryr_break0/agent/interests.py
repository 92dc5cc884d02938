# SPDX-License-Identifier: Apache-2.0

"""Decide which events of the kernel require a sync."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Container, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.plan import Outcome
from kuryr_break0 import policy


class Interests:
    """Filter for netlink events.

    Most events need no sync: new interfaces on their way into a pod, routes of
    other programs, and the agent's own changes. A pod can cause any number of
    events, for example by switching promiscuous mode. So an event passes the
    filter only if it changes a stored interface, address or next hop, or if a
    recorded address has another route or neighbour than its record requires.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = policy.Policy(options)
        self._names: set[str] = set()
        #: recorded names of break0s, by parent
        self._made: dict[str, str] = {}
        #: name and ifindex of each existing break0, by parent
        self._devices: dict[str, tuple[str, int]] = {}
        #: the events that the last sync has caused
        self._own: frozenset[kernel.Event] = frozenset()
        #: addresses that the last sync refused, for example next hops
        self._refused: Container[IPAddress] = ()
        #: source addresses since the last sync, by parent and subnet
        self._sources: dict[tuple[str, Any], Optional[IPAddress]] = {}
        self._links: dict[int, Any] = {}
        self._addresses: set[tuple[int, Any]] = set()
        self._next_hops: set[IPAddress] = set()
        self._of_services: dict[Optional[int], bool] = {}

    def prepare(self) -> None:
        """Store the state of interfaces and addresses before a sync.

        A change during the sync then differs from the stored state, and causes
        another sync.

        :raises Break0Error: if the kernel cannot be read
        """
        with kernel.Netlink() as netlink:
            self._links = self._read_links(netlink)
            self._addresses = set(netlink.addresses())

    def update(self, done: Outcome = Outcome()) -> None:
        """Store the state after a sync, which may have created a break0.

        :param done: the changes of the sync
        :raises Break0Error: if the kernel cannot be read
        """
        self._own = frozenset(_effects(done))
        self._refused = done.refused
        # The kernel sends no event for some deleted routes. Without an entry
        # here, the next route to such a next hop counts as a change.
        self._next_hops.intersection_update(done.refused)
        self._sources.clear()
        identity = None
        with contextlib.suppress(exceptions.LedgerUnavailable):
            identity = self._ledger.identity()
        devices = identity.devices if identity else {}
        self._made = devices
        made = {self._options.device, *devices.values()}
        self._names = {*made, *devices}
        if self._options.parent is not None:
            self._names.add(self._options.parent)
        with kernel.Netlink() as netlink:
            links = self._read_links(netlink)
            indexes = {link.name: link.index for link in links.values()}
            self._devices = {parent: (name, indexes[name])
                             for parent, name in devices.items()
                             if name in indexes}
            ours = {index for index, link in links.items()
                    if link.name in made}
            self._links = {**links, **{
                index: link for index, link in self._links.items()
                if index in links and index not in ours}}
            self._addresses = {
                *(each for each in self._addresses if each[0] not in ours),
                *(each for each in netlink.addresses()
                  if each.ifindex in ours)}
        self._of_services.clear()

    def _read_links(self, netlink: kernel.Netlink) -> dict[int, kernel.Link]:
        links = map(netlink.link, self._names)
        return {link.index: _essence(link) for link in links
                if link is not None}

    def lost(self, events: Iterable[kernel.Event]) -> bool:
        """Return whether a break0 or its parent was deleted or set down.

        The kernel sets an interface down before it deletes it, and sends an
        event for each neighbour. If events were lost, the event of the
        interface may be among them, so read its state from the kernel.
        """
        lost = False
        for event in events:
            if event.what == 'link' and (
                    event.ifindex in self._links or event.link is not None
                    and event.link.name in self._names) and (
                    event.gone or event.link is not None
                    and not event.link.up):
                return True
            lost |= event.what == 'lost'
        return lost and self._is_any_down()

    def _is_any_down(self) -> bool:
        """Return whether a break0 does not exist or is down."""
        with contextlib.suppress(exceptions.KernelRefused), \
                kernel.Netlink() as netlink:
            for parent, name in self._made.items():
                link = netlink.link(name)
                if (link is None or not link.up) and (
                        netlink.link(parent) is not None):
                    return True
        return False

    def include(self, event: kernel.Event) -> bool:
        """Return whether an event may require a repair."""
        if event.what == 'link':
            return self._changes_link(event)
        if event.what == 'address':
            place = event.ifindex or 0, event.dst
            changed = (place in self._addresses) == event.gone
            (self._addresses.discard if event.gone
             else self._addresses.add)(place)
            return changed and (not self._is_of_services(event.ifindex)
                                or self._is_recorded(event.dst))
        if event.what == 'route':
            return self._changes_next_hops(event) or self._differs(event)
        if event.what == 'nexthop':
            return self._changes_next_hops(event)
        if event.what == 'neighbour':
            return self._is_of_break0(event.ifindex) and self._differs(event)
        return True  # events were lost

    def _is_of_break0(self, ifindex: Optional[int]) -> bool:
        return any(ifindex == each for _, each in self._devices.values())

    def _differs(self, event: kernel.Event) -> bool:
        """Return whether a route or neighbour differs from its record.

        Routes and neighbours that kuryr-break0 sets itself never differ.
        """
        if event.dst is None or event in self._own or (
                not self._is_recorded(event.dst)):
            return False
        desired = self._desired(event.dst)
        if event.what == 'neighbour':
            return (None if event.gone else event.item) != next(
                iter(of_kind(Neighbour, desired)), None)
        return event.gone or event.item not in desired

    def _desired(self, address: IPAddress) -> tuple[Entry, ...]:
        """Return the entries that an address must have in the kernel.

        :returns: none if the address has no readable record, or no break0
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

    def _changes_next_hops(self, event: kernel.Event) -> bool:
        """Store the next hops of a route, or remove those of a deleted one.

        The ledger gets all next hops, because a container may take the address
        of a next hop whose route is deleted before the next sync.

        :returns: whether a recorded address became a next hop, or may have
            ceased to be one
        """
        found = {each.gateway for each in event.next_hops}
        if event.gone:
            self._next_hops -= found
            return any(map(self._is_recorded, found))
        new = found - self._next_hops
        if not new:
            return False
        self._next_hops |= new
        self._ledger.note_next_hops(new)
        return any(map(self._is_recorded, new))

    def _is_of_services(self, index: Optional[int]) -> bool:
        if index not in self._of_services:
            self._of_services[index] = policy.has_services(index)
        return self._of_services[index]

    def _changes_link(self, event: kernel.Event) -> bool:
        link, index = event.link, event.ifindex
        if link is None or index is None:
            return True
        if index not in self._links:
            # If an interface is deleted or set down, the kernel deletes its
            # IPv4 routes without events (fib_table_flush). An address that
            # was refused as their next hop may now be allowed.
            if self._refused and (event.gone or not link.up):
                return True
            # The record of a virtual machine ends with its macvtap.
            return (link.kind == 'macvtap' if event.gone
                    else link.name in self._names)
        before = self._links[index]
        self._links[index] = None if event.gone else _essence(link)
        return bool(self._links[index] != before)

    def _is_recorded(self, address: Optional[IPAddress]) -> bool:
        return address is not None and self._ledger.records.exists(address)


def _effects(done: Outcome) -> Iterator[kernel.Event]:
    """Return the events that the changes of a sync cause."""
    for items, gone in (done.set, False), (done.unset, True):
        for route in of_kind(HostRoute, items):
            yield kernel.Event('route', gone, route.oif, dst=route.dst,
                               item=route)
    for each in of_kind(Neighbour, done.set):
        yield kernel.Event('neighbour', False, each.ifindex, dst=each.dst,
                           item=each)
    for each in of_kind(Neighbour, done.unset):
        for gone in (False, True):
            yield kernel.Event('neighbour', gone, each.ifindex, dst=each.dst)


def _essence(link: kernel.Link) -> kernel.Link:
    """Return a link without the fields that do not matter for break0."""
    return dataclasses.replace(link, carrier=True, group=0)
