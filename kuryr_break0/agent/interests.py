# SPDX-License-Identifier: Apache-2.0

"""Decides which events of the kernel require a sync."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Iterable, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import IPAddress
from kuryr_break0 import policy


class Interests:
    """What the agent needs to hear of.

    Most events are of no use: of the interfaces of pods that are made on the
    node and moved away, of the routes of others, of what we set ourselves. A
    pod can cause as many as it likes, as by switching promiscuous mode, so
    an event counts only if it changes something that is known here.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._names: set[str] = set()
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

    def update(self) -> None:
        """Note what a sync may have made: break0s, and all of them.

        :raises Break0Error: if it cannot be read
        """
        identity = None
        with contextlib.suppress(exceptions.LedgerUnavailable):
            identity = self._ledger.identity()
        devices = identity.devices if identity else {}
        made = {self._options.device, *devices.values()}
        self._names = {*made, *devices}
        if self._options.parent is not None:
            self._names.add(self._options.parent)
        with kernel.Netlink() as netlink:
            links = self._read_links(netlink)
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
        """
        return any(event.what == 'link' and event.ifindex in self._links
                   and (event.gone or event.link is not None
                        and not event.link.up) for event in events)

    def include(self, event: kernel.Event) -> bool:
        """Return whether an event may be of something to repair."""
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
            ours = event.protocol == self._options.route_protocol
            return self._changes_next_hops(event) or (
                event.gone or not ours) and self._is_recorded(event.dst)
        if event.what == 'nexthop':
            return self._changes_next_hops(event)
        if event.what == 'neighbour':
            return (event.gone and event.ifindex in self._links
                    and self._is_recorded(event.dst))
        return True  # events were lost

    def _changes_next_hops(self, event: kernel.Event) -> bool:
        """Return whether an address of a pod is a next hop from now on.

        All are noted, since a container may take one that is gone by the
        next sync.
        """
        found = {each.gateway for each in event.next_hops}
        if event.gone:
            self._next_hops -= found  # or one of several routes by it
            return False
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
            # A VM ends with its macvtap.
            return (link.kind == 'macvtap' if event.gone
                    else link.name in self._names)
        before = self._links[index]
        self._links[index] = None if event.gone else _essence(link)
        return bool(self._links[index] != before)

    def _is_recorded(self, address: Optional[IPAddress]) -> bool:
        return address is not None and self._ledger.records.exists(address)


def _essence(link: kernel.Link) -> kernel.Link:
    """Return what of an interface a break0 depends on."""
    return dataclasses.replace(link, carrier=True, group=0)
