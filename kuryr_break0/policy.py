# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What the addresses of pods are to have, by the options and the node."""

from __future__ import annotations

import contextlib
from typing import Any, Collection, Iterable, Mapping, Optional

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Peer
from kuryr_break0 import netlink
from kuryr_break0 import plan
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour
from kuryr_break0.plan import Wanted


class Look:
    """What the kernel holds, by three dumps.

    :ivar link: break0, or None
    :ivar index: its ifindex; 0, the kernel's number for none
    :ivar own: the addresses of the node
    :ivar routes: the routes of the node
    :ivar on_break0: the host routes on break0
    :ivar neighbours: those that are set for good on break0
    """

    def __init__(self, kernel: netlink.Kernel,
                 link: Optional[netlink.Link]) -> None:
        self.link = link
        self.index = link.index if link is not None else 0
        self._addresses = kernel.addresses()
        self.own = {address for _, address in self._addresses}
        # A next hop through break0 is a pod, as one that serves a VPN.
        self.routes = kernel.routes(self.index)
        self.on_break0 = {route.dst: route for route in self.routes.host
                          if route.oif == self.index}
        self.neighbours = {
            neighbour.dst: neighbour
            for neighbour in kernel.neighbours(self.index)
        } if link is not None else {}

    def addresses_of(self, index: int) -> tuple[IPAddress, ...]:
        """The addresses of one interface."""
        return tuple(address for at, address in self._addresses
                     if at == index)

    def ours(self, protocol: int) -> set[IPAddress]:
        """The addresses with a route or neighbour that is ours."""
        items: list[Item] = [*self.on_break0.values(),
                             *self.neighbours.values()]
        return {item.dst for item in items if item.protocol == protocol}


class Policy:
    """What the options say of a pod's address."""

    def __init__(self, options: config.Options) -> None:
        self._options = options

    def require_allowed(self, address: IPAddress) -> None:
        """Refuse what cannot be the address of a pod on any node.

        :raises AddressRefused: saying why
        """
        reason = self._not_allowed(address)
        if reason is not None:
            raise self.refused(address, reason)

    def _not_allowed(self, address: IPAddress) -> Optional[str]:
        reason = config.not_a_host(address)
        allowed = self._options.allowed_cidrs
        if reason is None and allowed and not any(
                address in network for network in allowed):
            return 'outside [break0] allowed_cidrs'
        return reason

    def refused(self, address: IPAddress,
                reason: str) -> exceptions.AddressRefused:
        """The error of an address that is what it must not be."""
        return exceptions.AddressRefused(
            address=address, device=self._options.device,
            reason='it is ' + reason)

    def source(self, entry: Entry) -> Optional[IPAddress]:
        """What the node speaks to a pod from; None for break0's own."""
        if any(own.version == entry.address.version
               for own in self._options.addr):
            return None
        with contextlib.suppress(PermissionError):
            return netlink.source_for(entry.address, entry.parent)
        return None

    def wanted(self, entry: Entry, index: int,
               src: Optional[IPAddress]) -> Optional[Wanted]:
        """What an address is to have; None if its family is off.

        :param index: ifindex of break0
        """
        if entry.address.version == 6 and self._without_ipv6():
            return None
        neighbour = None
        if entry.mac is not None and self._options.static_neighbours:
            neighbour = Neighbour(entry.address, index, entry.mac,
                                  self._options.route_protocol)
        return Wanted(self.route(entry.address, index, src), neighbour)

    def _without_ipv6(self) -> bool:
        return netlink.read_sysctl('ipv6/conf/%s/disable_ipv6' %
                                   self._options.device) != 0

    def route(self, address: IPAddress, index: int,
              src: Optional[IPAddress] = None) -> HostRoute:
        """The route of an address."""
        return HostRoute(address, index, self._options.route_protocol,
                         self._options.route_table, src)

    def desired(self, look: Look, live: Mapping[IPAddress, Entry]
                ) -> tuple[dict[IPAddress, Wanted], dict[IPAddress, str]]:
        """What all pods are to have, and what is against which address."""
        desired, refused = {}, {}
        # All addresses of a subnet are spoken to from the same one.
        sources: dict[Any, Optional[IPAddress]] = {}
        for address, entry in live.items():
            reason = self._not_allowed(address)
            if reason is None and address in look.own:
                reason = 'an address of the node itself'
            if reason is None and address in look.routes.next_hops:
                reason = 'a next hop of a route of the node'
            if reason is not None:
                refused[address] = reason
                continue
            key = (entry.parent, next(
                (subnet for subnet in entry.subnets if address in subnet),
                address))
            if key not in sources:
                sources[key] = self.source(entry)
            wanted = self.wanted(entry, look.index, sources[key])
            if wanted is not None:
                desired[address] = wanted
        return desired, refused

    def plan(self, look: Look, desired: Mapping[IPAddress, Wanted],
             keep: Collection[IPAddress] = ()) -> plan.Plan:
        """The difference between what should be and what is."""
        return plan.compute(
            desired, look.routes.host, look.neighbours.values(),
            device=look.index, protocol=self._options.route_protocol,
            takeover=self._options.takeover, keep=keep)

    def peer(self, on_parent: Iterable[IPAddress],
             sources: Iterable[Optional[IPAddress]], mac: str) -> Peer:
        """What pods are to know of the node.

        :param on_parent: the addresses of the parent
        :param sources: those that the node speaks to pods from
        :param mac: that of break0
        """
        addresses = set(self._options.host_addresses) or {
            *on_parent, *(src for src in sources if src is not None),
            *self._options.addr}
        return Peer(
            tuple(sorted((address for address in addresses
                          if not address.is_link_local),
                         key=lambda address: (address.version,
                                              int(address)))),
            mac if self._options.static_neighbours else None)

    def peer_seen(self, look: Look, live: Mapping[IPAddress, Entry],
                  desired: Mapping[IPAddress, Wanted]) -> Optional[Peer]:
        """The same, by what was seen; None without break0 or pods."""
        if look.link is None or not live:
            return None
        index = netlink.index_of(parent_of(live.values()))
        return self.peer(
            look.addresses_of(index) if index is not None else (),
            {wanted.route.src for wanted in desired.values()}, look.link.mac)


def parent_of(entries: Iterable[Entry]) -> str:
    """The interface that the pods are on: that of the last one bound."""
    return max(entries, key=lambda entry: entry.bound_at).parent
