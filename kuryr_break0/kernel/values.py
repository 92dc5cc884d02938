# SPDX-License-Identifier: Apache-2.0

"""Values that the kernel reports, such as interfaces and routes."""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple, Optional

from kuryr_break0 import model

RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST = 1, 2, 3
NUD_PERMANENT = 0x80
#: Flag of a route that the kernel has added, for example for an IPv6 path MTU.
RTM_F_CLONED = 0x200


class Verb(enum.Enum):
    """A change of a route or a neighbour.

    If the route or neighbour exists, ADD fails, and REPLACE replaces it.
    DELETE deletes a route only if its interface, protocol and table match. It
    deletes a neighbour regardless of the MAC address.
    """

    ADD = 'add'
    REPLACE = 'set'
    DELETE = 'delete'


Change = tuple[Verb, model.Entry]


class Vrf(NamedTuple):
    """A VRF, and the number of its routing table."""

    ifindex: int
    table: int


@dataclasses.dataclass(frozen=True)
class Link:
    """A network interface as the kernel reports it.

    :ivar kind: None for a physical interface
    :ivar mode: mode of a macvlan or macvtap; None for other kinds
    :ivar lower: ifindex of its lower interface, or None
    :ivar lower_namespace: number (nsid) of the namespace that contains the
        lower interface; None if the lower interface is in this namespace
    :ivar alias: its alias (``ip link set alias``)
    :ivar group: its group; 0 is the default
    :ivar carrier: whether it is up and has a carrier (IFF_LOWER_UP)
    :ivar vrf: the VRF that contains it, or None
    :ivar port_of: ifindex of its bridge, bond or team if it is a port, or None
    :ivar ethernet: whether its type is Ethernet (ARPHRD_ETHER)
    :ivar protodown: whether a program has switched its carrier off
        (``ip link set protodown on``)
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
    protodown: bool

    @property
    def description(self) -> str:
        """Return the kind and the mode of the interface, for messages."""
        return 'a %s%s' % (self.kind or 'physical interface',
                           ' in %s mode' % self.mode if self.mode else '')

    @property
    def lower_of_macvlans(self) -> tuple[Optional[int], Optional[int]]:
        """Return ``lower`` and ``lower_namespace`` of macvlans on this link.

        If this link is a macvlan, the kernel creates a new macvlan on its
        lower interface instead (macvlan_common_newlink).
        """
        if self.kind == 'macvlan':
            return self.lower, self.lower_namespace
        return self.index, None


class NextHop(NamedTuple):
    """A gateway, and the ifindex of its interface."""

    gateway: model.IPAddress
    oif: Optional[int]


class Route(NamedTuple):
    """A route.

    :ivar dst: None for a default route
    :ivar next_hops: the next hops with a gateway. If the kernel reports only
        the id of a nexthop object, the tuple is empty (see the sysctl
        net.ipv4.nexthop_compat_mode)
    :ivar is_multipath: whether it has several next hops
    :ivar is_altered: whether it has an encapsulation, or metrics such as an
        MTU
    """

    dst: Optional[model.IPAddress]
    dst_len: int
    type: int
    scope: int
    protocol: int
    table: int
    flags: int
    oif: Optional[int]
    src: Optional[model.IPAddress]
    metric: int
    next_hops: tuple[NextHop, ...]
    is_multipath: bool
    is_altered: bool

    @property
    def host_route(self) -> Optional[model.HostRoute]:
        """Return a host route as a :class:`HostRoute`; else None."""
        if (self.dst is None or self.dst_len != self.dst.max_prefixlen
                or self.type == RTN_LOCAL or self.flags & RTM_F_CLONED):
            return None
        return model.HostRoute(
            self.dst, self.oif, self.protocol, self.table, self.src,
            self.metric,
            direct=self.is_on_link and not self.is_altered and (
                self.dst.version == 6 or self.scope == RT_SCOPE_LINK))

    @property
    def is_on_link(self) -> bool:
        """Return whether it is a unicast route with one hop and no gateway."""
        return (self.type == RTN_UNICAST and not self.next_hops
                and not self.is_multipath)


class InterfaceAddress(NamedTuple):
    """A local address of an interface.

    On a point-to-point interface, ``address`` is the local address, not the
    address of the peer.
    """

    ifindex: int
    address: model.IPAddress


class AddressState(NamedTuple):
    """A local address of an interface, with the lower 8 bits of its flags."""

    ifindex: int
    address: model.IPAddress
    flags: int


class NeighbourState(NamedTuple):
    """A neighbour in any state.

    :ivar protocol: None if no program has set a protocol
    """

    dst: Optional[model.IPAddress]
    ifindex: int
    state: int
    mac: str
    protocol: Optional[int]

    @property
    def permanent(self) -> Optional[model.Neighbour]:
        """Return it as a :class:`Neighbour`; None if it is not permanent."""
        if self.dst is None or not self.state & NUD_PERMANENT:
            return None
        return model.Neighbour(self.dst, self.ifindex, self.mac, self.protocol)
