# SPDX-License-Identifier: Apache-2.0

"""Packs and parses the rtnetlink messages of this package.

A bind sends two messages, and a dump returns one message for each pod. For one
message, pyroute2 takes more than ten times as long as the module struct. The
formats are defined in linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and
neighbour.h. Tests compare the messages with those of pyroute2 and the kernel.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any, Iterator, Optional

from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import values
from kuryr_break0 import model

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_GETRULE = 32, 34
RTM_NEWNSID, RTM_DELNSID, RTM_GETNSID = 88, 89, 90
RTM_NEWNEXTHOP, RTM_GETNEXTHOP = 104, 106

RT_TABLE_COMPAT = 252  # rtm_table of a route in a table above 255
RT_TABLE_DEFAULT, RT_TABLE_MAIN, RT_TABLE_LOCAL = 253, 254, 255
RTPROT_STATIC = 4
#: In a deletion, this scope matches a route of any scope. RT_SCOPE_UNIVERSE
#: (0) would not match a route of scope link.
RT_SCOPE_NOWHERE = 255
RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT = 6, 7, 8
#: Flag of a look-up: report the table of the route. Without this flag, the
#: kernel reports table main.
RTM_F_LOOKUP_TABLE = 0x1000
#: Flag of a look-up: report the matching route of the table, instead of the
#: path to the address.
RTM_F_FIB_MATCH = 0x2000
IFF_UP, IFF_LOOPBACK, IFF_MULTICAST = 0x1, 0x8, 0x1000
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x02, 0x08, 0x40
IFA_F_PERMANENT = 0x80
MACVLAN_MODE_BRIDGE = 4
IFF_LOWER_UP = 0x10000
ARPHRD_ETHER = 1
#: Kinds of masters that receive the frames of their ports, as a macvlan
#: receives the frames of its parent. An interface has at most one such
#: receiver (netdev_rx_handler_register).
_RECEIVERS = ('bridge', 'bond', 'team', 'openvswitch')
#: Flag of a request for interfaces: omit the counters from the answer.
RTEXT_FILTER_SKIP_STATS = 1 << 3

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK = 1, 3, 4, 5
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_GROUP, IFLA_NET_NS_FD = 18, 20, 27, 28
IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_PROTO_DOWN = 29, 37, 39
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_MACVLAN_MODE = 1, 2, 1
IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA, IFLA_VRF_PORT_TABLE = 4, 5, 1
IFLA_MASTER = 10
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 2, 4, 5, 6
RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = 7, 8, 9, 15
RTA_VIA, RTA_ENCAP = 18, 22
NHA_OIF, NHA_GATEWAY, NHA_FDB = 5, 6, 11
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NETNSA_NSID, NETNSA_FD = 1, 3
FRA_PRIORITY, FRA_TABLE = 6, 15
_IFINFO = struct.Struct('=BxHiII')  # ifinfomsg
_IFADDR = struct.Struct('=4BI')  # ifaddrmsg
_ROUTE = struct.Struct('=8BI')  # rtmsg
_NEIGHBOUR = struct.Struct('=BxxxiHBB')  # ndmsg
_RULE = struct.Struct('=BxxxBxxxI')  # fib_rule_hdr
_NEXT_HOP = struct.Struct('=HBBi')  # rtnexthop
_NEXT_HOP_OBJECT = struct.Struct('=4BI')  # nhmsg
#: Requests that dump all nexthop objects and all rules
ALL_NEXT_HOPS, ALL_RULES = map(bytes, (_NEXT_HOP_OBJECT.size, _RULE.size))
_MODES = {1: 'private', 2: 'vepa', 4: 'bridge', 8: 'passthru', 16: 'source'}

_FLAGS = {values.Verb.ADD: netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
          values.Verb.REPLACE: netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
          values.Verb.DELETE: 0}


def pack_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(':', ''))


def change(verb: values.Verb, what: model.Entry) -> netlink.Message:
    """Return the message that sets or deletes a route or a neighbour."""
    deletes = verb is values.Verb.DELETE
    if isinstance(what, model.HostRoute):
        return netlink.Message(RTM_DELROUTE if deletes else RTM_NEWROUTE,
                               _FLAGS[verb], _pack_route(what, deletes))
    body = pack_neighbour(what.dst, what.ifindex,
                          0 if deletes else values.NUD_PERMANENT)
    if not deletes:
        body += netlink.attribute(NDA_LLADDR, pack_mac(what.mac))
        if what.protocol is not None:
            body += netlink.attribute(NDA_PROTOCOL, bytes([what.protocol]))
    return netlink.Message(RTM_DELNEIGH if deletes else RTM_NEWNEIGH,
                           _FLAGS[verb], body)


def _pack_route(what: model.HostRoute, deletes: bool) -> bytes:
    body = _ROUTE.pack(
        family_of(what.dst), what.dst.max_prefixlen, 0, 0,
        what.table if what.table < 256 else RT_TABLE_COMPAT, what.protocol,
        RT_SCOPE_NOWHERE if deletes else values.RT_SCOPE_LINK,
        values.RTN_UNICAST, 0)
    body += netlink.attribute(RTA_DST, what.dst.packed)
    if what.oif is not None:
        body += netlink.number(RTA_OIF, what.oif)
    if what.metric is not None:
        body += netlink.number(RTA_PRIORITY, what.metric)
    if what.table >= 256:
        body += netlink.number(RTA_TABLE, what.table)
    if what.src is not None:
        body += netlink.attribute(RTA_PREFSRC, what.src.packed)
    return body


def pack_neighbour(dst: model.IPAddress, ifindex: int,
                   state: int = 0) -> bytes:
    """Pack the header and the address of a neighbour."""
    return (_NEIGHBOUR.pack(family_of(dst), ifindex, state, 0, 0)
            + netlink.attribute(NDA_DST, dst.packed))


def pack_neighbour_dump(ifindex: int) -> bytes:
    """Pack the request for all neighbours of an interface."""
    return bytes(_NEIGHBOUR.size) + netlink.number(NDA_IFINDEX, ifindex)


def pack_route_dump(family: int, table: int = 0, oif: int = 0,
                    kind: int = 0) -> bytes:
    """Pack a request to dump routes, by table, interface and route type.

    A value of 0 matches all routes.
    """
    body = _ROUTE.pack(family, 0, 0, 0, table if table < 256 else 0, 0, 0,
                       kind, 0)
    if table >= 256:
        body += netlink.number(RTA_TABLE, table)
    return body + netlink.number(RTA_OIF, oif) if oif else body


def pack_lookup(address: model.IPAddress, flags: int = 0,
                source: Optional[model.IPAddress] = None,
                vrf: int = 0) -> bytes:
    """Pack a request to look up the route of a packet to an address."""
    body = _ROUTE.pack(family_of(address), address.max_prefixlen,
                       source.max_prefixlen if source else 0, 0, 0, 0, 0, 0,
                       flags) + netlink.attribute(RTA_DST, address.packed)
    if vrf:
        body += netlink.number(RTA_OIF, vrf)
    return body + netlink.attribute(RTA_SRC, source.packed) if source else body


def pack_address_dump(ifindex: int) -> bytes:
    """Pack a request for the addresses of an interface.

    :param ifindex: ifindex of the interface; 0 for all interfaces
    """
    return _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, ifindex)


def pack_address(ifindex: int, address: model.IPInterface,
                 flags: int = 0) -> bytes:
    """Pack an address with its prefix length."""
    packed = address.ip.packed
    return (_IFADDR.pack(family_of(address), address.network.prefixlen, flags,
                         0, ifindex)
            + netlink.attribute(IFA_LOCAL, packed)
            + netlink.attribute(IFA_ADDRESS, packed))


def pack_gateway_route(network: model.IPNetwork,
                       gateway: model.IPAddress) -> bytes:
    """Pack a route with a gateway in table main."""
    body = _ROUTE.pack(
        family_of(gateway), network.prefixlen, 0, 0, RT_TABLE_MAIN,
        RTPROT_STATIC, values.RT_SCOPE_UNIVERSE, values.RTN_UNICAST, 0)
    if network.prefixlen:
        body += netlink.attribute(RTA_DST, network.network_address.packed)
    return body + netlink.attribute(RTA_GATEWAY, gateway.packed)


def pack_link(ifindex: int = 0, flags: int = 0, change: int = 0) -> bytes:
    """Pack an interface's header: its ifindex, and flags to change."""
    return _IFINFO.pack(socket.AF_UNSPEC, 0, ifindex, flags, change)


def pack_macvlan() -> bytes:
    """Pack the attributes of a macvlan in bridge mode."""
    return netlink.attribute(
        IFLA_LINKINFO, netlink.attribute(IFLA_INFO_KIND, b'macvlan')
        + netlink.attribute(IFLA_INFO_DATA, netlink.number(
            IFLA_MACVLAN_MODE, MACVLAN_MODE_BRIDGE)))


#: Restricts a dump of interfaces to macvlans
OF_KIND_MACVLAN = netlink.attribute(
    IFLA_LINKINFO, netlink.attribute(IFLA_INFO_KIND, b'macvlan'))


def parse_link(body: bytes) -> values.Link:
    _, hardware, index, flags, _ = _IFINFO.unpack_from(body)
    attrs = netlink.attributes(body, _IFINFO.size)
    info = netlink.attributes(attrs.get(IFLA_LINKINFO, b''))
    kind = netlink.read_text(info.get(IFLA_INFO_KIND))
    mode = vrf = None
    if kind in ('macvlan', 'macvtap'):
        mode = _MODES.get(netlink.read_number(netlink.attributes(info.get(
            IFLA_INFO_DATA, b'')).get(IFLA_MACVLAN_MODE)) or 0)
    master = netlink.read_number(attrs.get(IFLA_MASTER))
    below = netlink.read_text(info.get(IFLA_INFO_SLAVE_KIND))
    if below == 'vrf':
        table = netlink.attributes(info.get(IFLA_INFO_SLAVE_DATA, b'')).get(
            IFLA_VRF_PORT_TABLE)
        vrf = values.Vrf(master or 0, netlink.read_number(table) or 0)
    lower = attrs.get(IFLA_LINK_NETNSID)
    return values.Link(
        name=netlink.read_text(attrs.get(IFLA_IFNAME)) or '', index=index,
        kind=kind, mode=mode, lower=netlink.read_number(attrs.get(IFLA_LINK)),
        lower_namespace=netlink.S32.unpack(lower)[0] if lower else None,
        mtu=netlink.read_number(attrs.get(IFLA_MTU)) or 0,
        mac=attrs.get(IFLA_ADDRESS, b'').hex(':'),
        alias=netlink.read_text(attrs.get(IFLA_IFALIAS)),
        multicast=bool(flags & IFF_MULTICAST), up=bool(flags & IFF_UP),
        loopback=bool(flags & IFF_LOOPBACK),
        group=netlink.read_number(attrs.get(IFLA_GROUP)) or 0,
        carrier=bool(flags & IFF_LOWER_UP), vrf=vrf,
        port_of=master if below in _RECEIVERS else None,
        ethernet=hardware == ARPHRD_ETHER,
        protodown=attrs.get(IFLA_PROTO_DOWN, b'\0') != b'\0')


def parse_route(body: bytes) -> values.Route:
    (_, dst_len, _, _, table, protocol, scope, kind,
     flags) = _ROUTE.unpack_from(body)
    attrs = netlink.attributes(body, _ROUTE.size)
    oif = netlink.read_number(attrs.get(RTA_OIF))
    return values.Route(
        _address(attrs.get(RTA_DST)), dst_len, kind, scope, protocol,
        netlink.read_number(attrs.get(RTA_TABLE)) or table, flags,
        oif, _address(attrs.get(RTA_PREFSRC)),
        netlink.read_number(attrs.get(RTA_PRIORITY)) or 0,
        tuple(_next_hops(attrs, oif)), RTA_MULTIPATH in attrs,
        RTA_METRICS in attrs or RTA_ENCAP in attrs)


def parse_next_hop(body: bytes) -> tuple[values.NextHop, ...]:
    """Parse a nexthop object; return () if it has no gateway for routes.

    A group has no gateway, but refers to other nexthop objects. A nexthop
    object of a forwarding database (fdb) belongs to no route.
    """
    attrs = netlink.attributes(body, _NEXT_HOP_OBJECT.size)
    gateway = _address(attrs.get(NHA_GATEWAY))
    if gateway is None or NHA_FDB in attrs:
        return ()
    return (values.NextHop(gateway, netlink.read_number(attrs.get(NHA_OIF))),)


def parse_rule(body: bytes) -> tuple[int, int, int]:
    """Parse only the family, the priority and the table of a rule."""
    family, table, _ = _RULE.unpack_from(body)
    attrs = netlink.attributes(body, _RULE.size)
    return (family, netlink.read_number(attrs.get(FRA_PRIORITY)) or 0,
            netlink.read_number(attrs.get(FRA_TABLE)) or table)


def route_protocol(body: bytes) -> int:
    """Parse only the protocol number of a route."""
    return body[5] if len(body) > 5 else 0  # rtm_protocol


def changed_flags(body: bytes) -> int:
    """Parse only the mask of the changed flags of an interface."""
    return int(_IFINFO.unpack_from(body)[4])


def parse_address(body: bytes) -> Optional[values.AddressState]:
    """Parse an address; return None if it is neither IPv4 nor IPv6."""
    _, _, flags, _, ifindex = _IFADDR.unpack_from(body)
    attrs = netlink.attributes(body, _IFADDR.size)
    address = _address(attrs.get(IFA_LOCAL) or attrs.get(IFA_ADDRESS))
    return None if address is None else values.AddressState(
        ifindex, address, flags)


def parse_neighbour(body: bytes) -> values.NeighbourState:
    _, ifindex, state, _, _ = _NEIGHBOUR.unpack_from(body)
    attrs = netlink.attributes(body, _NEIGHBOUR.size)
    protocol = attrs.get(NDA_PROTOCOL)
    return values.NeighbourState(
        _address(attrs.get(NDA_DST)), ifindex, state,
        attrs.get(NDA_LLADDR, b'').hex(':'),
        protocol[0] if protocol else None)


def parse_nsid(body: bytes) -> int:
    """Parse the number (nsid) of a namespace; -1 if it has none."""
    nsid = netlink.attributes(body, 4).get(NETNSA_NSID)
    return int(netlink.S32.unpack(nsid)[0]) if nsid else -1


#: Parsers by message type. Each key is the type of an addition. The type of
#: the deletion is the key plus 1.
_PARSERS = {RTM_NEWLINK: parse_link, RTM_NEWADDR: parse_address,
            RTM_NEWROUTE: parse_route, RTM_NEWNEIGH: parse_neighbour,
            RTM_NEWRULE: parse_rule, RTM_NEWNSID: parse_nsid,
            RTM_NEWNEXTHOP: parse_next_hop}


def parse(message: netlink.Received) -> Any:
    """Parse a message; return None if its type has no parser.

    :raises OSError: EBADMSG, if the message is malformed
    """
    parser = _PARSERS.get(message.kind & ~1)
    try:
        return parser and parser(message.body)
    except (struct.error, ValueError, LookupError, RecursionError) as err:
        raise OSError(errno.EBADMSG, 'cannot parse a message of type %d: '
                      '%r' % (message.kind, err)) from err


def family_of(address: model.IPAddress) -> int:
    """Return the address family of an address."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _next_hops(attrs: dict[int, bytes],
               oif: Optional[int]) -> Iterator[values.NextHop]:
    # RTA_VIA begins with the address family of the gateway, which differs from
    # the family of the route.
    for packed in (attrs.get(RTA_GATEWAY), attrs.get(RTA_VIA, b'')[2:]):
        gateway = _address(packed)
        if gateway is not None:
            yield values.NextHop(gateway, oif)
    hops = attrs.get(RTA_MULTIPATH, b'')
    start = 0
    while start + _NEXT_HOP.size <= len(hops):
        length, _, _, ifindex = _NEXT_HOP.unpack_from(hops, start)
        if length < _NEXT_HOP.size:
            break
        yield from _next_hops(netlink.attributes(
            hops[start:start + length], _NEXT_HOP.size), ifindex)
        start += length + 3 & ~3


def _address(packed: Optional[bytes]) -> Optional[model.IPAddress]:
    """Parse an IP address; None if it is absent or has another length."""
    if packed is None or len(packed) not in (4, 16):
        return None
    return model.address_from_bytes(packed)
