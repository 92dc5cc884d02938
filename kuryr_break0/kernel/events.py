# SPDX-License-Identifier: Apache-2.0

"""Netlink events of this thread's namespace, and of other namespaces.

With NETLINK_LISTEN_ALL_NSID, one socket receives the events of every namespace
to which this namespace has assigned a number (nsid). The kernel assigns a
number to a namespace when an interface moves into it. The function
:func:`kuryr_break0.kernel.search.examine_namespace` also assigns one. The
socket also receives an event when a number is assigned or removed. A new name
of a namespace is a new mount. If a macvlan is created in a namespace that has
neither number nor name, the only event is about the parent of the macvlan.
"""

from __future__ import annotations

import dataclasses
from typing import BinaryIO, NamedTuple, Optional

from kuryr_break0.kernel import event_socket
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import node
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0 import model

#: Maximum events of other namespaces to read at once; each takes about 5 us.
MAX_EVENTS = 2048
_LISTEN_ALL_NSID = 8
_ALL = 0xffffffff
# linux/rtnetlink.h: RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE,
# _IPV6_IFADDR, _IPV6_ROUTE, and RTNLGRP_NEXTHOP as a bit
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 31
# RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, and RTNLGRP_NSID as a bit
_GROUPS_OF_ALL = 0x1 | 0x10 | 0x100 | 1 << 27
#: Kinds of events, by the message type of an addition. A deletion has the next
#: number.
_KINDS = {wire.RTM_NEWLINK: 'link', wire.RTM_NEWADDR: 'address',
          wire.RTM_NEWROUTE: 'route', wire.RTM_NEWNEXTHOP: 'nexthop',
          wire.RTM_NEWNEIGH: 'neighbour'}


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of the node's network.

    :ivar kind: ``link``, ``address``, ``route``, ``nexthop`` or ``neighbour``.
        ``lost`` if the socket overflowed or an event could not be parsed, so
        any object may have changed
    :ivar is_gone: whether the object was deleted
    :ivar ifindex: ifindex of the interface, or of the object's interface
    :ivar link: the new state of an interface
    :ivar dst: the address of an interface or a neighbour, or the destination
        of a route to a single address
    :ivar item: a route to a single address, or a permanent neighbour
    :ivar next_hops: next hops of a route or nexthop object
    """

    kind: str
    is_gone: bool = False
    ifindex: Optional[int] = None
    link: Optional[values.Link] = None
    dst: Optional[model.IPAddress] = None
    item: Optional[model.Entry] = None
    next_hops: tuple[values.NextHop, ...] = ()


class Events(event_socket.EventSocket):
    """Receives the changes of the calling thread's namespace."""

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_ROUTE, _GROUPS)

    def get(self) -> list[Event]:
        """Return the pending events; an empty list if there are none."""
        events: list[Event] = []
        for data, _ in self._receive():
            try:
                events += [_event(message)
                           for message in netlink.messages(data)
                           if message.kind & ~1 in _KINDS]
            except OSError:  # EBADMSG
                data = b''
            if not data:
                events.append(Event('lost'))
        return events


def _event(message: netlink.Received) -> Event:
    kind, is_gone = _KINDS[message.kind & ~1], bool(message.kind & 1)
    value = wire.parse(message)
    if isinstance(value, values.Link):
        return Event(kind, is_gone, value.index, value)
    if isinstance(value, values.Route):
        host = value.host_route
        return Event(kind, is_gone, value.oif, dst=host.dst if host else None,
                     item=host, next_hops=value.next_hops)
    if isinstance(value, values.NeighbourState):
        return Event(kind, is_gone, value.ifindex, dst=value.dst,
                     item=value.permanent)
    if isinstance(value, values.AddressState):
        return Event(kind, is_gone, value.ifindex, dst=value.address)
    return Event(kind, is_gone, next_hops=value or ())


class Changes(NamedTuple):
    """The changes since the previous read.

    :ivar changed: numbers of namespaces in which something changed
    :ivar ended: numbers of namespaces that no longer exist
    :ivar numbered: numbers that were newly assigned to namespaces
    :ivar interfaces: whether an interface of this thread's namespace was
        created or changed
    :ivar is_stacked: whether the creation or deletion of a macvlan in another
        namespace may have caused an event for the parent of the macvlan
    :ivar lost: whether events were dropped
    :ivar messages: number of messages read
    """

    changed: set[int]
    ended: set[int]
    numbered: set[int]
    interfaces: bool
    is_stacked: bool
    lost: bool
    messages: int


class NamespaceEvents(event_socket.EventSocket):
    """Receives the changes of all namespaces that have a number.

    A container can cause more events than this process can read. Excess
    events are dropped, because they would only name the same namespaces again.
    """

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_ROUTE, _GROUPS_OF_ALL,
                         _LISTEN_ALL_NSID)

    def get(self) -> Changes:
        """Return the pending changes; empty if there are none."""
        changed: set[int] = set()
        ended: set[int] = set()
        numbered: set[int] = set()
        interfaces = stacked = made = lost = False
        count = 0
        for count, (data, extra) in enumerate(self._receive(MAX_EVENTS), 1):
            if not data:
                lost = True
                break
            number = next((netlink.S32.unpack_from(value)[0]
                           for level, kind, value in extra if (level, kind)
                           == (netlink.SOL_NETLINK, _LISTEN_ALL_NSID)), None)
            if number is not None:
                changed.add(number)
                continue
            for message in netlink.messages(data):
                if message.kind == wire.RTM_NEWLINK:
                    interfaces = True
                    # For a change in stacking, rtnetlink_event() sends an
                    # event with no changed flags. For a new interface,
                    # rtnl_configure_link() sends an event with all flags.
                    flags = wire.changed_flags(message.body)
                    stacked |= flags == 0
                    made |= flags == _ALL
                elif message.kind == wire.RTM_DELLINK:
                    made = True
                elif message.kind == wire.RTM_NEWNSID:
                    numbered.add(wire.parse(message))
                elif message.kind == wire.RTM_DELNSID:
                    ended.add(wire.parse(message))
        if lost or count == MAX_EVENTS:
            lost = True
            self._drop()
        return Changes(changed, ended, numbered, interfaces,
                       stacked and not made, lost, count)


def open_mounts() -> BinaryIO:
    """Open a file that reports changes of this process's mounts.

    select(2) reports a change as an exceptional condition (proc(5)).
    """
    return open(node.MOUNTS, 'rb')
