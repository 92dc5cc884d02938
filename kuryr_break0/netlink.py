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

"""All that is asked of the kernel about networks; alone imports pyroute2.

Requests that belong to a pod go through one :class:`Kernel`, an rtnetlink
socket, and cost the same however many pods the node has: nothing is dumped.
Dumps are left to what looks at the whole node, and say so. What a plain
socket or /proc/sys answers is asked there, since that takes a tenth of the
time that a netlink message takes in Python.

No NetlinkError leaves this module, since Kuryr takes any that carries EEXIST
for a VLAN conflict, and answers any other with a page of HTML.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import errno
import ipaddress
import logging
import os
import random
import socket
import struct
import time
import types
from typing import Any, Callable, Iterator, NamedTuple, Optional
from typing import Sequence, TypeVar

import pyroute2
from pyroute2.ipdb import exceptions as ipdb_exceptions
from pyroute2.ipdb import interfaces as ipdb_interfaces
from pyroute2 import netlink
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.netlink.nfnetlink import nfctsocket
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl import ifinfmsg
from pyroute2.netlink.rtnl import ndmsg
from pyroute2.netlink.rtnl import rtmsg
from pyroute2 import netns as pyroute2_netns

from kuryr_break0.config import IPAddress
from kuryr_break0 import exceptions
from kuryr_break0 import messages
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour

LOG = logging.getLogger(__name__)

# linux/rtnetlink.h
RT_SCOPE_LINK = 253
#: A wildcard in a deletion; with the default, universe, a route that is
#: scoped to the link would not be found.
RT_SCOPE_NOWHERE = 255
#: What stands in the header for a table whose number is too large for it.
RT_TABLE_COMPAT = 252
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTN_LOCAL = 2
#: In /proc/net/ipv6_route (linux/ipv6_route.h)
RTF_LOCAL = 0x80000000
#: Learnt by use, as IPv6's path MTUs are: not a route of the table.
RTM_F_CLONED = 0x200
#: Answer with the table that was used; without, it is said to be main.
RTM_F_LOOKUP_TABLE = 0x1000
#: Answer with the route in the table, not with what follows from it.
RTM_F_FIB_MATCH = 0x2000

_INTERFACE_GROUPS = (rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR
                     | rtnl.RTMGRP_IPV6_IFADDR)

#: An interrupted dump is repeated this often. Each try meets about as many
#: changes as the last, so what counts is their number, not their distance.
_DUMP_TRIES = 20
_DUMP_PAUSE = 0.05  # seconds, at most

#: Changes in one request, which has to fit into the socket's buffer, as do
#: the answers if all are refused.
_CHANGED_AT_ONCE = 128

_T = TypeVar('_T')

#: libc, as this process has it already. Left alone, pyroute2 looks for it by
#: running ldconfig, or a compiler with files in /tmp.
_LIBC = ctypes.CDLL(None, use_errno=True)


class Verb(enum.Enum):
    """What to do with a route or a neighbour.

    ADD fails where there is one, REPLACE puts it in its place; DELETE is of
    the route with this interface, protocol and table, or of the neighbour,
    whatever its MAC address.
    """

    ADD = 'add'
    REPLACE = 'set'
    DELETE = 'delete'


Change = tuple[Verb, Item]

_FLAGS = {Verb.ADD: netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
          Verb.REPLACE: netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
          Verb.DELETE: 0}


@dataclasses.dataclass(frozen=True)
class Link:
    """A network interface as the kernel reports it.

    :ivar kind: None for a physical one
    :ivar mode: of a macvlan
    :ivar lower: ifindex of the interface that it is stacked on
    :ivar lower_elsewhere: whether that one is in another namespace, where
        its ifindex counts
    """

    name: str
    index: int
    kind: Optional[str]
    mode: Optional[str]
    lower: Optional[int]
    lower_elsewhere: bool
    mtu: int
    mac: str
    multicast: bool
    up: bool
    loopback: bool

    @property
    def lower_of_macvlans(self) -> tuple[Optional[int], bool]:
        """What a macvlan on it has as ``lower`` and ``lower_elsewhere``.

        The kernel puts a macvlan of a macvlan beside that, on the lower
        interface of both (macvlan_common_newlink).
        """
        if self.kind == 'macvlan':
            return self.lower, self.lower_elsewhere
        return self.index, False


@contextlib.contextmanager
def _translated(action: str, advice: str = '') -> Iterator[None]:
    try:
        yield
    except nl_exceptions.NetlinkError as err:
        reason = os.strerror(err.code) if err.code > 0 else str(err)
        raise exceptions.KernelRefused(action, reason, err.code,
                                       advice) from err
    except OSError as err:  # of the socket
        raise exceptions.KernelRefused(action, err.strerror or str(err),
                                       err.errno or 0, advice) from err
    except (ipdb_exceptions.CommitException,
            ipdb_exceptions.CreateException) as err:
        raise exceptions.KernelRefused(action, str(err), 0, advice) from err


def undisturbed(action: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call what reads the node by dumps, and again if one is interrupted.

    The kernel marks a dump that the table has changed under; pyroute2 raises
    that as an error. ``function`` must be safe to repeat.

    :param action: what it does, for the error
    :raises KernelRefused: for a netlink error of another kind, or if every
        try was interrupted
    """
    with _translated(action):
        for _ in range(_DUMP_TRIES - 1):
            try:
                return function(*args)
            except nl_exceptions.NetlinkDumpInterrupted:
                time.sleep(random.uniform(0, _DUMP_PAUSE))
        return function(*args)


def index_of(device: str) -> Optional[int]:
    """The ifindex of an interface, or None if there is none."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return None


def source_for(address: IPAddress,
               device: Optional[str] = None) -> Optional[IPAddress]:
    """The address that the node would speak to another from.

    It is the address itself where that is one of the node's own. A datagram
    socket is connected for it, which sends nothing.

    :param device: the interface that it would have to leave by
    :returns: None where there is no way, or no address but link-local ones
    :raises PermissionError: where the routes say that it is no host's: for
        the broadcast address of a subnet, or a prohibited one
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            if device is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE,
                                 device.encode())
            probe.connect((str(address), 9))
            source = ipaddress.ip_address(probe.getsockname()[0])
        except PermissionError:
            raise
        except OSError:
            return None
    return None if source.is_link_local else source


def count_host_routes(device: str) -> int:
    """Count the routes to single addresses on an interface, in table main.

    In the texts of /proc, which take about a microsecond a route.
    """
    count = 0
    # Iface Destination Gateway Flags RefCnt Use Metric Mask ...
    for fields in _proc_net('route'):
        count += fields[0] == device and fields[7] == 'FFFFFFFF'
    # destination length source length gateway metric ref use flags Iface
    for fields in _proc_net('ipv6_route'):
        count += (fields[-1] == device and fields[1] == '80'
                  and not int(fields[8], 16) & RTF_LOCAL)
    return count


def _proc_net(name: str) -> Iterator[list[str]]:
    with contextlib.suppress(OSError), \
            open('/proc/thread-self/net/' + name) as file:
        yield from map(str.split, file)


def read_sysctl(path: str) -> Optional[int]:
    """Read a sysctl of the network namespace that this thread is in.

    :param path: below /proc/sys/net, with slashes
    :returns: None where there is none, as all of IPv6's where that is off
    """
    try:
        with open('/proc/sys/net/' + path) as sysctl:
            return int(sysctl.read())
    except OSError:
        return None


def write_sysctl(path: str, value: int,
                 directory: str = '/proc/sys') -> None:
    """Set a sysctl of the network namespace that this thread is in.

    :param path: below /proc/sys/net, with slashes
    :param directory: where /proc/sys is writable
    :raises KernelRefused: for one that can't be written
    """
    full = '%s/net/%s' % (directory, path)
    try:
        with open(full, 'w') as sysctl:
            sysctl.write(str(value))
    except OSError as err:
        raise exceptions.KernelRefused(
            'set %s to %d' % (full, value), err.strerror or str(err),
            err.errno or 0, 'In a container, /proc/sys must be writable: '
            'run it privileged, or see [break0] sysctl_dir.') from err


def forget_connections(address: IPAddress) -> None:
    """Delete what the node tracks of the connections of an address.

    The kernel looks for them (since linux 6.8), once for each way in which
    an address takes part: it began them, it was spoken to, it answers for
    the address of a Service.

    :raises KernelRefused: if it cannot, as an older one
    """
    if not read_sysctl('netfilter/nf_conntrack_count'):
        return  # nothing is tracked
    with _translated('forget the connections of %s' % address), \
            pyroute2.NFCTSocket(nfgen_family=_family(address)) as tracker:
        for which, end in (('ORIG', 'saddr'), ('ORIG', 'daddr'),
                           ('REPLY', 'saddr')):
            wanted = nfctsocket.NFCTAttrTuple(
                family=_family(address), **{end: str(address)})
            message = nfctsocket.nfct_msg()
            message['attrs'] = [
                ('CTA_TUPLE_' + which, {'attrs': wanted.attrs()}),
                ('CTA_FILTER', {'attrs': [
                    ('CTA_FILTER_%s_FLAGS' % which, wanted.flags)]})]
            tracker.request(
                message, nfctsocket.IPCTNL_MSG_CT_DELETE,
                msg_flags=netlink.NLM_F_REQUEST | netlink.NLM_F_ACK,
                terminate=nfctsocket.terminate_error_msg)


@contextlib.contextmanager
def entered(netns: str) -> Iterator[None]:
    """Be in another network namespace; this thread, within the block.

    :param netns: its path
    :raises NetnsUnusable: if it cannot be entered
    """
    with _opened('/proc/thread-self/ns/net') as own:
        with _opened(netns) as other:
            try:
                pyroute2_netns.setns(other, libc=_LIBC)
            except OSError as err:
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s'
                    % os.strerror(err.errno or 0)) from err
        try:
            yield
        finally:
            pyroute2_netns.setns(own, libc=_LIBC)


@contextlib.contextmanager
def _opened(netns: str) -> Iterator[int]:
    try:
        opened = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise exceptions.NetnsUnusable(
            netns=netns, reason='cannot be entered: %s'
            % os.strerror(err.errno or 0)) from err
    try:
        yield opened
    finally:
        os.close(opened)


def macvlans_in(netns: str) -> list[Link]:
    """List the macvlans of another namespace on interfaces of this one.

    So their ``lower`` counts here.

    :param netns: its path
    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: if its interfaces cannot be listed
    """
    action = 'list the interfaces of ' + netns
    own = os.open('/proc/thread-self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
    try:
        with entered(netns), pyroute2.IPRoute() as ipr:
            found = undisturbed(action, lambda: list(ipr.get_links()))
            # Whoever lists interfaces gives a number to each namespace that
            # one of them is on; the number of one that none is on is -1.
            with _translated(action):
                here = ipr.get_netnsid(fd=own)['nsid']
    finally:
        os.close(own)
    return [link for link, at in
            ((_link(message), message.get_attr('IFLA_LINK_NETNSID'))
             for message in found)
            if link.kind == 'macvlan' and at == here]


def create_macvlan(name: str, parent: Link, mac: str) -> None:
    """Create a macvlan in bridge mode, down, by IPDB.

    That reads all interfaces of the node, as Kuryr does for each pod; here
    it happens once per boot.

    :raises KernelRefused: if there is none in the end
    """
    def create() -> None:
        with _unwarned(), pyroute2.IPDB(
                plugins=('interfaces',), deprecation_warning=False) as ipdb:
            ipdb.create(ifname=name, kind='macvlan',
                        link=parent.lower_of_macvlans[0],
                        macvlan_mode='bridge', address=mac).commit()

    undisturbed('create the macvlan %s on %s' % (name, parent.name), create)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without IPDB's line in the log that it is deprecated."""
    log = logging.getLogger(pyroute2.IPDB.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def prepare() -> None:
    """Do, before processes fork, what pyroute2 does at the first use.

    In each of them: it looks for the C library, by another process, where it
    enters a namespace for Kuryr, and compiles its messages.
    """
    with contextlib.suppress(exceptions.Break0Error, OSError):
        with Kernel() as kernel:
            kernel.link('lo')
        with _opened('/proc/thread-self/ns/net') as own:
            pyroute2_netns.setns(own)


class _Unread(dict):  # type: ignore[type-arg]
    """What an IPDB does not read; it writes here of its own accord."""

    def __init__(self, ipdb: Any) -> None:
        super().__init__()


class _InterfacesIPDB(pyroute2.IPDB):  # type: ignore[misc]
    """An IPDB that reads and hears of interfaces and addresses only."""

    # It has no attributes before this is called.
    def __init__(self) -> None:
        super().__init__(nl_bind_groups=_INTERFACE_GROUPS,
                         deprecation_warning=False)

    def initdb(self) -> None:
        # Its plugin for interfaces reads the neighbours as well.
        spec = [{**each, 'class': _Unread} if each['name'] == 'neighbours'
                else each for each in ipdb_interfaces.spec]
        self._plugins = [types.SimpleNamespace(groups=_INTERFACE_GROUPS,
                                               spec=spec)]
        super().initdb()


def ipdb_of_interfaces() -> Optional[Any]:
    """Open an IPDB, on the node, that has read what Kuryr needs of it.

    All interfaces and addresses, but no neighbours, routes and rules.

    :returns: None if that cannot be done with this pyroute2
    :raises NetlinkError: as any IPDB; for :func:`undisturbed`
    """
    try:
        with _unwarned():
            ipdb = _InterfacesIPDB()
        try:
            ipdb.interfaces  # read when first asked for
        except BaseException:
            ipdb.release()
            raise
        return ipdb
    except nl_exceptions.NetlinkError:
        raise
    except Exception as err:
        LOG.debug('Kuryr reads all of the node, since IPDB is not as it was: '
                  '%r', err)
        return None


class Routes(NamedTuple):
    """The routes of the node.

    :ivar host: those to single addresses
    :ivar next_hops: the gateways of all
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
            with _translated('read the interface ' + name):
                answer = self._ipr.link('get', ifname=name)
        except exceptions.KernelRefused as err:
            if err.errno == errno.ENODEV:
                return None
            raise
        return _link(answer[0])

    def links(self) -> list[Link]:
        """List all interfaces, by a dump."""
        return [_link(message) for message in undisturbed(
            'list the interfaces', lambda: list(self._ipr.get_links()))]

    def create_macvlan(self, name: str, parent: Link, netns: str, *,
                       mac: str, mtu: int) -> None:
        """Create a macvlan in bridge mode, up, in another namespace.

        It is never in that of the parent, so its name is free to be that of
        an interface there, and nobody there hears of it.

        :param netns: the path of the namespace
        """
        with _opened(netns) as other, _translated(
                'create the macvlan %s of the pod on %s' % (name,
                                                            parent.name)):
            self._ipr.link('add', ifname=name, kind='macvlan',
                           macvlan_mode='bridge', link=parent.index,
                           net_ns_fd=other, address=mac, mtu=mtu,
                           state='up')

    def change_link(self, link: Link, **changes: Any) -> None:
        """Change attributes of an interface, such as mtu or address."""
        what = ', '.join('%s %s' % change for change in changes.items())
        with _translated('set %s of %s' % (what, link.name)):
            self._ipr.link('set', index=link.index, **changes)

    def raise_link(self, link: Link) -> None:
        """Set an interface up, with multicast off."""
        with _translated('set up the interface ' + link.name):
            self._ipr.link('set', index=link.index, flags=ifinfmsg.IFF_UP,
                           change=ifinfmsg.IFF_UP | ifinfmsg.IFF_MULTICAST)

    def delete_link(self, name: str) -> None:
        """Delete an interface; one that is not there is fine."""
        index = index_of(name)
        try:
            if index is not None:
                with _translated('delete the interface ' + name):
                    self._ipr.link('del', index=index)
        except exceptions.KernelRefused as err:
            if err.errno != errno.ENODEV:
                raise

    def put_address(self, link: Link, address: IPAddress) -> None:
        """Put an address on an interface, alone in its prefix.

        Without duplicate address detection: that would speak on the wire.
        """
        with _translated('put the address %s on %s' % (address, link.name)):
            self._ipr.addr('replace', index=link.index, address=str(address),
                           prefixlen=address.max_prefixlen,
                           family=_family(address),
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
            with _translated('change routes and neighbours'):
                refused = self._send([_message(verb, what)
                                      for verb, what in some])
            errors += [self._refusal(change, refused.get(place))
                       for place, change in enumerate(some)]
        return errors

    def _send(self, requests: Sequence[Any]
              ) -> dict[int, nl_exceptions.NetlinkError]:
        """Send all at once; the errors, by the place of the request.

        The kernel tells of each that it refuses, and that it has come to the
        last; to hear of the others would take as long as to ask.
        """
        requests[-1]['header']['flags'] |= netlink.NLM_F_ACK
        first = self._number
        self._number += len(requests)
        data = bytearray()
        for number, request in enumerate(requests, first):
            request['header']['sequence_number'] = number
            request.encode()
            data += request.data
        self._ipr.sendto(data, (0, 0))
        refused = {}
        place = -1
        while place != len(requests) - 1:
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
        through = 'interface %s' % (
            what.oif if isinstance(what, HostRoute) else what.ifindex)
        return exceptions.KernelRefused(
            '%s the %s %s on %s' % (
                verb.value, 'route to' if isinstance(what, HostRoute)
                else 'neighbour', what.dst, through),
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
        message['family'] = _family(address)
        message['dst_len'] = address.max_prefixlen
        message['flags'] = RTM_F_FIB_MATCH | RTM_F_LOOKUP_TABLE
        message['attrs'] = [('RTA_DST', str(address))]
        if source is not None:
            message['src_len'] = source.max_prefixlen
            message['attrs'].append(('RTA_SRC', str(source)))
        try:
            with _translated('look up the route to %s' % address):
                route: messages.Route
                route, = self._items(rtnl.RTM_GETROUTE, message)
        except exceptions.KernelRefused:
            return None  # unreachable, prohibited, a blackhole
        return route

    def path_to(self, address: IPAddress) -> Optional[Path]:
        """Return the way to an address; None if there is none."""
        message = rtmsg.rtmsg()
        message['family'] = _family(address)
        message['dst_len'] = address.max_prefixlen
        message['attrs'] = [('RTA_DST', str(address))]
        try:
            with _translated('look up the way to %s' % address):
                answer, = self._ipr.nlm_request(message, rtnl.RTM_GETROUTE,
                                                netlink.NLM_F_REQUEST)
            ifindex = answer.get_attr('RTA_OIF')
            device = socket.if_indextoname(ifindex)
        except (exceptions.KernelRefused, OSError):
            return None
        via = answer.get_attr('RTA_VIA')
        return Path(device, ifindex,
                    _ip(answer.get_attr('RTA_GATEWAY')
                        or via and via['addr']),
                    _ip(answer.get_attr('RTA_PREFSRC')))

    def neighbour(self, ifindex: int, address: IPAddress
                  ) -> tuple[Optional[str], Optional[str]]:
        """Return MAC address and state of a neighbour, as far as known."""
        try:
            with _translated('look up the neighbour %s' % address):
                answer, = self._ipr.nlm_request(
                    _neighbour_message(ifindex, address), rtnl.RTM_GETNEIGH,
                    netlink.NLM_F_REQUEST)
        except exceptions.KernelRefused:
            return None, None
        return (answer.get_attr('NDA_LLADDR'),
                _NUD.get(answer['state'], 'none'))

    def routes(self) -> Routes:
        """Read all routes of the node, by a dump."""
        host: list[HostRoute] = []
        next_hops: set[IPAddress] = set()

        def read() -> None:
            host.clear()
            for family in (socket.AF_INET, socket.AF_INET6):
                message = rtmsg.rtmsg()
                message['family'] = family
                for route in self._items(rtnl.RTM_GETROUTE, message,
                                         netlink.NLM_F_DUMP):
                    next_hops.update(route.gateways)
                    if (route.dst_len in (32, 128)
                            and route.type != RTN_LOCAL
                            and not route.flags & RTM_F_CLONED):
                        host.append(_host_route(route))

        undisturbed('list the routes', read)
        return Routes(tuple(host), frozenset(next_hops))

    def neighbours(self, ifindex: int) -> list[Neighbour]:
        """List those that are set for good on an interface, by a dump."""
        message = _NeighbourMessage()
        message['attrs'] = [('NDA_IFINDEX', ifindex)]
        return undisturbed('list the neighbours', lambda: [
            Neighbour(each.dst, ifindex, each.mac, each.protocol)
            for each in self._items(rtnl.RTM_GETNEIGH, message,
                                    netlink.NLM_F_DUMP)
            if each.ifindex == ifindex and each.dst is not None
            and each.state & ndmsg.NUD_PERMANENT])

    def _items(self, kind: int, message: Any, flags: int = 0
               ) -> Iterator[Any]:
        """Ask for routes or neighbours, and read the answers."""
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
        found = undisturbed('list the addresses',
                            lambda: list(self._ipr.get_addr()))
        return [
            (message['index'],
             ipaddress.ip_address(message.get_attr('IFA_LOCAL')
                                  or message.get_attr('IFA_ADDRESS')))
            for message in found]

    def is_on_link(self, address: IPAddress) -> bool:
        """Whether an address would be reached without a gateway."""
        route = self.lookup(address)
        return (route is not None and route.type == RTN_UNICAST
                and not route.gateways and not route.several)


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of the node's network that the kernel has told.

    :ivar what: ``link``, ``address``, ``route``, ``neighbour``; or ``lost``,
        when there were more than the socket could hold, so that anything
        may have changed
    :ivar gone: whether it is something that is there no more
    :ivar ifindex: of a link, or of that of the others
    :ivar ifname: of a link
    :ivar dst: of a neighbour, or of a route to a single address
    :ivar protocol: of a route
    """

    what: str
    gone: bool = False
    ifindex: Optional[int] = None
    ifname: Optional[str] = None
    dst: Optional[IPAddress] = None
    protocol: Optional[int] = None


class Events:
    """Hears of changes in the namespace of the calling thread."""

    def __init__(self) -> None:
        self._ipr = pyroute2.IPRoute()
        self._ipr.bind(groups=(
            rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR
            | rtnl.RTMGRP_IPV6_IFADDR | rtnl.RTMGRP_IPV4_ROUTE
            | rtnl.RTMGRP_IPV6_ROUTE | rtnl.RTMGRP_NEIGH))

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ipr.close()

    def fileno(self) -> int:
        """For select(2): readable when there is something to :meth:`get`."""
        return int(self._ipr.fileno())

    def get(self) -> list[Event]:
        """Return what has come; waits if nothing has."""
        try:
            return [event for event in map(_event, self._ipr.get())
                    if event is not None]
        except (OSError, nl_exceptions.NetlinkError):
            return [Event('lost')]  # ENOBUFS


def _event(message: Any) -> Optional[Event]:
    name = message.get('event', '')
    gone = name.startswith('RTM_DEL')
    if name.endswith('LINK'):
        return Event('link', gone, message['index'],
                     message.get_attr('IFLA_IFNAME'))
    if name.endswith('ADDR'):
        return Event('address', gone, message['index'])
    if name.endswith('ROUTE'):
        return Event('route', gone, message.get_attr('RTA_OIF'),
                     dst=_ip(message.get_attr('RTA_DST')
                             if message['dst_len'] in (32, 128) else None),
                     protocol=message['proto'])
    if name.endswith('NEIGH'):
        return Event('neighbour', gone, message['ifindex'],
                     dst=_ip(message.get_attr('NDA_DST')))
    return None


def _ip(text: Optional[str]) -> Optional[IPAddress]:
    return ipaddress.ip_address(text) if text else None


class _NeighbourMessage(netlink.nlmsg):  # type: ignore[misc]
    """pyroute2's, with the attribute that its 0.7 lacks (linux 5.0).

    Not derived from that: what pyroute2 compiles of a class is inherited.
    """

    __slots__ = ()
    prefix = ndmsg.ndmsg.prefix
    fields = ndmsg.ndmsg.fields
    nla_map = (*ndmsg.ndmsg.nla_map, ('NDA_PROTOCOL', 'uint8'))
    cacheinfo = ndmsg.ndmsg.cacheinfo


def _message(verb: Verb, what: Item) -> Any:
    # Not by IPRoute.route(), which takes as long again to look at its
    # arguments.
    if isinstance(what, HostRoute):
        message = rtmsg.rtmsg()
        message['family'] = _family(what.dst)
        message['dst_len'] = what.dst.max_prefixlen
        message['table'] = (what.table if what.table < 256
                            else RT_TABLE_COMPAT)
        message['proto'] = what.protocol
        message['scope'] = (RT_SCOPE_NOWHERE if verb is Verb.DELETE
                            else RT_SCOPE_LINK)
        message['type'] = RTN_UNICAST
        message['attrs'] = [('RTA_DST', str(what.dst)),
                            ('RTA_OIF', what.oif)]
        if what.table >= 256:
            message['attrs'].append(('RTA_TABLE', what.table))
        if what.src is not None:
            message['attrs'].append(('RTA_PREFSRC', str(what.src)))
        kinds = rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE
    else:
        message = _neighbour_message(what.ifindex, what.dst)
        if verb is not Verb.DELETE:
            message['state'] = ndmsg.NUD_PERMANENT
            message['attrs'] += [('NDA_LLADDR', what.mac),
                                 ('NDA_PROTOCOL', what.protocol)]
        kinds = rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH
    message['header']['type'] = kinds[verb is Verb.DELETE]
    message['header']['flags'] = netlink.NLM_F_REQUEST | _FLAGS[verb]
    return message


def _neighbour_message(ifindex: int, dst: Optional[IPAddress] = None,
                       attrs: Sequence[Any] = ()) -> Any:
    message = _NeighbourMessage()
    message['ifindex'] = ifindex
    message['attrs'] = list(attrs)
    if dst is not None:
        message['family'] = _family(dst)
        message['attrs'].append(('NDA_DST', str(dst)))
    return message


def _family(address: IPAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _host_route(route: messages.Route) -> HostRoute:
    assert route.dst is not None  # it is no default route
    return HostRoute(
        route.dst, route.oif, route.protocol, route.table, route.src,
        direct=(route.type == RTN_UNICAST
                and not route.gateways and not route.several
                and (route.dst.version == 6
                     or route.scope == RT_SCOPE_LINK)))


def _link(message: Any) -> Link:
    info = message.get_attr('IFLA_LINKINFO')
    data = info.get_attr('IFLA_INFO_DATA') if info else None
    kind = info.get_attr('IFLA_INFO_KIND') if info else None
    return Link(
        name=message.get_attr('IFLA_IFNAME'),
        index=message['index'],
        kind=kind,
        mode=(data.get_attr('IFLA_MACVLAN_MODE')
              if data and kind == 'macvlan' else None),
        lower=message.get_attr('IFLA_LINK'),
        lower_elsewhere=message.get_attr('IFLA_LINK_NETNSID') is not None,
        mtu=message.get_attr('IFLA_MTU'),
        mac=message.get_attr('IFLA_ADDRESS') or '',
        multicast=bool(message['flags'] & ifinfmsg.IFF_MULTICAST),
        up=bool(message['flags'] & ifinfmsg.IFF_UP),
        loopback=bool(message['flags'] & ifinfmsg.IFF_LOOPBACK))
