# SPDX-License-Identifier: Apache-2.0

"""Netlink events of the namespace of this thread."""

from __future__ import annotations

import dataclasses
import socket
from typing import Optional

from kuryr_break0.kernel import wire
from kuryr_break0.model import IPAddress

# linux/rtnetlink.h: RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE,
# _IPV6_IFADDR, _IPV6_ROUTE, and RTNLGRP_NEXTHOP as a bit
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 31
_KINDS = {wire.RTM_NEWLINK: ('link', False), wire.RTM_DELLINK: ('link', True),
          wire.RTM_NEWADDR: ('address', False),
          wire.RTM_DELADDR: ('address', True),
          wire.RTM_NEWROUTE: ('route', False),
          wire.RTM_DELROUTE: ('route', True),
          wire.RTM_NEWNEXTHOP: ('nexthop', False),
          wire.RTM_DELNEXTHOP: ('nexthop', True),
          wire.RTM_NEWNEIGH: ('neighbour', False),
          wire.RTM_DELNEIGH: ('neighbour', True)}
#: Datagrams that are read at once. Each has one message.
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of the node's network.

    :ivar what: ``link``, ``address``, ``route``, ``nexthop``, ``neighbour``;
        or ``lost``, when there were more than the socket could hold, or one
        cannot be read, so that anything may have changed
    :ivar gone: whether it is something that is there no more
    :ivar ifindex: of a link, or of that of the others
    :ivar link: of a link, what it is now
    :ivar dst: of a neighbour or an address, or of a route to a single one
    :ivar protocol: of a route or neighbour
    :ivar next_hops: of a route or nexthop object
    """

    what: str
    gone: bool = False
    ifindex: Optional[int] = None
    link: Optional[wire.Link] = None
    dst: Optional[IPAddress] = None
    protocol: Optional[int] = None
    next_hops: tuple[wire.NextHop, ...] = ()


class Events:
    """Receives changes in the namespace of the calling thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)  # NETLINK_ROUTE
        self._socket.bind((0, _GROUPS))

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For select(2): readable when there is something to :meth:`get`."""
        return self._socket.fileno()

    def get(self) -> list[Event]:
        """Return what has come; nothing if nothing has."""
        events: list[Event] = []
        for _ in range(_AT_ONCE):
            try:
                data = self._socket.recv(2 ** 16)
                events += [_event(data, header)
                           for header in wire.headers(data)
                           if header.kind in _KINDS]
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS, EBADMSG
                events.append(Event('lost'))
        return events


def _event(data: bytes, header: wire.Header) -> Event:
    what, gone = _KINDS[header.kind]
    found = wire.parse(data, header)
    if isinstance(found, wire.Link):
        return Event(what, gone, found.index, found)
    if isinstance(found, wire.Route):
        host = found.host_route
        return Event(what, gone, found.oif, dst=host.dst if host else None,
                     protocol=found.protocol, next_hops=found.next_hops)
    if isinstance(found, wire.NeighbourState):
        return Event(what, gone, found.ifindex, dst=found.dst,
                     protocol=found.protocol)
    if isinstance(found, wire.InterfaceAddress):
        return Event(what, gone, found.ifindex, dst=found.address)
    return Event(what, gone, next_hops=found)
