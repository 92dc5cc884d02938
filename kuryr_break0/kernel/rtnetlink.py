# SPDX-License-Identifier: Apache-2.0

"""An rtnetlink socket: interfaces, addresses, routes, neighbours."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import random
import socket
import struct
import time
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from kuryr_break0 import exceptions
from kuryr_break0.kernel.namespaces import opened
from kuryr_break0.kernel.node import index_of
from kuryr_break0.kernel.node import name_of
from kuryr_break0.kernel import wire
from kuryr_break0.kernel.wire import Change
from kuryr_break0.kernel.wire import Link
from kuryr_break0.kernel.wire import Message
from kuryr_break0.kernel.wire import NLM_F_CREATE
from kuryr_break0.kernel.wire import NLM_F_EXCL
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPInterface
from kuryr_break0.model import IPNetwork
from kuryr_break0.model import Neighbour

_SOL_NETLINK = 270  # linux/socket.h
# linux/netlink.h; absent in older kernels, which costs time only
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
#: Changes in one request, which has to fit into the socket's buffer, as do
#: the answers if all are refused.
_BATCH = 128
_RECEIVED = 2 ** 17  # bytes; a dump fills at most 32 KiB at once
#: Seconds after which an answer is lost. The kernel answers while the
#: request is being sent, so only a fault can make it as long.
_TIMEOUT = 10
#: Interfaces that are asked for their routes one by one; each takes 0.04 ms.
_ASKED_ONE_BY_ONE = 32
#: An interrupted dump is repeated this often. Each try meets about as many
#: changes as the last, so what counts is their number, not their distance.
_DUMP_TRIES, _FEW_TRIES = 20, 3
_DUMP_PAUSE = 0.05  # seconds, at most

#: States of a neighbour, by their bits (linux/neighbour.h).
_NUD = {0x01: 'incomplete', 0x02: 'reachable', 0x04: 'stale', 0x08: 'delay',
        0x10: 'probe', 0x20: 'failed', 0x40: 'noarp', 0x80: 'permanent'}


#: What a look-up fails with for each kind of route that leads nowhere
#: (fib_props in fib_semantics.c, ip6_rt_type_to_error).
_LEADS_NOWHERE = {errno.EINVAL: wire.RTN_BLACKHOLE,
                  errno.EHOSTUNREACH: wire.RTN_UNREACHABLE,
                  errno.EACCES: wire.RTN_PROHIBIT}
_ANY_NUMBER = struct.pack('=i', -1)  # NETNSA_NSID_NOT_ASSIGNED


class Routes(NamedTuple):
    """The routes of the node.

    :ivar host: those to single addresses
    :ivar next_hops: the gateways of all, but through those left out
    :ivar left_out: the gateways through those
    """

    host: tuple[HostRoute, ...]
    next_hops: frozenset[IPAddress]
    left_out: frozenset[IPAddress] = frozenset()


class GatewayRoute(NamedTuple):
    """A route by a gateway."""

    network: IPNetwork
    gateway: IPAddress


class Path(NamedTuple):
    """The way that a packet would go, as ``ip route get`` says it.

    :ivar device: the name of the interface it leaves by
    :ivar ifindex: of that
    :ivar gateway: the router that it is sent to, if it is
    :ivar source: the address that it is sent from
    """

    device: str
    ifindex: int
    gateway: Optional[IPAddress]
    source: Optional[IPAddress]


class _Refused(Exception):
    """The kernel answered a request with an error."""

    def __init__(self, code: int, text: str = '') -> None:
        super().__init__(code)
        self.code = code
        self.reason = os.strerror(code) + (' (%s)' % text if text else '')


class _Interrupted(Exception):
    """A table has changed while it was dumped."""


class Netlink:
    """One rtnetlink socket in the namespace of the calling thread.

    To be used as a context manager. Its methods raise KernelRefused.

    :param most: messages that a list is read to at most, where others can
        make it as long as they like; 0 for all
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._open()

    def _open(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW, 0)  # NETLINK_ROUTE
        except OSError as err:
            raise _refused('open a netlink socket', err) from err
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK,
                       _NETLINK_GET_STRICT_CHK):
            self._set_option(option)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                struct.pack('@ll', _TIMEOUT, 0))
        self._sequence = 0

    def _set_option(self, option: int, value: int = 1) -> None:
        try:
            self._socket.setsockopt(_SOL_NETLINK, option, value)
        except OSError:
            pass

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def link(self, name: str) -> Optional[Link]:
        """Return an interface by its name, or None."""
        if not 0 < len(name.encode(errors='replace')) < 16:
            return None  # the kernel would refuse to look for it
        body = (wire.pack_link() + wire.text(wire.IFLA_IFNAME, name)
                + wire.number(wire.IFLA_EXT_MASK,
                              wire.RTEXT_FILTER_SKIP_STATS))
        try:
            link: Link
            link, = self._ask('read the interface ' + name, Message(
                wire.RTM_GETLINK, 0, body))
        except exceptions.KernelRefused as err:
            if err.errno == errno.ENODEV:
                return None
            raise
        return link

    def links(self) -> list[Link]:
        """List all interfaces, by a dump."""
        return self._dump('list the interfaces', Message(
            wire.RTM_GETLINK, 0, wire.pack_link() + wire.number(
                wire.IFLA_EXT_MASK, wire.RTEXT_FILTER_SKIP_STATS)))

    def create_macvlan(self, name: str, parent: Link, netns: str, *,
                       mac: str, mtu: int, up: bool = True) -> None:
        """Create a macvlan in bridge mode in another namespace.

        It is never in that of the parent, so nobody there hears of it.

        :param netns: the path of the namespace
        :raises KernelRefused: with EEXIST also if an interface of this
            namespace has the name, on a kernel that looks for it here (5.10
            and 6.12 do, 6.18 does not)
        """
        with opened(netns) as other:
            self._order(
                'create the macvlan %s of the pod on %s' % (name,
                                                            parent.name),
                Message(wire.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL,
                        (wire.pack_link(flags=wire.IFF_UP,
                                        change=wire.IFF_UP) if up
                         else wire.pack_link())
                        + wire.text(wire.IFLA_IFNAME, name)
                        + wire.number(wire.IFLA_LINK, parent.index)
                        + wire.attribute(wire.IFLA_ADDRESS,
                                         wire.pack_mac(mac))
                        + wire.number(wire.IFLA_MTU, mtu)
                        + wire.number(wire.IFLA_NET_NS_FD, other)
                        + wire.pack_macvlan()))

    def rename_and_raise(self, link: Link, name: str) -> None:
        """Give an interface that is down a name, and set it up."""
        self._order(
            'name the interface %s %s, and set it up' % (link.name, name),
            Message(wire.RTM_NEWLINK, 0, wire.pack_link(
                link.index, wire.IFF_UP, wire.IFF_UP)
                + wire.text(wire.IFLA_IFNAME, name)))

    def set_mtu(self, link: Link, mtu: int) -> None:
        self._set(link, 'MTU to %d' % mtu, wire.number(wire.IFLA_MTU, mtu))

    def set_mac(self, link: Link, mac: str) -> None:
        self._set(link, 'MAC address to ' + mac,
                  wire.attribute(wire.IFLA_ADDRESS, wire.pack_mac(mac)))

    def set_vrf(self, link: Link, vrf: Optional[wire.Vrf]) -> None:
        """Put an interface in a VRF, or take it out of the one it is in."""
        self._set(link, 'VRF', wire.number(wire.IFLA_MASTER,
                                           vrf.ifindex if vrf else 0))

    def set_alias(self, link: Link, alias: str) -> None:
        """Give an interface a text that it keeps as long as it exists.

        The kernel ignores one in the request that creates it.
        """
        self._set(link, 'alias to ' + alias,
                  wire.attribute(wire.IFLA_IFALIAS, alias.encode()))

    def set_group(self, link: Link, group: int) -> None:
        self._set(link, 'group to %d' % group,
                  wire.number(wire.IFLA_GROUP, group))

    def _set(self, link: Link, what: str, attribute: bytes) -> None:
        self._order('set the %s of %s' % (what, link.name), Message(
            wire.RTM_NEWLINK, 0, wire.pack_link(link.index) + attribute))

    def raise_link(self, link: Link) -> None:
        """Set an interface up, with multicast off."""
        self._order(
            'set up the interface ' + link.name,
            Message(wire.RTM_NEWLINK, 0, wire.pack_link(
                link.index, wire.IFF_UP, wire.IFF_UP | wire.IFF_MULTICAST)),
            'Where another macvlan has its MAC address, as one that was '
            'renamed, delete that or rename it back: ip link show type '
            'macvlan')

    def delete_link(self, name: str) -> None:
        """Delete an interface; one that is not there is fine."""
        index = index_of(name)
        try:
            if index is not None:
                self._order('delete the interface ' + name, Message(
                    wire.RTM_DELLINK, 0, wire.pack_link(index)))
        except exceptions.KernelRefused as err:
            if err.errno != errno.ENODEV:
                raise

    def put_address(self, link: Link, address: IPAddress) -> None:
        """Put an address on an interface, alone in its prefix."""
        self._order('put the address %s on %s' % (address, link.name),
                    Message(wire.RTM_NEWADDR,
                            NLM_F_CREATE | wire.NLM_F_REPLACE,
                            wire.pack_address(link.index, address)))

    def delete_link_local(self, link: Link, address: IPAddress) -> None:
        """Delete an address that the kernel has made for an interface."""
        self._order('delete the address %s of %s' % (address, link.name),
                    Message(wire.RTM_DELADDR, 0, wire.pack_prefix(
                        link.index, ipaddress.ip_interface('%s/64' % address)
                    )))

    def configure(self, link: str, addresses: Sequence[IPInterface],
                  routes: Sequence[GatewayRoute]) -> None:
        """Give an interface addresses, and its namespace routes.

        All in one request. What is there is fine for addresses and default
        routes.

        :raises KernelRefused: the first error
        """
        index = index_of(link)
        if index is None:
            raise exceptions.KernelRefused(
                'configure ' + link, os.strerror(errno.ENODEV), errno.ENODEV)
        messages = [Message(wire.RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL,
                            wire.pack_prefix(index, address))
                    for address in addresses]
        messages += [Message(wire.RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL,
                             wire.pack_gateway_route(*route))
                     for route in routes]
        if not messages:
            return
        try:
            refused = self._send(messages)
        except OSError as err:
            raise _refused('configure ' + link, err) from err
        for place, why in sorted(refused.items()):
            is_route = place >= len(addresses)
            if why.code == errno.EEXIST and not (
                    is_route and routes[place - len(addresses)][0].prefixlen):
                continue
            what: Any = addresses[place] if not is_route else (
                '%s by %s' % routes[place - len(addresses)])
            raise exceptions.KernelRefused(
                'give %s %s' % (link, what), why.reason, why.code)

    def change(self, changes: Sequence[Change]
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

    def _change(self, changes: Sequence[Change]
                ) -> list[Optional[exceptions.KernelRefused]]:
        """Change a batch; if it fails as a whole, its halves."""
        try:
            refused = self._send([wire.change(*each) for each in changes])
        except OSError as err:
            if len(changes) > 1:
                middle = len(changes) // 2
                return [*self._change(changes[:middle]),
                        *self._change(changes[middle:])]
            refused = {0: _Refused(err.errno or 0)}
        except (struct.error, ValueError) as err:
            # One that cannot be packed must not hold up the others.
            if len(changes) > 1:
                return [each for change in changes
                        for each in self._change([change])]
            refused = {0: _Refused(errno.EINVAL, str(err))}
        return [self._refusal(change, refused.get(place))
                for place, change in enumerate(changes)]

    @staticmethod
    def _refusal(change: Change, err: Optional[_Refused]
                 ) -> Optional[exceptions.KernelRefused]:
        if err is None:
            return None
        verb, what = change
        kind, ifindex = (('route to', what.oif) if isinstance(what, HostRoute)
                         else ('neighbour', what.ifindex))
        return exceptions.KernelRefused(
            '%s the %s %s on %s' % (verb.value, kind, what.dst,
                                    name_of(ifindex)), err.reason, err.code)

    def lookup(self, address: IPAddress, source: Optional[IPAddress] = None,
               vrf: int = 0) -> Optional[wire.Route]:
        """Return the route that is used to an address; None if it has none.

        :param source: the node's address that it is reached from
        :param vrf: ifindex of the VRF that it is reached in; 0 for none
        """
        try:
            return self._looked_up(address, source, vrf)
        except exceptions.KernelRefused:
            return None  # unreachable, prohibited, a blackhole

    def _looked_up(self, address: IPAddress,
                   source: Optional[IPAddress] = None,
                   vrf: int = 0) -> wire.Route:
        # In strict mode the kernel refuses RTM_F_LOOKUP_TABLE for IPv6.
        self._set_option(_NETLINK_GET_STRICT_CHK, 0)
        try:
            route: wire.Route
            route, = self._ask('look up the route to %s' % address, Message(
                wire.RTM_GETROUTE, 0, wire.pack_lookup(
                    address, wire.RTM_F_FIB_MATCH | wire.RTM_F_LOOKUP_TABLE,
                    source, vrf)))
        finally:
            self._set_option(_NETLINK_GET_STRICT_CHK)
        return route

    def route_to(self, address: IPAddress) -> Optional[HostRoute]:
        """Return the route to an address alone, if that is what is used.

        One look-up. Only where that ends at a route that leads nowhere, which
        it does not name, those of its kind are dumped.
        """
        try:
            return self._looked_up(address).host_route
        except exceptions.KernelRefused as err:
            kind = _LEADS_NOWHERE.get(err.errno)
        if kind is None:
            return None
        found = [route.host_route for route in self._dump(
            'list the routes to %s' % address, Message(
                wire.RTM_GETROUTE, 0, wire.pack_route_dump(
                    wire.family_of(address), kind=kind)))
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
            answer, = self._ask('look up the way to %s' % address, Message(
                wire.RTM_GETROUTE, 0, wire.pack_lookup(address, vrf=vrf)))
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
            answer, = self._ask('look up the neighbour %s' % address, Message(
                wire.RTM_GETNEIGH, 0, wire.pack_neighbour(address, ifindex)))
        except exceptions.KernelRefused:
            return None, None
        return answer.mac or None, _NUD.get(answer.state, 'none')

    def routes(self, devices: Sequence[int] = ()) -> Routes:
        """Read all routes of the node, by a dump.

        :param devices: interfaces whose next hops are left out
        """
        host: list[HostRoute] = []
        next_hops = set(self._next_hop_objects())
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._dump('list the routes', Message(
                    wire.RTM_GETROUTE, 0, wire.pack_route_dump(family))):
                next_hops.update(route.next_hops)
                found = route.host_route
                if found is not None:
                    host.append(found)
        return Routes(tuple(host), *(
            frozenset(each.gateway for each in next_hops
                      if (each.oif in devices) is left_out)
            for left_out in (False, True)))

    def _next_hop_objects(self) -> list[wire.NextHop]:
        """List the next hops that routes may refer to, by a dump."""
        try:
            return [each for found in self._dump(
                'list the nexthop objects', Message(
                    wire.RTM_GETNEXTHOP, 0, wire.pack_next_hop_dump()))
                    for each in found]
        except exceptions.KernelRefused as err:
            if err.errno == errno.EOPNOTSUPP:  # before Linux 5.3
                return []
            raise

    def host_routes_of(self, ifindex: int, table: int) -> list[HostRoute]:
        """List the host routes of one interface in one table, by a dump."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                found += self._dump('list the routes', Message(
                    wire.RTM_GETROUTE, 0, wire.pack_route_dump(
                        family, table, ifindex)))
            except exceptions.KernelRefused as err:
                # The interface or the table is not there.
                if err.errno not in (errno.ENODEV, errno.ENOENT):
                    raise
        return [host for host in (route.host_route for route in found
                                  if route.oif == ifindex
                                  and route.table == table)
                if host is not None and host.direct]

    def next_hops(self, devices: Sequence[int] = (),
                  protocol: Optional[int] = None) -> frozenset[IPAddress]:
        """Read the gateways of all routes but of some interfaces.

        The number of routes of those interfaces is that of the pods. The
        kernel passes over them if it is asked for each of the others; where
        these are many, it is faster to pass over the messages here.

        :param devices: ifindexes of the interfaces that are left out
        :param protocol: what marks their routes, which have no gateway
        """
        others = [index for index, _ in socket.if_nameindex()
                  if index not in devices]
        asked: Sequence[Optional[int]] = (
            others if len(others) <= _ASKED_ONE_BY_ONE else [None])
        found = self._next_hop_objects()
        for oif in asked:
            for family in (socket.AF_INET, socket.AF_INET6):
                for route in self._routes_of(family, oif, protocol):
                    found += route.next_hops
        return frozenset(each.gateway for each in found
                         if each.oif not in devices)

    def _routes_of(self, family: int, oif: Optional[int],
                   protocol: Optional[int]) -> list[wire.Route]:
        try:
            return self._dump('list the next hops', Message(
                wire.RTM_GETROUTE, 0, wire.pack_route_dump(
                    family, oif=oif, kind=wire.RTN_UNICAST)),
                None if protocol is None else lambda data, start: (
                    wire.route_protocol(data, start) == protocol))
        except exceptions.KernelRefused as err:
            # The interface has gone meanwhile, or the node is without IPv6.
            if err.errno in (errno.ENODEV, errno.EOPNOTSUPP):
                return []
            raise

    def neighbours(self, ifindex: int) -> list[Neighbour]:
        """List the permanent neighbours of an interface, by a dump."""
        try:
            found = self._dump('list the neighbours', Message(
                wire.RTM_GETNEIGH, 0, wire.pack_neighbour_dump(ifindex)))
        except exceptions.KernelRefused as err:
            if err.errno == errno.ENODEV:
                return []
            raise
        return [Neighbour(each.dst, ifindex, each.mac, each.protocol)
                for each in found
                if each.ifindex == ifindex and each.dst is not None
                and each.state & wire.NUD_PERMANENT]

    def addresses(self, flags: int = 0) -> list[wire.InterfaceAddress]:
        """List the addresses of all interfaces, by a dump.

        :param flags: of which each must have one; 0 for all addresses
        """
        return self._dump('list the addresses', Message(
            wire.RTM_GETADDR, 0, wire.pack_address_dump()),
            None if not flags else lambda data, start: not (
                wire.address_flags(data, start) & flags))

    def namespace_number(self, fd: int) -> int:
        """Return what this namespace calls another; -1 for nothing."""
        answer: int
        answer, = self._ask('number a namespace', Message(
            wire.RTM_GETNSID, 0, bytes(4) + wire.number(wire.NETNSA_FD, fd)))
        return answer

    def number_namespace(self, fd: int) -> None:
        """Have this namespace call another by a number.

        :raises KernelRefused: if it cannot be; not if it has one
        """
        try:
            self._order('number a namespace', Message(
                wire.RTM_NEWNSID, 0, bytes(4)
                + wire.number(wire.NETNSA_FD, fd)
                + wire.attribute(wire.NETNSA_NSID, _ANY_NUMBER)))
        except exceptions.KernelRefused as err:
            if err.errno != errno.EEXIST:
                raise

    def _order(self, action: str, message: Message, advice: str = '') -> None:
        """Have the kernel do something.

        :raises KernelRefused: if it does not
        """
        try:
            refused = self._send([message]).get(0)
        except OSError as err:
            raise _refused(action, err, advice) from err
        if refused is not None:
            raise exceptions.KernelRefused(action, refused.reason,
                                           refused.code, advice)

    def _ask(self, action: str, message: Message) -> list[Any]:
        """Ask the kernel a question.

        :raises KernelRefused: if it does not
        """
        try:
            self._sequence += 1
            # An answer ends with the acknowledgement.
            self._socket.send(message._replace(
                flags=message.flags | wire.NLM_F_ACK).packed(self._sequence))
            return list(self._answers())
        except OSError as err:
            raise _refused(action, err) from err
        except _Refused as err:
            raise exceptions.KernelRefused(action, err.reason,
                                           err.code) from err

    def _dump(self, action: str, message: Message,
              skip: Optional[Callable[[bytes, int], bool]] = None
              ) -> list[Any]:
        """List what the kernel has of a kind; again if that is disturbed.

        :param skip: whether not to parse the message that begins there
        :raises KernelRefused: if it cannot be had, or each try was disturbed
        """
        request = message._replace(flags=message.flags | wire.NLM_F_DUMP)
        for _ in range(_FEW_TRIES if self._most else _DUMP_TRIES):
            try:
                self._sequence += 1
                self._socket.send(request.packed(self._sequence))
                answers = self._answers(skip)
                if not self._most:
                    return list(answers)
                found = list(itertools.islice(answers, self._most))
                if len(found) == self._most:
                    self._socket.close()  # with the rest
                    self._open()
                return found
            except _Interrupted:
                time.sleep(random.uniform(0, _DUMP_PAUSE))
            except OSError as err:
                raise _refused(action, err) from err
            except _Refused as err:
                raise exceptions.KernelRefused(action, err.reason,
                                               err.code) from err
        raise exceptions.KernelRefused(
            action, 'it changed each time that it was read', errno.EINTR)

    def _answers(self, skip: Optional[Callable[[bytes, int], bool]] = None
                 ) -> Iterator[Any]:
        interrupted = False
        while True:
            data = self._socket.recv(_RECEIVED)
            for header in wire.headers(data):
                if header.sequence != self._sequence:
                    continue  # what is left of an earlier request
                interrupted |= bool(header.flags & wire.NLM_F_DUMP_INTR)
                if header.kind in (wire.NLMSG_ERROR, wire.NLMSG_DONE):
                    code, text = wire.error(data, header)
                    if code:
                        raise _Refused(code, text)
                    if interrupted:
                        raise _Interrupted
                    return
                if skip is None or not skip(data, header.start):
                    found = wire.parse(data, header)
                    if found is not None:
                        yield found

    def _send(self, messages: Sequence[Message]) -> dict[int, _Refused]:
        """Send all at once; the errors, by the place of the message.

        The kernel answers each that it refuses, and the last. Answers to the
        others would take as long as the requests.
        """
        first = self._sequence + 1
        self._sequence += len(messages)
        last = messages[-1]
        packed = [*messages[:-1],
                  last._replace(flags=last.flags | wire.NLM_F_ACK)]
        self._socket.send(b''.join(
            message.packed(number)
            for number, message in enumerate(packed, first)))
        refused: dict[int, _Refused] = {}
        place = -1
        while place != len(messages) - 1:
            data = self._socket.recv(_RECEIVED)
            for header in wire.headers(data):
                if header.kind != wire.NLMSG_ERROR or header.sequence < first:
                    continue
                place = header.sequence - first
                code, text = wire.error(data, header)
                if code:
                    refused[place] = _Refused(code, text)
        return refused


def _refused(action: str, err: OSError,
             advice: str = '') -> exceptions.KernelRefused:
    return exceptions.KernelRefused(action, err.strerror or str(err),
                                    err.errno or 0, advice)
