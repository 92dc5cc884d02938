# SPDX-License-Identifier: Apache-2.0

"""Decides whether an address may be bound, and which items it gets.

The decisions depend on the options and on the state of the node. The functions
read the kernel and change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
from typing import Collection, Iterable, NamedTuple, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import model

#: The node addresses of a pod can include IPv6 addresses of interfaces other
#: than the parent. This is the maximum number of such addresses.
MAX_ELSEWHERE = 16
_NOWHERE = ipaddress.ip_address('192.0.2.1')  # RFC 5737
NOT_ALLOWED = 'outside [break0] allowed_cidrs'
OWN = 'an address of the node itself'
NO_HOST = 'not a host address, according to the routes of the node'
NEXT_HOP = 'a next hop of a route of the node'
#: This reason applies to discovered addresses only. A pod of another origin
#: with such an address may be a router on purpose, for example of a VPN.
OWN_NEXT_HOP = ('a next hop of a route through break0. If the router is on '
                'another interface, set the route again with that interface')
EARLIER_NEXT_HOP = ('an earlier next hop of the node, which discovery does '
                    'not bind until the next boot')


class Facts(NamedTuple):
    """The addresses that the node itself uses.

    A snapshot has the facts about all addresses. A bind reads only the facts
    about its own address.

    :ivar node_addresses: addresses of the node
    :ivar no_hosts: addresses that no host can have, for example broadcast
        addresses
    :ivar next_hops: next hops of the node's routes, except through a break0
    :ivar through_break0: next hops of the node's routes through a break0
    :ivar earlier_next_hops: most recent next hops of this boot, as texts
    """

    node_addresses: Collection[model.IPAddress] = ()
    no_hosts: Collection[model.IPAddress] = ()
    next_hops: Collection[model.IPAddress] = ()
    through_break0: Collection[model.IPAddress] = ()
    earlier_next_hops: Collection[str] = ()


class Policy:
    """Rules for the addresses of pods and their items."""

    def __init__(self, options: config.Options) -> None:
        self._options = options

    def refusal(self, address: model.IPAddress,
                origin: Optional[model.Origin] = None,
                facts: Facts = Facts()) -> Optional[str]:
        """Return why an address must not be bound; None if it may be.

        Next hops through a break0 and earlier next hops are refused only if
        the origin is DISCOVERED.

        :param facts: without facts, only the options and the address decide
        """
        # Before the first bind, the node does not have the addresses of the
        # option addr yet.
        if address in self._options.addr:
            return OWN
        reason = model.explain_non_host(address)
        allowed = self._options.allowed_cidrs
        if reason is None and allowed and not any(
                address in network for network in allowed):
            return NOT_ALLOWED
        if reason is not None:
            return reason
        if address in facts.node_addresses:
            return OWN
        if address in facts.no_hosts:
            return NO_HOST
        if address in facts.next_hops:
            return NEXT_HOP
        if origin is not model.Origin.DISCOVERED:
            return None
        if address in facts.through_break0:
            return OWN_NEXT_HOP
        if str(address) in facts.earlier_next_hops:
            return EARLIER_NEXT_HOP
        return None

    def refused(self, address: model.IPAddress,
                reason: str) -> exceptions.AddressRefused:
        return exceptions.AddressRefused(
            address=address, device=self._options.device,
            reason='it is ' + reason)

    def source(self, record: model.Record, device: str
               ) -> Optional[model.IPAddress]:
        """Return the preferred source of the route of a pod.

        :returns: None to let the kernel choose the source
        """
        if device == self._options.device and any(
                own.version == record.address.version
                for own in self._options.addr):
            return None
        with contextlib.suppress(PermissionError):
            return kernel.find_source(record.address, record.parent)
        return None

    @staticmethod
    def has_family(address: model.IPAddress, device: str) -> bool:
        """Return whether an address's family is enabled on a break0."""
        return address.version == 4 or kernel.read_sysctl(
            'ipv6/conf/%s/disable_ipv6' % device) == 0

    def items(self, record: model.Record, index: int,
              src: Optional[model.IPAddress]) -> tuple[model.Entry, ...]:
        """Return the items of an address: its neighbour, then its route.

        If the record has no MAC address, there is no neighbour.
        """
        route = self.route(record.address, index, src)
        if record.mac is None:
            return (route,)
        return model.Neighbour(record.address, index, record.mac,
                               self._options.route_protocol), route

    def route(self, address: model.IPAddress, index: int,
              src: Optional[model.IPAddress] = None) -> model.HostRoute:
        return model.HostRoute(address, index, self._options.route_protocol,
                               self._options.route_table, src,
                               model.best_metric(address))

    def own_addresses(self, addresses: Collection[tuple[int, model.IPAddress]],
                      parent: Optional[int], device: str
                      ) -> tuple[model.IPAddress, ...]:
        """Return the addresses that a break0 itself must have.

        They are the addresses of the ``addr`` option and, if necessary, the
        address of :func:`link_address`. MASQUERADE ignores the preferred
        source of a route. If the outgoing interface has no address,
        MASQUERADE uses the first address of another interface
        (inet_select_addr). A pod does not know that address and would answer
        through its gateway. In that case break0 gets an address that only its
        pods know.

        break0 keeps this address, because connections may use it, and an
        interface that loses its last address also loses its routes
        (fib_disable_ip). break0 gets no address of the node: if a program is
        bound to such an address, the kernel would send the multicast packets
        of that program through break0 (__ip_dev_find).

        The parameters are the same as for :meth:`node_addresses`.
        """
        addr = self._options.addr if device == self._options.device else ()
        taken, own = None, link_address(device)
        with contextlib.suppress(PermissionError):
            # lo stands for an interface without an address: 127.0.0.1 has
            # scope host, so inet_select_addr skips 127.0.0.1.
            taken = kernel.find_source(_NOWHERE, 'lo')
        is_needed = (taken is not None and (parent, taken) not in addresses
                     and not any(each.version == 4 for each in addr))
        if is_needed or any(address == own for _, address in addresses):
            return *addr, own
        return addr

    def solicited(self, addresses: Collection[tuple[int, model.IPAddress]],
                  parent: Optional[int], device: str) -> list[model.IPAddress]:
        """Return the IPv6 node addresses that pods may solicit.

        The guard answers neighbour solicitations for these addresses. The
        parameters are the same as for :meth:`node_addresses`.
        """
        node = self.node_addresses(addresses, parent, (), '', device)
        return [each for each in node.addresses if each.version == 6]

    def node_addresses(self,
                       addresses: Collection[tuple[int, model.IPAddress]],
                       parent: Optional[int],
                       sources: Iterable[Optional[model.IPAddress]], mac: str,
                       device: str) -> model.NodeAddresses:
        """Return the node addresses that the pods must know.

        These are the addresses of the parent without link-local addresses, the
        sources of the routes, and the addresses of break0 itself. If the
        parent has no such address, the result also has IPv6 addresses of other
        interfaces. Otherwise it has none of them: Docker can connect a
        container to a network of another interface later, but refuses if the
        container has a route to an address in that network.

        :param addresses: all addresses of the node with their ifindexes
        :param parent: ifindex of the parent
        :param sources: source addresses of the routes to the pods
        """
        on_parent = {address for index, address in addresses
                     if index == parent and not address.is_link_local}
        own = self.own_addresses(addresses, parent, device)
        chosen = {*on_parent, *(src for src in sources if src is not None),
                  *(() if on_parent else ipv6_elsewhere(addresses))}
        others = sorted(chosen.difference(own), key=model.address_order)
        return model.NodeAddresses((*others, *own), mac)


def link_address(device: str) -> model.IPAddress:
    """Return the IPv4 address of a break0 that only its pods know.

    The address is derived from the name of the break0, because a pod can have
    interfaces on several break0s. The address is link-local, so neither node
    nor pod uses it for another purpose.
    """
    high, low = hashlib.sha256(os.fsencode(device)).digest()[:2]
    # RFC 3927 reserves the first and the last 256 addresses.
    return ipaddress.ip_address('169.254.%d.%d' % (high % 254 + 1, low))


def ipv6_elsewhere(addresses: Iterable[tuple[int, model.IPAddress]]
                   ) -> list[model.IPAddress]:
    """Return IPv6 addresses of the node, at most MAX_ELSEWHERE.

    The result omits link-local and loopback addresses, and addresses of
    Kubernetes services. The kernel can choose any of the returned addresses as
    the source of a packet to a pod (RFC 6724).
    """
    chosen: list[model.IPAddress] = []
    services: dict[int, bool] = {}
    for index, address in sorted(addresses, key=lambda each: each[0]):
        if len(chosen) == MAX_ELSEWHERE:
            break
        # Some CNI plugins assign one address to hundreds of interfaces, one
        # interface for each pod.
        if address.version == 4 or address in chosen or (
                address.is_link_local or address.is_loopback):
            continue
        if index not in services:
            services[index] = has_services(index)
        if not services[index]:
            chosen.append(address)
    return chosen


def has_services(index: Optional[int]) -> bool:
    """Return whether an interface may have addresses of Kubernetes services.

    kube-proxy in IPVS mode assigns thousands of such addresses to kube-ipvs0,
    an interface of the kind dummy. So each interface of this kind counts. Pods
    do not reach services through break0.
    """
    with kernel.Netlink() as netlink:
        link = netlink.link(kernel.format_ifname(index))
    return link is not None and link.kind == 'dummy'
