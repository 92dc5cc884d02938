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

"""Reads what the kernel says of addresses, routes and neighbours.

A look at the node reads one message of each kind per pod. pyroute2 makes an
object of each of their attributes, which takes more than ten times as long;
it lets its users bring a parser instead. The formats are those of
linux/netlink.h, linux/if_addr.h, linux/rtnetlink.h and linux/neighbour.h.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Any, Iterator, NamedTuple, Optional

from kuryr_break0.config import IPAddress

RTM_NEWADDR = 20
RTM_NEWROUTE = 24
RTM_NEWNEIGH = 28

_HEADER = struct.Struct('=IHHII')  # nlmsghdr
_ADDRESS = struct.Struct('=4BI')  # ifaddrmsg
_ROUTE = struct.Struct('=8BI')  # rtmsg
_NEIGHBOUR = struct.Struct('=BxxxiHBB')  # ndmsg
_ATTRIBUTE = struct.Struct('=HH')  # nlattr
_NEXT_HOP = struct.Struct('=HBBi')  # rtnexthop
_U32 = struct.Struct('=I')
#: Without the two flags in the kind of an attribute
_KIND = 0x3fff

_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 9, 15, 18
_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL = 1, 2, 12


class Route(NamedTuple):
    """A message of a route.

    :ivar dst: None for a default route
    :ivar gateways: of all its ways
    :ivar several: whether it has more than one
    """

    dst: Optional[IPAddress]
    dst_len: int
    type: int
    scope: int
    protocol: int
    table: int
    flags: int
    oif: Optional[int]
    src: Optional[IPAddress]
    gateways: tuple[IPAddress, ...]
    several: bool


class Address(NamedTuple):
    """A message of an address of an interface.

    :ivar address: the own one, where there is that of a peer too
    """

    ifindex: int
    address: IPAddress


class Neighbour(NamedTuple):
    """A message of a neighbour.

    :ivar protocol: None if no program has marked it
    """

    dst: Optional[IPAddress]
    ifindex: int
    state: int
    mac: str
    protocol: Optional[int]


def parse(data: bytes, offset: int) -> Optional[dict[str, Any]]:
    """Read the message at an offset.

    :returns: its header, as pyroute2 has it, and the ``item``; None for a
        message of another kind
    """
    length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
    if kind == RTM_NEWROUTE:
        item: Any = _route(data, offset + _HEADER.size, offset + length)
    elif kind == RTM_NEWNEIGH:
        item = _neighbour(data, offset + _HEADER.size, offset + length)
    elif kind == RTM_NEWADDR:
        item = _own(data, offset + _HEADER.size, offset + length)
    else:
        return None
    return {'header': {'type': kind, 'flags': flags, 'error': None,
                       'sequence_number': number}, 'item': item}


def _attributes(data: bytes, start: int, end: int) -> dict[int, bytes]:
    found = {}
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            break  # or it would not end
        found[kind & _KIND] = bytes(data[start + 4:start + length])
        start += length + 3 & ~3
    return found


def _address(packed: Optional[bytes]) -> Optional[IPAddress]:
    return ipaddress.ip_address(packed) if packed else None


def _number(packed: Optional[bytes]) -> Optional[int]:
    return int(_U32.unpack(packed)[0]) if packed else None


def _gateways(attributes: dict[int, bytes]) -> Iterator[IPAddress]:
    # RTA_VIA is of another family than the route, and says of which.
    for packed in (attributes.get(_RTA_GATEWAY),
                   attributes.get(_RTA_VIA, b'')[2:]):
        if packed:
            yield ipaddress.ip_address(packed)
    ways = attributes.get(_RTA_MULTIPATH, b'')
    start = 0
    while start + _NEXT_HOP.size <= len(ways):
        length = _NEXT_HOP.unpack_from(ways, start)[0]
        if length < _NEXT_HOP.size:
            break
        yield from _gateways(_attributes(ways, start + _NEXT_HOP.size,
                                         start + length))
        start += length + 3 & ~3


def _route(data: bytes, start: int, end: int) -> Route:
    (_, dst_len, _, _, table, protocol, scope, kind,
     flags) = _ROUTE.unpack_from(data, start)
    attributes = _attributes(data, start + _ROUTE.size, end)
    return Route(
        _address(attributes.get(_RTA_DST)), dst_len, kind, scope, protocol,
        _number(attributes.get(_RTA_TABLE)) or table, flags,
        _number(attributes.get(_RTA_OIF)),
        _address(attributes.get(_RTA_PREFSRC)),
        tuple(_gateways(attributes)), _RTA_MULTIPATH in attributes)


def _own(data: bytes, start: int, end: int) -> Address:
    ifindex = _ADDRESS.unpack_from(data, start)[4]
    attributes = _attributes(data, start + _ADDRESS.size, end)
    return Address(ifindex, ipaddress.ip_address(
        attributes.get(_IFA_LOCAL) or attributes[_IFA_ADDRESS]))


def _neighbour(data: bytes, start: int, end: int) -> Neighbour:
    _, ifindex, state, _, _ = _NEIGHBOUR.unpack_from(data, start)
    attributes = _attributes(data, start + _NEIGHBOUR.size, end)
    protocol = attributes.get(_NDA_PROTOCOL)
    return Neighbour(
        _address(attributes.get(_NDA_DST)), ifindex, state,
        attributes.get(_NDA_LLADDR, b'').hex(':'),
        protocol[0] if protocol else None)
