# SPDX-License-Identifier: Apache-2.0

"""Packs and parses the rtnetlink messages that this package uses.

A bind sends two of them and a dump of the node returns one per pod, so they
are made by struct: pyroute2 needs more than ten times as long for each. The
formats are those of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and
neighbour.h. The tests compare each with pyroute2 and with the kernel.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import ipaddress
import socket
import struct
from typing import Any, Iterator, NamedTuple, Optional

from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPInterface
from kuryr_break0.model import IPNetwork
from kuryr_break0.model import Item

NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWNSID, RTM_DELNSID, RTM_GETNSID = 88, 89, 90
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400

RT_TABLE_COMPAT = 252  # in the header, for a table that does not fit there
RT_TABLE_MAIN = 254
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTPROT_STATIC = 4
#: In a deletion, any scope. With 0, universe, the kernel finds no route that
#: is scoped to the link.
RT_SCOPE_NOWHERE = 255
RTN_UNICAST, RTN_LOCAL = 1, 2
RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT = 6, 7, 8
#: Learnt by use, as IPv6's path MTUs are: not a route of the table.
RTM_F_CLONED = 0x200
#: Answer with the table that was used; without it, the answer says main.
RTM_F_LOOKUP_TABLE = 0x1000
#: Answer with the route in the table, not with what follows from it.
RTM_F_FIB_MATCH = 0x2000
NUD_PERMANENT = 0x80
IFF_UP, IFF_LOOPBACK, IFF_MULTICAST = 0x1, 0x8, 0x1000
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x02, 0x08, 0x40
MACVLAN_MODE_BRIDGE = 4
IFF_LOWER_UP = 0x10000
#: Leave the counters out of an interface's message.
RTEXT_FILTER_SKIP_STATS = 1 << 3

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK = 1, 3, 4, 5
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_GROUP, IFLA_NET_NS_FD = 18, 20, 27, 28
IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_NEW_NETNSID = 29, 37, 45
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_MACVLAN_MODE = 1, 2, 1
IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA, IFLA_VRF_PORT_TABLE = 4, 5, 1
IFLA_MASTER = 10
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 2, 4, 5, 6
RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 7, 9, 15, 18
NHA_OIF, NHA_GATEWAY, NHA_FDB = 5, 6, 11
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NETNSA_NSID, NETNSA_FD = 1, 3
_NLMSGERR_ATTR_MSG = 1
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200

HEADER = struct.Struct('=IHHII')  # nlmsghdr
_IFINFO = struct.Struct('=BxHiII')  # ifinfomsg
_IFADDR = struct.Struct('=4BI')  # ifaddrmsg
_ROUTE = struct.Struct('=8BI')  # rtmsg
_NEIGHBOUR = struct.Struct('=BxxxiHBB')  # ndmsg
_ATTRIBUTE = struct.Struct('=HH')  # nlattr
_NEXT_HOP = struct.Struct('=HBBi')  # rtnexthop
_NEXT_HOP_OBJECT = struct.Struct('=4BI')  # nhmsg
_U32 = struct.Struct('=I')
_S32 = struct.Struct('=i')
#: The kind of an attribute without its two flags (NLA_TYPE_MASK)
_KIND = 0x3fff
_MODES = {1: 'private', 2: 'vepa', 4: 'bridge', 8: 'passthru', 16: 'source'}


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

_FLAGS = {Verb.ADD: NLM_F_CREATE | NLM_F_EXCL,
          Verb.REPLACE: NLM_F_CREATE | NLM_F_REPLACE,
          Verb.DELETE: 0}


class Message(NamedTuple):
    """A message as it is sent, but for its sequence number."""

    kind: int
    flags: int
    body: bytes

    def packed(self, sequence: int) -> bytes:
        """Return it with its header, padded for the next one to follow."""
        length = HEADER.size + len(self.body)
        return (HEADER.pack(length, self.kind, self.flags | NLM_F_REQUEST,
                            sequence, 0)
                + self.body + bytes(-length % 4))


class Header(NamedTuple):
    """The header of a message that was received, and where its body is."""

    kind: int
    flags: int
    sequence: int
    start: int
    end: int


class Vrf(NamedTuple):
    """A VRF that an interface is in.

    :ivar ifindex: that of the VRF
    :ivar table: number of its routing table
    """

    ifindex: int
    table: int


@dataclasses.dataclass(frozen=True)
class Link:
    """A network interface as the kernel reports it.

    :ivar kind: None for a physical one
    :ivar mode: of a macvlan
    :ivar lower: ifindex of the interface that it is stacked on
    :ivar lower_namespace: the number that this namespace has for the one in
        which ``lower`` counts; None if that is this one
    :ivar alias: free text that somebody gave it
    :ivar group: a number that somebody gave it; 0 is the default
    :ivar carrier: whether it is up and the link below it works
    :ivar vrf: None if it is in none
    """

    name: str
    index: int
    kind: Optional[str]
    mode: Optional[str]
    lower: Optional[int]
    lower_namespace: Optional[int]
    mtu: int
    mac: str
    alias: Optional[str]
    multicast: bool
    up: bool
    loopback: bool
    group: int
    carrier: bool
    vrf: Optional[Vrf]

    @property
    def lower_of_macvlans(self) -> tuple[Optional[int], Optional[int]]:
        """Return ``lower`` and ``lower_namespace`` of macvlans on it.

        The kernel puts a macvlan of a macvlan beside that, on the lower
        interface of both (macvlan_common_newlink).
        """
        if self.kind == 'macvlan':
            return self.lower, self.lower_namespace
        return self.index, None


class NextHop(NamedTuple):
    """A router, and the interface that it is on."""

    gateway: IPAddress
    oif: Optional[int]


class Route(NamedTuple):
    """A route.

    :ivar dst: None for a default route
    :ivar next_hops: those with a gateway; none of a nexthop object, where
        the kernel names that alone (net.ipv4.nexthop_compat_mode)
    :ivar several: whether it has more than one
    """

    family: int
    dst: Optional[IPAddress]
    dst_len: int
    type: int
    scope: int
    protocol: int
    table: int
    flags: int
    oif: Optional[int]
    src: Optional[IPAddress]
    metric: int
    next_hops: tuple[NextHop, ...]
    several: bool

    @property
    def host_route(self) -> Optional[HostRoute]:
        """Return it as a route to a single address; None if it is none."""
        if (self.dst is None or self.dst_len != self.dst.max_prefixlen
                or self.type == RTN_LOCAL or self.flags & RTM_F_CLONED):
            return None
        return HostRoute(
            self.dst, self.oif, self.protocol, self.table, self.src,
            self.metric, direct=self.is_on_link and (
                self.family == socket.AF_INET6
                or self.scope == RT_SCOPE_LINK))

    @property
    def is_on_link(self) -> bool:
        """Return whether it has no gateway."""
        return (self.type == RTN_UNICAST and not self.next_hops
                and not self.several)


class InterfaceAddress(NamedTuple):
    """An address of an interface; the own one, where a peer has one too."""

    ifindex: int
    address: IPAddress


class NeighbourState(NamedTuple):
    """A neighbour, in whatever state.

    :ivar protocol: None if no program marked it
    """

    dst: Optional[IPAddress]
    ifindex: int
    state: int
    mac: str
    protocol: Optional[int]


def headers(data: bytes) -> Iterator[Header]:
    """Iterate over the messages of what was received at once."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return  # or it would not end
        yield Header(kind, flags, sequence, start + HEADER.size,
                     min(start + length, len(data)))
        start += length + 3 & ~3


def error(data: bytes, header: Header) -> tuple[int, str]:
    """Read an NLMSG_ERROR or NLMSG_DONE: errno (0 for none), explanation."""
    if header.end - header.start < _S32.size:
        return 0, ''
    code = -_S32.unpack_from(data, header.start)[0]
    text = ''
    if header.kind == NLMSG_ERROR and header.flags & _NLM_F_ACK_TLVS:
        skipped = header.start + _S32.size + HEADER.size
        if not header.flags & _NLM_F_CAPPED:
            length, = _U32.unpack_from(data, header.start + _S32.size)
            skipped = header.start + _S32.size + (length + 3 & ~3)
        text = _text(attributes(data, skipped, header.end)
                     .get(_NLMSGERR_ATTR_MSG)) or ''
    return code, text


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack one attribute."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def number(kind: int, value: int) -> bytes:
    """Pack an attribute that is a number of 32 bits."""
    return attribute(kind, _U32.pack(value))


def text(kind: int, value: str) -> bytes:
    """Pack an attribute that is a text."""
    return attribute(kind, value.encode() + b'\0')


def attributes(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """Read attributes by their kind."""
    found = {}
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            break  # or it would not end
        found[kind & _KIND] = data[start + 4:start + length]
        start += length + 3 & ~3
    return found


def pack_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(':', ''))


def change(verb: Verb, what: Item) -> Message:
    """Make the message that sets or deletes a route or a neighbour."""
    deletes = verb is Verb.DELETE
    if isinstance(what, HostRoute):
        return Message(RTM_DELROUTE if deletes else RTM_NEWROUTE,
                       _FLAGS[verb], _pack_route(what, deletes))
    body = pack_neighbour(what.dst, what.ifindex,
                          0 if deletes else NUD_PERMANENT)
    if not deletes:
        body += attribute(NDA_LLADDR, pack_mac(what.mac))
        if what.protocol is not None:
            body += attribute(NDA_PROTOCOL, bytes([what.protocol]))
    return Message(RTM_DELNEIGH if deletes else RTM_NEWNEIGH, _FLAGS[verb],
                   body)


def _pack_route(what: HostRoute, deletes: bool) -> bytes:
    body = _ROUTE.pack(
        family_of(what.dst), what.dst.max_prefixlen, 0, 0,
        what.table if what.table < 256 else RT_TABLE_COMPAT, what.protocol,
        RT_SCOPE_NOWHERE if deletes else RT_SCOPE_LINK, RTN_UNICAST, 0)
    body += attribute(RTA_DST, what.dst.packed)
    if what.oif is not None:
        body += number(RTA_OIF, what.oif)
    if what.metric is not None:
        body += number(RTA_PRIORITY, what.metric)
    if what.table >= 256:
        body += number(RTA_TABLE, what.table)
    if what.src is not None:
        body += attribute(RTA_PREFSRC, what.src.packed)
    return body


def pack_neighbour(dst: IPAddress, ifindex: int, state: int = 0) -> bytes:
    """Pack what names a neighbour."""
    return (_NEIGHBOUR.pack(family_of(dst), ifindex, state, 0, 0)
            + attribute(NDA_DST, dst.packed))


def pack_neighbour_dump(ifindex: int) -> bytes:
    """Pack the request for all neighbours of an interface."""
    return (_NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + number(NDA_IFINDEX, ifindex))


def pack_route_dump(family: int, table: int = 0, oif: Optional[int] = None,
                    kind: int = 0) -> bytes:
    """Pack the request for all routes, or those of an interface or kind."""
    body = _ROUTE.pack(family, 0, 0, 0, table if table < 256 else 0, 0, 0,
                       kind, 0)
    if table >= 256:
        body += number(RTA_TABLE, table)
    return body if oif is None else body + number(RTA_OIF, oif)


def pack_lookup(address: IPAddress, flags: int = 0,
                source: Optional[IPAddress] = None, vrf: int = 0) -> bytes:
    """Pack the question how a packet to an address would go."""
    body = _ROUTE.pack(family_of(address), address.max_prefixlen,
                       source.max_prefixlen if source else 0, 0, 0, 0, 0, 0,
                       flags) + attribute(RTA_DST, address.packed)
    if vrf:
        body += number(RTA_OIF, vrf)
    return body + attribute(RTA_SRC, source.packed) if source else body


def pack_address(ifindex: int, address: IPAddress) -> bytes:
    """Pack an address, alone in its prefix, without duplicate detection.

    That would be sent to the LAN.
    """
    return _IFADDR.pack(
        family_of(address), address.max_prefixlen,
        IFA_F_NODAD if address.version == 6 else 0, 0, ifindex) + (
            attribute(IFA_LOCAL, address.packed)
            + attribute(IFA_ADDRESS, address.packed))


def pack_prefix(ifindex: int, address: IPInterface) -> bytes:
    """Pack an address with its prefix, as a pod gets it."""
    body = _IFADDR.pack(family_of(address.ip), address.network.prefixlen, 0,
                        0, ifindex)
    if address.version == 4:
        body += attribute(IFA_LOCAL, address.ip.packed)
    return body + attribute(IFA_ADDRESS, address.ip.packed)


def pack_gateway_route(network: IPNetwork, gateway: IPAddress) -> bytes:
    """Pack a route by a gateway, of the main table."""
    body = _ROUTE.pack(
        family_of(gateway), network.prefixlen, 0, 0, RT_TABLE_MAIN,
        RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    if network.prefixlen:
        body += attribute(RTA_DST, network.network_address.packed)
    return body + attribute(RTA_GATEWAY, gateway.packed)


def pack_address_dump() -> bytes:
    return _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)


def pack_link(ifindex: int = 0, flags: int = 0, change: int = 0) -> bytes:
    """Pack what names an interface, and which of its flags to change."""
    return _IFINFO.pack(socket.AF_UNSPEC, 0, ifindex, flags, change)


def pack_macvlan() -> bytes:
    """Pack the kind of a macvlan in bridge mode."""
    return attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b'macvlan')
                     + attribute(IFLA_INFO_DATA, number(
                         IFLA_MACVLAN_MODE, MACVLAN_MODE_BRIDGE)))


def parse_link(data: bytes, start: int, end: int) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(data, start)
    found = attributes(data, start + _IFINFO.size, end)
    info_bytes = found.get(IFLA_LINKINFO, b'')
    info = attributes(info_bytes, 0, len(info_bytes))
    kind = _text(info.get(IFLA_INFO_KIND))
    mode = None
    if kind == 'macvlan':
        details = info.get(IFLA_INFO_DATA, b'')
        mode = _MODES.get(_number(attributes(details, 0, len(details)).get(
            IFLA_MACVLAN_MODE)) or 0)
    vrf = None
    if _text(info.get(IFLA_INFO_SLAVE_KIND)) == 'vrf':
        details = info.get(IFLA_INFO_SLAVE_DATA, b'')
        vrf = Vrf(_number(found.get(IFLA_MASTER)) or 0, _number(attributes(
            details, 0, len(details)).get(IFLA_VRF_PORT_TABLE)) or 0)
    lower = found.get(IFLA_LINK_NETNSID)
    return Link(
        name=_text(found.get(IFLA_IFNAME)) or '', index=index, kind=kind,
        mode=mode, lower=_number(found.get(IFLA_LINK)),
        lower_namespace=_S32.unpack(lower)[0] if lower else None,
        mtu=_number(found.get(IFLA_MTU)) or 0,
        mac=found.get(IFLA_ADDRESS, b'').hex(':'),
        alias=_text(found.get(IFLA_IFALIAS)),
        multicast=bool(flags & IFF_MULTICAST), up=bool(flags & IFF_UP),
        loopback=bool(flags & IFF_LOOPBACK),
        group=_number(found.get(IFLA_GROUP)) or 0,
        carrier=bool(flags & IFF_LOWER_UP), vrf=vrf)


def parse_route(data: bytes, start: int, end: int) -> Route:
    (family, dst_len, _, _, table, protocol, scope, kind,
     flags) = _ROUTE.unpack_from(data, start)
    found = attributes(data, start + _ROUTE.size, end)
    oif = _number(found.get(RTA_OIF))
    return Route(
        family, _address(found.get(RTA_DST)), dst_len, kind, scope, protocol,
        _number(found.get(RTA_TABLE)) or table, flags,
        oif, _address(found.get(RTA_PREFSRC)),
        _number(found.get(RTA_PRIORITY)) or 0,
        tuple(_next_hops(found, oif)), RTA_MULTIPATH in found)


def pack_next_hop_dump() -> bytes:
    """Pack the request for all nexthop objects."""
    return _NEXT_HOP_OBJECT.pack(socket.AF_UNSPEC, 0, 0, 0, 0)


def parse_next_hop(data: bytes, start: int, end: int) -> tuple[NextHop, ...]:
    """Read a nexthop object: none for a group, which consists of others.

    Nor for one of a forwarding table, which is no route's.
    """
    _NEXT_HOP_OBJECT.unpack_from(data, start)
    found = attributes(data, start + _NEXT_HOP_OBJECT.size, end)
    gateway = _address(found.get(NHA_GATEWAY))
    if gateway is None or NHA_FDB in found:
        return ()
    return (NextHop(gateway, _number(found.get(NHA_OIF))),)


def route_protocol(data: bytes, start: int) -> int:
    """Read the protocol number of a route, and nothing else of it."""
    return data[start + 5] if start + 5 < len(data) else 0  # rtm_protocol


def parse_address(data: bytes, start: int, end: int) -> InterfaceAddress:
    ifindex = _IFADDR.unpack_from(data, start)[4]
    found = attributes(data, start + _IFADDR.size, end)
    return InterfaceAddress(ifindex, ipaddress.ip_address(
        found.get(IFA_LOCAL) or found[IFA_ADDRESS]))


def address_flags(data: bytes, start: int) -> int:
    """Read the flags of an address, and nothing else of it: the low eight."""
    return data[start + 2] if start + 2 < len(data) else 0  # ifa_flags


def parse_neighbour(data: bytes, start: int, end: int) -> NeighbourState:
    _, ifindex, state, _, _ = _NEIGHBOUR.unpack_from(data, start)
    found = attributes(data, start + _NEIGHBOUR.size, end)
    protocol = found.get(NDA_PROTOCOL)
    return NeighbourState(
        _address(found.get(NDA_DST)), ifindex, state,
        found.get(NDA_LLADDR, b'').hex(':'),
        protocol[0] if protocol else None)


def parse_nsid(data: bytes, start: int, end: int) -> int:
    """Read the number of a namespace; -1 for one that has none."""
    found = attributes(data, start + 4, end).get(NETNSA_NSID)
    return int(_S32.unpack(found)[0]) if found else -1


_PARSERS = {RTM_NEWLINK: parse_link, RTM_DELLINK: parse_link,
            RTM_NEWADDR: parse_address, RTM_DELADDR: parse_address,
            RTM_NEWROUTE: parse_route, RTM_DELROUTE: parse_route,
            RTM_NEWNEIGH: parse_neighbour, RTM_DELNEIGH: parse_neighbour,
            RTM_NEWNSID: parse_nsid,
            RTM_NEWNEXTHOP: parse_next_hop, RTM_DELNEXTHOP: parse_next_hop}


def parse(data: bytes, header: Header) -> Any:
    """Read a message of one of the kinds above; None if it is of another.

    :raises OSError: EBADMSG, if it is not of the format that the kernel
        promises
    """
    parser = _PARSERS.get(header.kind)
    try:
        return parser and parser(data, header.start, header.end)
    except (struct.error, ValueError, LookupError, RecursionError) as err:
        raise OSError(errno.EBADMSG, 'a message of kind %d cannot be read: '
                      '%r' % (header.kind, err)) from err


def family_of(address: IPAddress) -> int:
    """Return the address family, as sockets and netlink have it."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _next_hops(found: dict[int, bytes],
               oif: Optional[int]) -> Iterator[NextHop]:
    # RTA_VIA is of another family than the route, and says of which.
    for packed in (found.get(RTA_GATEWAY), found.get(RTA_VIA, b'')[2:]):
        if packed:
            yield NextHop(ipaddress.ip_address(packed), oif)
    hops = found.get(RTA_MULTIPATH, b'')
    start = 0
    while start + _NEXT_HOP.size <= len(hops):
        length, _, _, ifindex = _NEXT_HOP.unpack_from(hops, start)
        if length < _NEXT_HOP.size:
            break
        yield from _next_hops(attributes(hops, start + _NEXT_HOP.size,
                                         start + length), ifindex)
        start += length + 3 & ~3


def _address(packed: Optional[bytes]) -> Optional[IPAddress]:
    return ipaddress.ip_address(packed) if packed else None


def _number(packed: Optional[bytes]) -> Optional[int]:
    return int(_U32.unpack(packed)[0]) if packed else None


def _text(packed: Optional[bytes]) -> Optional[str]:
    if packed is None:
        return None
    return packed.rstrip(b'\0').decode(errors='replace')
