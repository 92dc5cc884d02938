# SPDX-License-Identifier: Apache-2.0

"""Decides which events of the kernel require a sync."""

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
    """What the agent needs to hear of.

    Most events are of no use: of the interfaces of pods that are made on the
    node and moved away, of the routes of others, of what we set ourselves. A
    pod can cause as many as it likes, as by switching promiscuous mode, so
    an event counts only if it changes something that is known here, or
    differs from what the record of its address asks for.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = policy.Policy(options)
        self._names: set[str] = set()
        #: names of break0s by their parents
        self._made: dict[str, str] = {}
        #: name and ifindex of the break0 of each parent
        self._devices: dict[str, tuple[str, int]] = {}
        #: the events that the last sync has caused
        self._own: frozenset[kernel.Event] = frozenset()
        #: the addresses that it has refused, as a next hop
        self._refused: Container[IPAddress] = ()
        #: source addresses since the last sync, by parent and subnet
        self._sources: dict[tuple[str, Any], Optional[IPAddress]] = {}
        self._links: dict[int, Any] = {}
        self._addresses: set[tuple[int, Any]] = set()
        self._next_hops: set[IPAddress] = set()
        self._of_services: dict[Optional[int], bool] = {}

    def prepare(self) -> None:
        """Note what is there before a sync.

        So what changes while that reads is an event, and causes another one.

        :raises Break0Error: if it cannot be read
        """
        with kernel.Netlink() as netlink:
            self._links = self._read_links(netlink)
            self._addresses = set(netlink.addresses())

    def update(self, done: Outcome = Outcome()) -> None:
        """Note what a sync may have made: break0s, and all of them.

        :param done: what it has done
        :raises Break0Error: if it cannot be read
        """
        self._own = frozenset(_effects(done))
        self._refused = done.refused
        # Others may have gone without an event, and be one again.
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
        """Return whether a break0 or a parent was deleted, or set down.

        Before it is deleted, it is set down, with an event for each neighbour.
        Its own event may be among lost ones, or come after a sync that found
        it deleted.
        """
        lost = False
        for event in events:
            if event.kind == 'link' and (
                    event.ifindex in self._links or event.link is not None
                    and event.link.name in self._names) and (
                    event.is_gone or event.link is not None
                    and not event.link.up):
                return True
            lost |= event.kind == 'lost'
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
        """Return whether an event may be of something to repair."""
        if event.kind == 'link':
            return self._changes_link(event)
        if event.kind == 'address':
            place = event.ifindex or 0, event.dst
            changed = (place in self._addresses) == event.is_gone
            (self._addresses.discard if event.is_gone
             else self._addresses.add)(place)
            return changed and (not self._is_of_services(event.ifindex)
                                or self._is_recorded(event.dst))
        if event.kind == 'route':
            return self._changes_next_hops(event) or self._differs(event)
        if event.kind == 'nexthop':
            return self._changes_next_hops(event)
        if event.kind == 'neighbour':
            return self._is_of_break0(event.ifindex) and self._differs(event)
        return True  # events were lost

    def _is_of_break0(self, ifindex: Optional[int]) -> bool:
        return any(ifindex == each for _, each in self._devices.values())

    def _differs(self, event: kernel.Event) -> bool:
        """Return whether a recorded address has another item than it must.

        So the items that break0 itself sets cause no sync.
        """
        if event.dst is None or event in self._own or (
                not self._is_recorded(event.dst)):
            return False
        desired = self._desired(event.dst)
        if event.kind == 'neighbour':
            return (None if event.is_gone else event.item) != next(
                iter(of_kind(Neighbour, desired)), None)
        return event.is_gone or event.item not in desired

    def _desired(self, address: IPAddress) -> tuple[Entry, ...]:
        """Return the items of a recorded address; none if unknown."""
        record = None
        with contextlib.suppress(exceptions.LedgerUnavailable):
            record = self._ledger.records.get(address)
        if record is None or record.parent not in self._devices:
            return ()
        device, index = self._devices[record.parent]
        # As in a snapshot: a subnet is reached from one address.
        key = record.parent, next((
            subnet for subnet in record.subnets if address in subnet), address)
        if key not in self._sources:
            self._sources[key] = self._policy.source(record, device)
        return self._policy.items(record, index, self._sources[key])

    def _changes_next_hops(self, event: kernel.Event) -> bool:
        """Return whether an address of a pod is a next hop from now on.

        Or is none any more, unless another route has it. All are noted,
        since a container may take one that is gone by the next sync.
        """
        found = {each.gateway for each in event.next_hops}
        if event.is_gone:
            self._next_hops -= found
            return any(map(self._is_recorded, found))
        new = found - self._next_hops
        if not new:
            return False
        self._next_hops |= new
        self._ledger.add_next_hops(new)
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
            # IPv4 routes, whose next hop may be a refused address, go with
            # their interface without an event (fib_table_flush).
            if self._refused and (event.is_gone or not link.up):
                return True
            # A VM ends with its macvtap.
            return (link.kind == 'macvtap' if event.is_gone
                    else link.name in self._names)
        before = self._links[index]
        self._links[index] = None if event.is_gone else _essence(link)
        return bool(self._links[index] != before)

    def _is_recorded(self, address: Optional[IPAddress]) -> bool:
        return address is not None and self._ledger.records.exists(address)


def _effects(done: Outcome) -> Iterator[kernel.Event]:
    """Return the events of changes. A deleted neighbour fails before."""
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
    """Return what of an interface a break0 depends on."""
    return dataclasses.replace(link, carrier=True, group=0)
