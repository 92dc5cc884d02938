# SPDX-License-Identifier: Apache-2.0

"""Decides what an address gets, by options and node. Changes nothing."""

from __future__ import annotations

import contextlib
import itertools
from typing import Collection, Iterable, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.model import address_order
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import not_a_host
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted

#: Addresses of other interfaces than the parent that a pod has to know.
MAX_ELSEWHERE = 16
OWN = 'an address of the node itself'
NEXT_HOP = 'a next hop of a route of the node'
#: Only where discovery brought it; others may serve a VPN.
OWN_NEXT_HOP = ('a next hop of a route that leads through break0. If its '
                'router is elsewhere, set that route again')
EARLIER_NEXT_HOP = ('an earlier next hop of the node, which discovery does '
                    'not bind until the next boot')


class Policy:
    """What the addresses of pods may be, and must have."""

    def __init__(self, options: config.Options) -> None:
        self._options = options

    def not_allowed(self, address: IPAddress) -> Optional[str]:
        """Return why an address cannot be a pod's on any node; else None."""
        reason = not_a_host(address)
        allowed = self._options.allowed_cidrs
        if reason is None and allowed and not any(
                address in network for network in allowed):
            return 'outside [break0] allowed_cidrs'
        return reason

    @staticmethod
    def against(address: IPAddress, discovered: bool,
                own: Collection[IPAddress], routes: kernel.Routes,
                next_hops_seen: Collection[str]) -> Optional[str]:
        """Return why an address cannot be a pod's on this node; else None.

        :param next_hops_seen: the last next hops of this boot
        """
        if address in own:
            return OWN
        if address in routes.next_hops:
            return NEXT_HOP
        if discovered and address in routes.left_out:
            return OWN_NEXT_HOP
        if discovered and str(address) in next_hops_seen:
            return EARLIER_NEXT_HOP
        return None

    def refused(self, address: IPAddress,
                reason: str) -> exceptions.AddressRefused:
        return exceptions.AddressRefused(
            address=address, device=self._options.device,
            reason='it is ' + reason)

    def source(self, record: Record, device: str) -> Optional[IPAddress]:
        """Return what the node speaks from; None for break0's own address."""
        if device == self._options.device and any(
                own.version == record.address.version
                for own in self._options.addr):
            return None
        with contextlib.suppress(PermissionError):
            return kernel.source_for(record.address, record.parent)
        return None

    def wanted(self, record: Record, device: str, index: int,
               src: Optional[IPAddress]) -> Optional[Wanted]:
        """Return what an address must have; None if its family is off."""
        if record.address.version == 6 and kernel.read_sysctl(
                'ipv6/conf/%s/disable_ipv6' % device) != 0:
            return None
        neighbour = None
        if record.mac is not None:
            neighbour = Neighbour(record.address, index, record.mac,
                                  self._options.route_protocol)
        return Wanted(self.route(record.address, index, src), neighbour)

    def route(self, address: IPAddress, index: int,
              src: Optional[IPAddress] = None) -> HostRoute:
        return HostRoute(address, index, self._options.route_protocol,
                         self._options.route_table, src,
                         best_metric(address))

    def solicited(self, on_parent: Collection[IPAddress],
                  device: str) -> list[IPAddress]:
        """Return the addresses of the node that are answered for by IPv6."""
        known = self.node_addresses(on_parent, (), (), '', device)
        return [each for each in known.addresses if each.version == 6]

    def node_addresses(self, on_parent: Collection[IPAddress],
                       sources: Iterable[Optional[IPAddress]],
                       elsewhere: Iterable[IPAddress], mac: str,
                       device: str) -> NodeAddresses:
        """Return what pods must know of the node.

        Addresses of other interfaces are left out, unless [break0]
        all_addresses is set or the parent has none: a container that is
        connected to a network there later has them as its neighbours, and
        Docker refuses to connect it while a route to one of them is in its
        way.

        :param on_parent: those of the parent
        :param sources: those that the node speaks to pods from
        :param elsewhere: see :func:`elsewhere`
        """
        addr = self._options.addr if device == self._options.device else ()
        addresses = {
            *on_parent, *(src for src in sources if src is not None), *addr,
            *(elsewhere if self._options.all_addresses or not any(
                not each.is_link_local for each in on_parent) else ())}
        return NodeAddresses(
            tuple(sorted((address for address in addresses
                          if not address.is_link_local
                          and not address.is_unspecified),
                         key=address_order)), mac)


def elsewhere(found: Iterable[tuple[int, IPAddress]],
              preferred: Collection[IPAddress]) -> list[IPAddress]:
    """Return what else the node may speak from, at most MAX_ELSEWHERE.

    MASQUERADE ignores the source of a route: on break0, which has no address,
    it takes in IPv4 the first one of all interfaces, in the order in which
    they came (inet_select_addr), and in IPv6 any (RFC 6724). A program can
    bind to the source that other routes have.

    :param found: all addresses of the node with their ifindexes, in the order
        of the kernel
    :param preferred: the sources of its routes
    """
    chosen = sorted(preferred, key=address_order)
    for index, pairs in itertools.groupby(
            sorted(found, key=lambda each: each[0]), lambda each: each[0]):
        usable = [address for _, address in pairs if not (
            address.is_link_local or address.is_loopback)]
        four = next((each for each in usable if each.version == 4), None)
        new = [each for each in usable
               if each not in chosen and (each.version == 6 or each is four)]
        # Hundreds of interfaces can have the same one, as those of pods have
        # by other CNI plugins.
        if new and not has_services(index):
            chosen += new
        if len(chosen) >= MAX_ELSEWHERE:
            break
    return chosen[:MAX_ELSEWHERE]


def has_services(index: Optional[int]) -> bool:
    """Return whether the addresses of an interface are those of services.

    So are those of kube-ipvs0, thousands maybe, and of other dummies. In
    pods they lead elsewhere.
    """
    with kernel.Netlink() as netlink:
        link = netlink.link(kernel.name_of(index))
    return link is not None and link.kind == 'dummy'
