# SPDX-License-Identifier: Apache-2.0

"""An rtnetlink socket for interfaces, addresses, routes and neighbours."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from typing import (Any, Callable, Collection, Iterator, NamedTuple,
                    Optional, Sequence)

from kuryr_break0 import exceptions
from kuryr_break0.kernel import links
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import node
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0 import model

#: Maximum changes in one request: the request and its errors must fit into the
#: socket's buffers.
_BATCH = 128
#: Maximum interfaces to dump separately; each of these dumps takes 0.04 ms.
_MAX_SEPARATE_DUMPS = 32
#: Priority and table of the default rules of a namespace. IPv4 has one more
#: rule, for table default.
_DEFAULT_RULES = (0, wire.RT_TABLE_LOCAL), (32766, wire.RT_TABLE_MAIN)
_LAST_RULE = socket.AF_INET, 32767, wire.RT_TABLE_DEFAULT
_NEW = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
#: Maximum neighbours to look up separately; each look-up takes 0.03 ms.
_MAX_LOOKUPS = 8
_INCOMPLETE = 'incomplete'
#: States of a neighbour, by their bits (linux/neighbour.h).
_NUD = {0x01: _INCOMPLETE, 0x02: 'reachable', 0x04: 'stale', 0x08: 'delay',
        0x10: 'probe', 0x20: 'failed', 0x40: 'noarp', 0x80: 'permanent'}
#: Types of routes that make a look-up fail, by the errno of the failure
#: (fib_props in fib_semantics.c, ip6_rt_type_to_error).
_LEADS_NOWHERE = {errno.EINVAL: wire.RTN_BLACKHOLE,
                  errno.EHOSTUNREACH: wire.RTN_UNREACHABLE,
                  errno.EACCES: wire.RTN_PROHIBIT}


class Routes(NamedTuple):
    """The routes of the node.

    :ivar host: routes to single addresses
    :ivar next_hops: gateways on all interfaces, except on the ``devices`` of
        :meth:`Netlink.routes`
    :ivar left_out: gateways on these ``devices``
    :ivar local: destinations of the routes of type local
    :ivar broadcast: broadcast addresses of the node's subnets
    """

    host: tuple[model.HostRoute, ...]
    next_hops: frozenset[model.IPAddress]
    left_out: frozenset[model.IPAddress] = frozenset()
    local: tuple[model.IPNetwork, ...] = ()
    broadcast: frozenset[model.IPAddress] = frozenset()


class Path(NamedTuple):
    """The path of a packet, as ``ip route get`` shows it.

    :ivar device: the name of the outgoing interface
    :ivar gateway: the next hop; None if the destination is on-link
    :ivar source: the source address
    """

    device: str
    ifindex: int
    gateway: Optional[model.IPAddress]
    source: Optional[model.IPAddress]


class Netlink(links.LinkSocket):
    """One rtnetlink socket in the namespace of the calling thread."""

    def configure(self, link: str, addresses: Sequence[model.IPInterface],
                  routes: Sequence[tuple[model.IPNetwork, model.IPAddress]]
                  ) -> None:
        """Add addresses to an interface, and routes to its namespace.

        One request contains all addresses and routes. The method ignores the
        error EEXIST of an address and of a default route.

        :param routes: networks with their gateways
        :raises KernelRefused: for the first error that is not ignored
        """
        index = node.find_ifindex(link)
        if index is None:
            raise exceptions.KernelRefused(
                'configure ' + link, os.strerror(errno.ENODEV), errno.ENODEV)
        steps = [(str(address), True, netlink.Message(
            wire.RTM_NEWADDR, _NEW, wire.pack_address(index, address)))
            for address in addresses]
        steps += [('%s by %s' % route, route[0].prefixlen == 0,
                   netlink.Message(wire.RTM_NEWROUTE, _NEW,
                                   wire.pack_gateway_route(*route)))
                  for route in routes]
        if not steps:
            return
        try:
            refused = self._send([message for _, _, message in steps])
        except OSError as err:
            raise self._failed('configure ' + link, err) from err
        for place, refusal in sorted(refused.items()):
            what, may_exist, _ = steps[place]
            if refusal.errno != errno.EEXIST or not may_exist:
                raise self._failed('add %s to %s' % (what, link), refusal)

    def change(self, changes: Sequence[values.Change]
               ) -> list[Optional[exceptions.KernelRefused]]:
        """Set and delete routes and neighbours, in order.

        One request contains up to _BATCH changes. The kernel processes the
        whole request even if this process is killed meanwhile.

        :returns: for each change, its error or None. The error is EEXIST if
            the route to add exists, and ENETDOWN or ENODEV if the interface is
            down or gone
        """
        errors: list[Optional[exceptions.KernelRefused]] = []
        for start in range(0, len(changes), _BATCH):
            errors += self._change(changes[start:start + _BATCH])
        return errors

    def _change(self, changes: Sequence[values.Change]
                ) -> list[Optional[exceptions.KernelRefused]]:
        """Apply a batch; if the batch fails as a whole, bisect it.

        Because of the bisection, a change that cannot be packed does not
        prevent the other changes.
        """
        try:
            refused = self._send([wire.change(*each) for each in changes])
        except (OSError, struct.error, ValueError) as err:
            if len(changes) > 1:
                middle = len(changes) // 2
                return [*self._change(changes[:middle]),
                        *self._change(changes[middle:])]
            refused = {0: err if isinstance(err, OSError)
                       else OSError(errno.EINVAL, str(err))}
        return [self._failed(_description(*change), refused[place])
                if place in refused else None
                for place, change in enumerate(changes)]

    def lookup(self, address: model.IPAddress,
               source: Optional[model.IPAddress] = None,
               vrf: int = 0) -> Optional[values.Route]:
        """Return the route to an address; None if there is none.

        :param source: the local source address of the packet
        :param vrf: ifindex of the VRF to look in; 0 for none
        """
        # For unreachable, prohibit and blackhole routes, a look-up fails.
        with contextlib.suppress(exceptions.KernelRefused):
            return self._look_up(address, source, vrf)
        return None

    def _look_up(self, address: model.IPAddress,
                 source: Optional[model.IPAddress] = None,
                 vrf: int = 0) -> values.Route:
        # In strict mode the kernel refuses RTM_F_LOOKUP_TABLE for IPv6.
        self._set_option(netlink.NETLINK_GET_STRICT_CHK, 0)
        try:
            route: values.Route = self._get(
                'look up the route to %s' % address, wire.RTM_GETROUTE,
                wire.pack_lookup(
                    address, wire.RTM_F_FIB_MATCH | wire.RTM_F_LOOKUP_TABLE,
                    source, vrf))
        finally:
            self._set_option(netlink.NETLINK_GET_STRICT_CHK)
        return route

    def route_to(self, address: model.IPAddress) -> Optional[model.HostRoute]:
        """Return the host route that the node uses for an address, or None.

        One look-up finds a route of type unicast. A look-up of a blackhole,
        unreachable or prohibit route fails, and the error shows only the type.
        In this case, the method dumps all routes of the type.
        """
        try:
            return self._look_up(address).host_route
        except exceptions.KernelRefused as err:
            kind = _LEADS_NOWHERE.get(err.errno)
        if kind is None:
            return None
        routes = filter(None, (route.host_route for route in self._list(
            'list the routes to %s' % address, wire.RTM_GETROUTE,
            wire.pack_route_dump(wire.family_of(address), kind=kind))
            if route.type == kind and route.dst == address))
        return min(routes, key=lambda each: each.metric or 0, default=None)

    def is_on_link(self, address: model.IPAddress) -> bool:
        """Return whether the route to an address has no gateway."""
        route = self.lookup(address)
        return route is not None and route.is_on_link

    def path_to(self, address: model.IPAddress,
                vrf: int = 0) -> Optional[Path]:
        """Return the path to an address; None if there is none.

        :param vrf: ifindex of the VRF to look in; 0 for none
        """
        try:
            answer = self._get('look up the path to %s' % address,
                               wire.RTM_GETROUTE,
                               wire.pack_lookup(address, vrf=vrf))
            device = socket.if_indextoname(answer.oif or 0)
        except (exceptions.KernelRefused, OSError):
            return None
        return Path(device, answer.oif or 0,
                    next((each.gateway for each in answer.next_hops), None),
                    answer.src)

    def neighbour(self, ifindex: int, address: model.IPAddress
                  ) -> tuple[Optional[str], Optional[str]]:
        """Return the MAC address and the state of a neighbour.

        :returns: None for an unknown MAC address or state
        """
        try:
            answer = self._get('look up the neighbour %s' % address,
                               wire.RTM_GETNEIGH,
                               wire.pack_neighbour(address, ifindex))
        except exceptions.KernelRefused:
            return None, None
        return answer.mac or None, _NUD.get(answer.state, 'none')

    def list_unresolved(self, ifindex: int,
                        addresses: Collection[model.IPAddress]
                        ) -> list[model.IPAddress]:
        """Return the addresses that the kernel is resolving on an interface.

        For more than _MAX_LOOKUPS addresses, the method dumps the neighbours.
        """
        if len(addresses) <= _MAX_LOOKUPS:
            return [each for each in addresses if self.neighbour(
                ifindex, each)[1] == _INCOMPLETE]
        return [each.dst for each in self._neighbours(ifindex)
                if each.dst is not None and each.dst in addresses
                and _NUD.get(each.state) == _INCOMPLETE]

    def routes(self, devices: Sequence[int] = ()) -> Routes:
        """Read all routes of the node, by dumps.

        :param devices: ifindexes of the interfaces whose next hops are in
            ``left_out`` of the result
        """
        host: list[model.HostRoute] = []
        local: list[model.IPNetwork] = []
        broadcast: set[model.IPAddress] = set()
        next_hops = set(self._next_hop_objects())
        for route in self._list_routes('list the routes'):
            next_hops.update(route.next_hops)
            if route.type == values.RTN_BROADCAST and route.dst:
                broadcast.add(route.dst)
            host_route = route.host_route
            if host_route is not None:
                host.append(host_route)
            elif route.type == values.RTN_LOCAL and route.dst:
                local.append(ipaddress.ip_network((route.dst, route.dst_len)))
        left_out, elsewhere = (frozenset(
            each.gateway for each in next_hops
            if (each.oif in devices) is is_through)
            for is_through in (True, False))
        return Routes(tuple(host), elsewhere, left_out, tuple(local),
                      frozenset(broadcast))

    def _list_routes(self, action: str, tolerated: Collection[int] = (),
                     read: Callable[[netlink.Received], Any] = wire.parse,
                     **filters: int) -> Iterator[values.Route]:
        """List the IPv4 routes, then the IPv6 routes, by dumps.

        :param tolerated: values of errno; after such an error, the list lacks
            the routes of the IP version
        :param read: as for :meth:`netlink.RequestSocket._dump`
        :param filters: as for :func:`wire.pack_route_dump`
        """
        for family in (socket.AF_INET, socket.AF_INET6):
            with netlink.tolerate_errors(*tolerated):
                yield from self._list(
                    action, wire.RTM_GETROUTE,
                    wire.pack_route_dump(family, **filters), read)

    def has_default_rules(self) -> bool:
        """Return whether only the default rules exist, by a dump."""
        rules = {rule for rule in self._list(
            'list the rules', wire.RTM_GETRULE, wire.ALL_RULES)
            if rule[0] in (socket.AF_INET, socket.AF_INET6)}
        return rules - {_LAST_RULE} == {
            (family, *rule) for family in {socket.AF_INET, *(
                each[0] for each in rules)} for rule in _DEFAULT_RULES}

    def _next_hop_objects(self) -> list[values.NextHop]:
        """List the next hops of nexthop objects, by a dump."""
        with netlink.tolerate_errors(errno.EOPNOTSUPP):  # before Linux 5.3
            return [each for next_hops in self._list(
                'list the nexthop objects', wire.RTM_GETNEXTHOP,
                wire.ALL_NEXT_HOPS) for each in next_hops]
        return []

    def host_routes_of(self, ifindex: int, table: int
                       ) -> list[model.HostRoute]:
        """List the direct host routes of an interface in a table, by dumps."""
        routes = self._list_routes(
            'list the routes of ' + node.format_ifname(ifindex),
            # The interface or the table may not exist.
            (errno.ENODEV, errno.ENOENT), table=table, oif=ifindex)
        return [host for host in filter(None, (
            route.host_route for route in routes))
            if host.direct and (host.oif, host.table) == (ifindex, table)]

    def next_hops(self, devices: Sequence[int] = (),
                  protocol: Optional[int] = None
                  ) -> frozenset[model.IPAddress]:
        """Read the gateways of routes, except on some interfaces, by dumps.

        :param devices: ifindexes of the excluded interfaces
        :param protocol: protocol number of the routes on these interfaces.
            The method does not parse routes with this number, because they
            have no gateway. If the number is None, it parses all routes
        """
        return frozenset(each.gateway for each in (
            *self._next_hop_objects(), *(
                each for route in self._list_routes_except(devices, protocol)
                for each in route.next_hops)) if each.oif not in devices)

    def _list_routes_except(self, devices: Sequence[int],
                            protocol: Optional[int]
                            ) -> Iterator[values.Route]:
        """List the routes except on excluded interfaces, by dumps.

        The excluded interfaces have a route for each pod. The method dumps
        the routes of each other interface separately, so the kernel sends no
        route of a pod. For more than _MAX_SEPARATE_DUMPS interfaces, a dump of
        all routes is faster. Routes with ``protocol`` are not parsed.
        """
        def read(message: netlink.Received) -> Any:
            if protocol is not None and (
                    wire.route_protocol(message.body) == protocol):
                return None
            return wire.parse(message)

        try:
            indexes = [index for index, _ in socket.if_nameindex()
                       if index not in devices]
        except OSError as err:
            raise self._failed('list the interfaces', err) from err
        for oif in indexes if len(indexes) <= _MAX_SEPARATE_DUMPS else [0]:
            yield from self._list_routes(
                'list the next hops',
                # The interface may be gone, or the node may lack IPv6.
                (errno.ENODEV, errno.EOPNOTSUPP), read, oif=oif,
                kind=values.RTN_UNICAST)

    def neighbours(self, ifindex: int) -> list[model.Neighbour]:
        """List the permanent neighbours of an interface, by a dump."""
        return list(filter(None, (
            state.permanent for state in self._neighbours(ifindex))))

    def _neighbours(self, ifindex: int) -> list[values.NeighbourState]:
        with netlink.tolerate_errors(errno.ENODEV):
            return [each for each in self._list(
                'list the neighbours of ' + node.format_ifname(ifindex),
                wire.RTM_GETNEIGH, wire.pack_neighbour_dump(ifindex))
                if each.ifindex == ifindex]
        return []


def _description(verb: values.Verb, what: model.Entry) -> str:
    """Describe a change for error messages."""
    kind, ifindex = (
        ('route to', what.oif) if isinstance(what, model.HostRoute)
        else ('neighbour', what.ifindex))
    return '%s the %s %s on %s' % (verb.value, kind, what.dst,
                                   node.format_ifname(ifindex))
