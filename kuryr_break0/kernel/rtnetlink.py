# SPDX-License-Identifier: Apache-2.0

"""An rtnetlink socket: interfaces, addresses, routes, neighbours."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from typing import (Any, Collection, Iterator, NamedTuple, Optional,
                    Sequence)

from kuryr_break0 import exceptions
from kuryr_break0.kernel.links import LinkSocket
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel.node import index_of
from kuryr_break0.kernel.node import name_of
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPInterface
from kuryr_break0.model import IPNetwork
from kuryr_break0.model import Neighbour

#: Changes in one request, which has to fit into the socket's buffer, as do
#: the answers if all are refused.
_BATCH = 128
#: Interfaces that are asked for their routes one by one; each takes 0.04 ms.
_ASKED_ONE_BY_ONE = 32
#: Priority and table of the rules that a namespace begins with; IPv4 has one
#: more, to a table behind main.
_DEFAULT_RULES = (0, wire.RT_TABLE_LOCAL), (32766, wire.RT_TABLE_MAIN)
_LAST_RULE = socket.AF_INET, 32767, wire.RT_TABLE_DEFAULT
_NEW = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
#: Neighbours that are looked up one by one; each takes 0.03 ms.
_LOOKED_UP = 8
_INCOMPLETE = 'incomplete'
#: States of a neighbour, by their bits (linux/neighbour.h).
_NUD = {0x01: _INCOMPLETE, 0x02: 'reachable', 0x04: 'stale', 0x08: 'delay',
        0x10: 'probe', 0x20: 'failed', 0x40: 'noarp', 0x80: 'permanent'}
#: What a look-up fails with for each kind of route that leads nowhere
#: (fib_props in fib_semantics.c, ip6_rt_type_to_error).
_LEADS_NOWHERE = {errno.EINVAL: wire.RTN_BLACKHOLE,
                  errno.EHOSTUNREACH: wire.RTN_UNREACHABLE,
                  errno.EACCES: wire.RTN_PROHIBIT}


class Routes(NamedTuple):
    """The routes of the node.

    :ivar host: those to single addresses
    :ivar next_hops: the gateways of all, but through those left out
    :ivar left_out: the gateways through those
    :ivar local: those of table local to what the node takes for its own
    :ivar broadcast: the broadcast addresses of the node's subnets
    """

    host: tuple[HostRoute, ...]
    next_hops: frozenset[IPAddress]
    left_out: frozenset[IPAddress] = frozenset()
    local: tuple[IPNetwork, ...] = ()
    broadcast: frozenset[IPAddress] = frozenset()


class Path(NamedTuple):
    """The way that a packet would go, as ``ip route get`` says it.

    :ivar device: the name of the interface that it leaves by
    :ivar gateway: the router that it is sent to, if it is
    :ivar source: the address that it is sent from
    """

    device: str
    ifindex: int
    gateway: Optional[IPAddress]
    source: Optional[IPAddress]


class Netlink(LinkSocket):
    """One rtnetlink socket in the namespace of the calling thread."""

    def configure(self, link: str, addresses: Sequence[IPInterface],
                  routes: Sequence[tuple[IPNetwork, IPAddress]]) -> None:
        """Give an interface addresses, and its namespace routes.

        All in one request. What is there is fine for addresses and default
        routes. The first error is raised.

        :param routes: networks with their gateways
        """
        index = index_of(link)
        if index is None:
            raise exceptions.KernelRefused(
                'configure ' + link, os.strerror(errno.ENODEV), errno.ENODEV)
        steps: list[tuple[Any, bool, int, bytes]] = [
            (address, True, wire.RTM_NEWADDR,
             wire.pack_address(index, address)) for address in addresses]
        steps += [('%s by %s' % route, route[0].prefixlen == 0,
                   wire.RTM_NEWROUTE, wire.pack_gateway_route(*route))
                  for route in routes]
        if not steps:
            return
        try:
            refused = self._send([netlink.Message(kind, _NEW, body)
                                  for _, _, kind, body in steps])
        except OSError as err:
            raise self._failed('configure ' + link, err) from err
        for place, refusal in sorted(refused.items()):
            what, may_exist, _, _ = steps[place]
            if refusal.errno != errno.EEXIST or not may_exist:
                raise self._failed('give %s %s' % (link, what), refusal)

    def change(self, changes: Sequence[values.Change]
               ) -> list[Optional[exceptions.KernelRefused]]:
        """Set and delete routes and neighbours, in order.

        As few requests as possible. The kernel goes through all of one
        before it returns, also when the process is killed meanwhile.

        :returns: the error of each that failed, in place of None. EEXIST is
            that of a route to add which is there, ENETDOWN or ENODEV that
            of an interface which is down or gone
        """
        errors: list[Optional[exceptions.KernelRefused]] = []
        for start in range(0, len(changes), _BATCH):
            errors += self._change(changes[start:start + _BATCH])
        return errors

    def _change(self, changes: Sequence[values.Change]
                ) -> list[Optional[exceptions.KernelRefused]]:
        """Change a batch; if it fails as a whole, its halves.

        One that cannot be packed must not hold up the others.
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

    def lookup(self, address: IPAddress, source: Optional[IPAddress] = None,
               vrf: int = 0) -> Optional[values.Route]:
        """Return the route that is used to an address; None if it has none.

        :param source: the node's address that it is reached from
        :param vrf: ifindex of the VRF that it is reached in; 0 for none
        """
        # Unreachable, prohibited and a blackhole are errors as well.
        with contextlib.suppress(exceptions.KernelRefused):
            return self._look_up(address, source, vrf)
        return None

    def _look_up(self, address: IPAddress, source: Optional[IPAddress] = None,
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

    def route_to(self, address: IPAddress) -> Optional[HostRoute]:
        """Return the route to an address alone, if that is what is used.

        One look-up. Only where that ends at a route that leads nowhere, which
        it does not name, those of its kind are dumped.
        """
        try:
            return self._look_up(address).host_route
        except exceptions.KernelRefused as err:
            kind = _LEADS_NOWHERE.get(err.errno)
        if kind is None:
            return None
        found = [route.host_route for route in self._list(
            'list the routes to %s' % address, wire.RTM_GETROUTE,
            wire.pack_route_dump(wire.family_of(address), kind=kind))
            if route.type == kind and route.dst == address]
        return min((each for each in found if each is not None),
                   key=lambda each: each.metric or 0, default=None)

    def is_on_link(self, address: IPAddress) -> bool:
        """Return whether an address would be reached without a gateway."""
        route = self.lookup(address)
        return route is not None and route.is_on_link

    def path_to(self, address: IPAddress, vrf: int = 0) -> Optional[Path]:
        """Return the way to an address; None if there is none.

        :param vrf: ifindex of the VRF that it is reached in; 0 for none
        """
        try:
            answer = self._get('look up the way to %s' % address,
                               wire.RTM_GETROUTE,
                               wire.pack_lookup(address, vrf=vrf))
            device = socket.if_indextoname(answer.oif or 0)
        except (exceptions.KernelRefused, OSError):
            return None
        return Path(device, answer.oif or 0,
                    next((each.gateway for each in answer.next_hops), None),
                    answer.src)

    def neighbour(self, ifindex: int, address: IPAddress
                  ) -> tuple[Optional[str], Optional[str]]:
        """Return MAC address and state of a neighbour, as far as known."""
        try:
            answer = self._get('look up the neighbour %s' % address,
                               wire.RTM_GETNEIGH,
                               wire.pack_neighbour(address, ifindex))
        except exceptions.KernelRefused:
            return None, None
        return answer.mac or None, _NUD.get(answer.state, 'none')

    def unresolved(self, ifindex: int, addresses: Collection[IPAddress]
                   ) -> list[IPAddress]:
        """Return the addresses that are asked for on an interface now.

        By look-ups, or by a dump where that takes less time.
        """
        if len(addresses) <= _LOOKED_UP:
            return [each for each in addresses if self.neighbour(
                ifindex, each)[1] == _INCOMPLETE]
        return [each.dst for each in self._neighbours(ifindex)
                if each.dst is not None and each.dst in addresses
                and _NUD.get(each.state) == _INCOMPLETE]

    def routes(self, devices: Sequence[int] = ()) -> Routes:
        """Read all routes of the node, by a dump.

        :param devices: interfaces whose next hops are left out
        """
        host: list[HostRoute] = []
        local: list[IPNetwork] = []
        broadcast: set[IPAddress] = set()
        next_hops = set(self._next_hop_objects())
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._list('list the routes', wire.RTM_GETROUTE,
                                    wire.pack_route_dump(family)):
                next_hops.update(route.next_hops)
                if route.type == values.RTN_BROADCAST and route.dst:
                    broadcast.add(route.dst)
                found = route.host_route
                if found is not None:
                    host.append(found)
                elif route.type == values.RTN_LOCAL and route.dst:
                    local.append(ipaddress.ip_network((route.dst,
                                                       route.dst_len)))
        left_out, others = (frozenset(
            each.gateway for each in next_hops
            if (each.oif in devices) is wanted) for wanted in (True, False))
        return Routes(tuple(host), others, left_out, tuple(local),
                      frozenset(broadcast))

    def has_default_rules(self) -> bool:
        """Return whether the tables local and main decide, in this order."""
        found = {rule for rule in self._list(
            'list the rules', wire.RTM_GETRULE, wire.ALL_RULES)
            if rule[0] in (socket.AF_INET, socket.AF_INET6)}
        return found - {_LAST_RULE} == {
            (family, *rule) for family in {socket.AF_INET, *(
                each[0] for each in found)} for rule in _DEFAULT_RULES}

    def _next_hop_objects(self) -> list[values.NextHop]:
        """List the next hops that routes may refer to, by a dump."""
        with netlink.tolerated(errno.EOPNOTSUPP):  # before Linux 5.3
            return [each for found in self._list(
                'list the nexthop objects', wire.RTM_GETNEXTHOP,
                wire.ALL_NEXT_HOPS) for each in found]
        return []

    def host_routes_of(self, ifindex: int, table: int) -> list[HostRoute]:
        """List the host routes of one interface in one table, by a dump."""
        found: list[values.Route] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            # The interface or the table is not there.
            with netlink.tolerated(errno.ENODEV, errno.ENOENT):
                found += self._list(
                    'list the routes of ' + name_of(ifindex),
                    wire.RTM_GETROUTE,
                    wire.pack_route_dump(family, table, ifindex))
        return [host for host in (route.host_route for route in found
                                  if route.oif == ifindex
                                  and route.table == table)
                if host is not None and host.direct]

    def next_hops(self, devices: Sequence[int] = (),
                  protocol: Optional[int] = None) -> frozenset[IPAddress]:
        """Read the gateways of all routes but of some interfaces.

        :param devices: ifindexes of the interfaces that are left out
        :param protocol: what marks their routes, which have no gateway
        """
        return frozenset(each.gateway for each in (
            *self._next_hop_objects(), *(
                each for route in self._routes_but_of(devices, protocol)
                for each in route.next_hops)) if each.oif not in devices)

    def _routes_but_of(self, devices: Sequence[int], protocol: Optional[int]
                       ) -> Iterator[values.Route]:
        """List the routes of other interfaces, by dumps.

        The number of routes of those interfaces is that of the pods. The
        kernel passes over them if it is asked for each of the others; where
        these are many, it is faster to pass over the messages here.
        """
        def read(message: netlink.Received) -> Any:
            if protocol is not None and (
                    wire.route_protocol(message.body) == protocol):
                return None
            return wire.parse(message)

        try:
            others = [index for index, _ in socket.if_nameindex()
                      if index not in devices]
        except OSError as err:
            raise self._failed('list the interfaces', err) from err
        asked: Sequence[Optional[int]] = (
            others if len(others) <= _ASKED_ONE_BY_ONE else [None])
        for oif in asked:
            for family in (socket.AF_INET, socket.AF_INET6):
                # The interface may go meanwhile, or the node be without IPv6.
                with netlink.tolerated(errno.ENODEV, errno.EOPNOTSUPP):
                    yield from self._list(
                        'list the next hops', wire.RTM_GETROUTE,
                        wire.pack_route_dump(
                            family, oif=oif, kind=values.RTN_UNICAST), read)

    def neighbours(self, ifindex: int) -> list[Neighbour]:
        """List the permanent neighbours of an interface, by a dump."""
        return [each for each in (
            state.permanent for state in self._neighbours(ifindex))
            if each is not None]

    def _neighbours(self, ifindex: int) -> list[values.NeighbourState]:
        found: list[values.NeighbourState] = []
        with netlink.tolerated(errno.ENODEV):
            found = self._list('list the neighbours of ' + name_of(ifindex),
                               wire.RTM_GETNEIGH,
                               wire.pack_neighbour_dump(ifindex))
        return [each for each in found if each.ifindex == ifindex]


def _description(verb: values.Verb, what: Entry) -> str:
    """Return what a change does, for errors."""
    kind, ifindex = (('route to', what.oif) if isinstance(what, HostRoute)
                     else ('neighbour', what.ifindex))
    return '%s the %s %s on %s' % (verb.value, kind, what.dst,
                                   name_of(ifindex))
