# SPDX-License-Identifier: Apache-2.0

"""What the kernel has: interfaces, addresses, routes, neighbours."""

from __future__ import annotations

import dataclasses
import enum
import socket
from typing import NamedTuple, Optional

from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour

RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST = 1, 2, 3
NUD_PERMANENT = 0x80
#: Learnt by use, as IPv6's path MTUs are: not a route of the table.
RTM_F_CLONED = 0x200


class Verb(enum.Enum):
    """What to do with a route or a neighbour.

    ADD fails where there is one, REPLACE puts it in its place; DELETE is of
    the route with this interface, protocol and table, or of the neighbour,
    whatever its MAC address.
    """

    ADD = 'add'
    REPLACE = 'set'
    DELETE = 'delete'


Change = tuple[Verb, Entry]


class Vrf(NamedTuple):
    """A VRF that an interface is in, and the number of its routing table."""

    ifindex: int
    table: int


@dataclasses.dataclass(frozen=True)
class Link:
    """A network interface as the kernel reports it.

    :ivar kind: None for a physical one
    :ivar mode: of a macvlan or macvtap
    :ivar lower: ifindex of the interface that it is stacked on
    :ivar lower_namespace: the number that this namespace has for the one in
        which ``lower`` counts; None if that is this one
    :ivar alias: free text that somebody gave it
    :ivar group: a number that somebody gave it; 0 is the default
    :ivar carrier: whether it is up and the link below it works
    :ivar vrf: None if it is in none
    :ivar port_of: ifindex of the bridge, bond or team that takes what it
        receives; None if none does
    :ivar ethernet: whether it has MAC addresses
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
    port_of: Optional[int]
    ethernet: bool

    @property
    def described(self) -> str:
        """Return what it is, in words."""
        return 'a %s%s' % (self.kind or 'physical interface',
                           ' in %s mode' % self.mode if self.mode else '')

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
    :ivar altered: whether it changes packets, by an MTU or an encapsulation
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
    altered: bool

    @property
    def host_route(self) -> Optional[HostRoute]:
        """Return it as a route to a single address, if it is one."""
        if (self.dst is None or self.dst_len != self.dst.max_prefixlen
                or self.type == RTN_LOCAL or self.flags & RTM_F_CLONED):
            return None
        return HostRoute(
            self.dst, self.oif, self.protocol, self.table, self.src,
            self.metric,
            direct=self.is_on_link and not self.altered and (
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


class AddressState(NamedTuple):
    """An :class:`InterfaceAddress`, with its flags: the low eight."""

    ifindex: int
    address: IPAddress
    flags: int


class NeighbourState(NamedTuple):
    """A neighbour in any state; its protocol is None if nobody marked it."""

    dst: Optional[IPAddress]
    ifindex: int
    state: int
    mac: str
    protocol: Optional[int]

    @property
    def permanent(self) -> Optional[Neighbour]:
        """Return it as a permanent neighbour, if it is one."""
        if self.dst is None or not self.state & NUD_PERMANENT:
            return None
        return Neighbour(self.dst, self.ifindex, self.mac, self.protocol)
