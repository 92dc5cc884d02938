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

"""An rtnetlink socket: interfaces, addresses, routes, neighbours."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import pyroute2
from pyroute2 import netlink
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl import ifaddrmsg
from pyroute2.netlink.rtnl import ifinfmsg
from pyroute2.netlink.rtnl import ndmsg
from pyroute2.netlink.rtnl import rtmsg

from kuryr_break0.config import IPAddress
from kuryr_break0 import exceptions
from kuryr_break0.netlink.errors import translated
from kuryr_break0.netlink.errors import undisturbed
from kuryr_break0.netlink.link import Link
from kuryr_break0.netlink.link import parse
from kuryr_break0.netlink import messages
from kuryr_break0.netlink.netns import opened
from kuryr_break0.netlink.node import as_address
from kuryr_break0.netlink.node import family_of
from kuryr_break0.netlink.node import index_of
from kuryr_break0.netlink.node import name_of
from kuryr_break0.netlink import requests
from kuryr_break0.netlink.requests import Change
from kuryr_break0.netlink.requests import RT_SCOPE_LINK
from kuryr_break0.netlink.requests import RTN_UNICAST
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Neighbour

# linux/rtnetlink.h
RTN_LOCAL = 2
#: Learnt by use, as IPv6's path MTUs are: not a route of the table.
RTM_F_CLONED = 0x200
#: Answer with the table that was used; without, it is said to be main.
RTM_F_LOOKUP_TABLE = 0x1000
#: Answer with the route in the table, not with what follows from it.
RTM_F_FIB_MATCH = 0x2000

#: Changes in one request, which has to fit into the socket's buffer, as do
#: the answers if all are refused.
_CHANGED_AT_ONCE = 128


class Routes(NamedTuple):
    """The routes of the node.

    :ivar host: those to single addresses
    :ivar next_hops: the gateways of all, unless some were left out
    """

    host: tuple[HostRoute, ...]
    next_hops: frozenset[IPAddress]


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


#: States of a neighbour, by their bits (linux/neighbour.h).
_NUD = {0x01: 'incomplete', 0x02: 'reachable', 0x04: 'stale', 0x08: 'delay',
        0x10: 'probe', 0x20: 'failed', 0x40: 'noarp', 0x80: 'permanent'}


class Kernel:
    """One rtnetlink socket in the namespace of the calling thread.

    To be used as a context manager. Its methods raise KernelRefused.
    """

    def __init__(self) -> None:
        self._ipr = pyroute2.IPRoute()
        #: Of the next message to send; pyroute2's own stay below.
        self._number = 2 ** 24

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ipr.close()

    def link(self, name: str) -> Optional[Link]:
        """Return an interface by its name, or None."""
        try:
            with translated('read the interface ' + name):
                answer = self._ipr.link('get', ifname=name)
        except exceptions.KernelRefused as err:
            if err.errno == errno.ENODEV:
                return None
            raise
        return parse(answer[0])

    def links(self) -> list[Link]:
        """List all interfaces, by a dump."""
        return [parse(message) for message in undisturbed(
            'list the interfaces', lambda: list(self._ipr.get_links()))]

    def create_macvlan(self, name: str, parent: Link, netns: str, *,
                       mac: str, mtu: int) -> None:
        """Create a macvlan in bridge mode, up, in another namespace.

        It is never in that of the parent, so its name is free to be that of
        an interface there, and nobody there hears of it.

        :param netns: the path of the namespace
        """
        with opened(netns) as other, translated(
                'create the macvlan %s of the pod on %s' % (name,
                                                            parent.name)):
            self._ipr.link('add', ifname=name, kind='macvlan',
                           macvlan_mode='bridge', link=parent.index,
                           net_ns_fd=other, address=mac, mtu=mtu,
                           state='up')

    def change_link(self, link: Link, **changes: Any) -> None:
        """Change attributes of an interface, such as mtu or address."""
        what = ', '.join('%s %s' % change for change in changes.items())
        with translated('set %s of %s' % (what, link.name)):
            self._ipr.link('set', index=link.index, **changes)

    def raise_link(self, link: Link) -> None:
        """Set an interface up, with multicast off."""
        with translated('set up the interface ' + link.name,
                        'Where another macvlan has its MAC address, as one '
                        'that was renamed, delete that or rename it back: '
                        'ip link show type macvlan'):
            self._ipr.link('set', index=link.index, flags=ifinfmsg.IFF_UP,
                           change=ifinfmsg.IFF_UP | ifinfmsg.IFF_MULTICAST)

    def delete_link(self, name: str) -> None:
        """Delete an interface; one that is not there is fine."""
        index = index_of(name)
        try:
            if index is not None:
                with translated('delete the interface ' + name):
                    self._ipr.link('del', index=index)
        except exceptions.KernelRefused as err:
            if err.errno != errno.ENODEV:
                raise

    def put_address(self, link: Link, address: IPAddress) -> None:
        """Put an address on an interface, alone in its prefix.

        Without duplicate address detection: that would speak on the wire.
        """
        with translated('put the address %s on %s' % (address, link.name)):
            self._ipr.addr('replace', index=link.index, address=str(address),
                           prefixlen=address.max_prefixlen,
                           family=family_of(address),
                           flags=0x02 if address.version == 6 else 0)

    def change(self, changes: Sequence[Change]
               ) -> list[Optional[exceptions.KernelRefused]]:
        """Set and delete routes and neighbours, in order, in one request.

        The kernel goes through all of it before it returns, also when the
        process is killed meanwhile; through a part, if they are hundreds.

        :returns: the error of each that was refused, in place of None.
            EEXIST is that of a route to add which is there, ENETDOWN or
            ENODEV that of an interface which is down or gone
        """
        errors: list[Optional[exceptions.KernelRefused]] = []
        for start in range(0, len(changes), _CHANGED_AT_ONCE):
            some = changes[start:start + _CHANGED_AT_ONCE]
            with translated('change routes and neighbours'):
                refused = self._send([requests.change(verb, what)
                                      for verb, what in some])
            errors += [self._refusal(change, refused.get(place))
                       for place, change in enumerate(some)]
        return errors

    def _send(self, changes: Sequence[Any]
              ) -> dict[int, nl_exceptions.NetlinkError]:
        """Send all at once; the errors, by the place of the request.

        The kernel tells of each that it refuses, and that it has come to the
        last; to hear of the others would take as long as to ask.
        """
        changes[-1]['header']['flags'] |= netlink.NLM_F_ACK
        first = self._number
        self._number += len(changes)
        data = bytearray()
        for number, request in enumerate(changes, first):
            request['header']['sequence_number'] = number
            request.encode()
            data += request.data
            requests.dispose(request)
        self._ipr.sendto(data, (0, 0))
        refused = {}
        place = -1
        while place != len(changes) - 1:
            for answer in self._ipr.marshal.parse(self._ipr.recv(2 ** 16)):
                place = answer['header']['sequence_number'] - first
                if place >= 0 and answer['header']['error']:
                    refused[place] = answer['header']['error']
        return refused

    @staticmethod
    def _refusal(change: Change, err: Optional[nl_exceptions.NetlinkError]
                 ) -> Optional[exceptions.KernelRefused]:
        if err is None:
            return None
        verb, what = change
        kind, ifindex = (('route to', what.oif) if isinstance(what, HostRoute)
                         else ('neighbour', what.ifindex))
        return exceptions.KernelRefused(
            '%s the %s %s on %s' % (verb.value, kind, what.dst,
                                    name_of(ifindex)),
            os.strerror(err.code), err.code)

    def route_to(self, address: IPAddress) -> Optional[HostRoute]:
        """Return the route to an address alone, if that is what is used.

        The one by which it would be reached, as the routing rules say.
        """
        route = self.lookup(address)
        if route is None or route.dst_len != address.max_prefixlen:
            return None
        return _host_route(route)

    def lookup(self, address: IPAddress, source: Optional[IPAddress] = None
               ) -> Optional[messages.Route]:
        """Return the route that is used to an address; None if it has none.

        :param source: the node's address that is spoken from
        """
        message = rtmsg.rtmsg()
        message['family'] = family_of(address)
        message['dst_len'] = address.max_prefixlen
        message['flags'] = RTM_F_FIB_MATCH | RTM_F_LOOKUP_TABLE
        message['attrs'] = [('RTA_DST', str(address))]
        if source is not None:
            message['src_len'] = source.max_prefixlen
            message['attrs'].append(('RTA_SRC', str(source)))
        try:
            with translated('look up the route to %s' % address):
                route: messages.Route
                route, = self._items(rtnl.RTM_GETROUTE, message)
        except exceptions.KernelRefused:
            return None  # unreachable, prohibited, a blackhole
        return route

    def path_to(self, address: IPAddress) -> Optional[Path]:
        """Return the way to an address; None if there is none."""
        message = rtmsg.rtmsg()
        message['family'] = family_of(address)
        message['dst_len'] = address.max_prefixlen
        message['attrs'] = [('RTA_DST', str(address))]
        try:
            with translated('look up the way to %s' % address):
                answer, = self._ipr.nlm_request(message, rtnl.RTM_GETROUTE,
                                                netlink.NLM_F_REQUEST)
            ifindex = answer.get_attr('RTA_OIF')
            device = socket.if_indextoname(ifindex)
        except (exceptions.KernelRefused, OSError):
            return None
        via = answer.get_attr('RTA_VIA')
        gateway = answer.get_attr('RTA_GATEWAY') or via and via['addr']
        return Path(device, ifindex, as_address(gateway),
                    as_address(answer.get_attr('RTA_PREFSRC')))

    def neighbour(self, ifindex: int, address: IPAddress
                  ) -> tuple[Optional[str], Optional[str]]:
        """Return MAC address and state of a neighbour, as far as known."""
        try:
            with translated('look up the neighbour %s' % address):
                answer, = self._ipr.nlm_request(
                    requests.neighbour(ifindex, address), rtnl.RTM_GETNEIGH,
                    netlink.NLM_F_REQUEST)
        except exceptions.KernelRefused:
            return None, None
        return (answer.get_attr('NDA_LLADDR'),
                _NUD.get(answer['state'], 'none'))

    def routes(self, device: int = 0) -> Routes:
        """Read all routes of the node, by a dump.

        :param device: ifindex of an interface whose next hops are left out
        """
        host: list[HostRoute] = []
        next_hops: set[IPAddress] = set()

        def read() -> None:
            host.clear()
            for route in self._routes():
                if route.oif != device:
                    next_hops.update(route.gateways)
                if (route.dst_len in (32, 128)
                        and route.type != RTN_LOCAL
                        and not route.flags & RTM_F_CLONED):
                    host.append(_host_route(route))

        undisturbed('list the routes', read)
        return Routes(tuple(host), frozenset(next_hops))

    def next_hops(self, device: int = 0) -> frozenset[IPAddress]:
        """Read those of all routes but of one interface's.

        The kernel passes over its routes, however many.

        :param device: ifindex of it
        """
        next_hops: set[IPAddress] = set()

        def read() -> None:
            for index, _ in socket.if_nameindex():
                if index != device:
                    for route in self._routes(index):
                        if route.oif != device:
                            next_hops.update(route.gateways)

        with self._filtering():
            undisturbed('list the next hops', read)
        return frozenset(next_hops)

    @contextlib.contextmanager
    def _filtering(self) -> Iterator[None]:
        """Let the kernel heed what a dump is asked for.

        It is more particular about all else that it is asked then. One
        before linux 4.20 answers with all there is.
        """
        option = netlink.SOL_NETLINK, netlink.NETLINK_GET_STRICT_CHK
        with contextlib.suppress(OSError):
            self._ipr.setsockopt(*option, 1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._ipr.setsockopt(*option, 0)

    def _routes(self, oif: Optional[int] = None) -> Iterator[messages.Route]:
        """Dump the routes, or those of an interface."""
        for family in (socket.AF_INET, socket.AF_INET6):
            message = rtmsg.rtmsg()
            message['family'] = family
            if oif is not None:
                message['attrs'] = [('RTA_OIF', oif)]
            try:
                yield from self._items(rtnl.RTM_GETROUTE, message,
                                       netlink.NLM_F_DUMP)
            except nl_exceptions.NetlinkError as err:
                if oif is None or err.code != errno.ENODEV:
                    raise  # or the interface has gone meanwhile

    def neighbours(self, ifindex: int) -> list[Neighbour]:
        """List those that are set for good on an interface, by a dump."""
        message = requests.NeighbourMessage()
        message['attrs'] = [('NDA_IFINDEX', ifindex)]
        return undisturbed('list the neighbours', lambda: [
            Neighbour(each.dst, ifindex, each.mac, each.protocol)
            for each in self._items(rtnl.RTM_GETNEIGH, message,
                                    netlink.NLM_F_DUMP)
            if each.ifindex == ifindex and each.dst is not None
            and each.state & ndmsg.NUD_PERMANENT])

    def _items(self, kind: int, message: Any, flags: int = 0
               ) -> Iterator[Any]:
        """Ask for what :mod:`messages` can read, and read the answers."""
        marshal = self._ipr.marshal

        def parse(data: bytes, offset: int, length: int) -> Any:
            # What is no item says that they end, or an error.
            return messages.parse(data, offset) or marshal.parse_one_message(
                *struct.unpack_from('=HHI', data, offset + 4), data, offset,
                length)

        for answer in self._ipr.nlm_request(
                message, kind, netlink.NLM_F_REQUEST | flags, parser=parse):
            if 'item' in answer:
                yield answer['item']

    def addresses(self) -> list[tuple[int, IPAddress]]:
        """List the ifindexes and addresses of all interfaces, by a dump."""
        return undisturbed('list the addresses', lambda: [
            (each.ifindex, each.address) for each in self._items(
                rtnl.RTM_GETADDR, ifaddrmsg.ifaddrmsg(),
                netlink.NLM_F_DUMP)])

    def is_on_link(self, address: IPAddress) -> bool:
        """Whether an address would be reached without a gateway."""
        route = self.lookup(address)
        return (route is not None and route.type == RTN_UNICAST
                and not route.gateways and not route.several)


def _host_route(route: messages.Route) -> HostRoute:
    assert route.dst is not None  # it is no default route
    return HostRoute(
        route.dst, route.oif, route.protocol, route.table, route.src,
        direct=(route.type == RTN_UNICAST
                and not route.gateways and not route.several
                and (route.dst.version == 6
                     or route.scope == RT_SCOPE_LINK)))
