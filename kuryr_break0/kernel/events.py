# SPDX-License-Identifier: Apache-2.0

"""Netlink events of this thread's namespace, and of other namespaces.

With NETLINK_LISTEN_ALL_NSID, one socket receives the events of each namespace
that has a number (nsid) in this namespace. A namespace gets a number when an
interface moves into it, or when :func:`examine_namespace` assigns a number.
The socket also receives an event when a namespace gets or loses a number.

A new name of a namespace causes no netlink event, but is a new mount; see
:func:`open_mounts`. If a namespace has neither number nor name, a new macvlan
in this namespace causes only an event about the parent of the macvlan.
"""

from __future__ import annotations

import dataclasses
from typing import BinaryIO, Optional

from kuryr_break0.kernel import event_socket
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import node
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0 import model

#: Maximum events of other namespaces to read at once. The read of an event
#: takes about 5 us.
MAX_EVENTS = 2048
_LISTEN_ALL_NSID = 8
_ALL = 0xffffffff
# linux/rtnetlink.h: RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE,
# _IPV6_IFADDR, _IPV6_ROUTE, and RTNLGRP_NEXTHOP as a bit
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 31
# RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, and RTNLGRP_NSID as a bit
_GROUPS_OF_ALL = 0x1 | 0x10 | 0x100 | 1 << 27
#: Kinds of events by message type. Each key is the type of an addition. The
#: type of the deletion is the key plus 1.
_KINDS = {wire.RTM_NEWLINK: 'link', wire.RTM_NEWADDR: 'address',
          wire.RTM_NEWROUTE: 'route', wire.RTM_NEWNEXTHOP: 'nexthop',
          wire.RTM_NEWNEIGH: 'neighbour'}


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of the node's network.

    :ivar kind: ``link``, ``address``, ``route``, ``nexthop`` or ``neighbour``.
        ``lost`` if the socket overflowed or an event could not be parsed. Then
        any object may have changed
    :ivar is_gone: whether the object was deleted
    :ivar ifindex: ifindex of the changed interface, or of the interface of
        the changed object
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
        """Return the pending events."""
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


@dataclasses.dataclass
class Changes:
    """The changes since the previous read.

    :ivar changed: numbers of namespaces in which something changed
    :ivar ended: numbers of namespaces that no longer exist
    :ivar numbered: numbers that were newly assigned to namespaces
    :ivar interfaces: whether an interface of this thread's namespace was
        created or changed
    :ivar is_stacked: whether an interface of this thread's namespace may have
        become, or ceased to be, the parent of a macvlan in another namespace
    :ivar lost: whether events were dropped
    :ivar messages: number of messages read
    """

    changed: set[int] = dataclasses.field(default_factory=set)
    ended: set[int] = dataclasses.field(default_factory=set)
    numbered: set[int] = dataclasses.field(default_factory=set)
    interfaces: bool = False
    is_stacked: bool = False
    lost: bool = False
    messages: int = 0


class NamespaceEvents(event_socket.EventSocket):
    """Receives the changes of all namespaces that have a number.

    A container can cause more events than this process can read. If MAX_EVENTS
    or more events are pending, :meth:`get` drops the rest, and reports a loss.
    """

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_ROUTE, _GROUPS_OF_ALL,
                         _LISTEN_ALL_NSID)

    def get(self) -> Changes:
        """Return the pending changes."""
        changes, made = Changes(), False
        for data, extra in self._receive(MAX_EVENTS):
            changes.messages += 1
            if not data:
                changes.lost = True
                break
            number = next((netlink.S32.unpack_from(value)[0]
                           for level, kind, value in extra if (level, kind)
                           == (netlink.SOL_NETLINK, _LISTEN_ALL_NSID)), None)
            if number is not None:
                changes.changed.add(number)
                continue
            for message in netlink.messages(data):
                if message.kind == wire.RTM_NEWLINK:
                    changes.interfaces = True
                    # For a change in stacking, rtnetlink_event() sends an
                    # event with no changed flags. For a new interface,
                    # rtnl_configure_link() sends an event with all flags.
                    flags = wire.changed_flags(message.body)
                    changes.is_stacked |= flags == 0
                    made |= flags == _ALL
                elif message.kind == wire.RTM_DELLINK:
                    made = True
                elif message.kind == wire.RTM_NEWNSID:
                    changes.numbered.add(wire.parse(message))
                elif message.kind == wire.RTM_DELNSID:
                    changes.ended.add(wire.parse(message))
        if changes.lost or changes.messages == MAX_EVENTS:
            changes.lost = True
            self._drop()
        changes.is_stacked &= not made
        return changes


def open_mounts() -> BinaryIO:
    """Open a file that reports changes of this process's mounts.

    select(2) reports a change as an exceptional condition (proc(5)).
    """
    return open(node.MOUNTS, 'rb')
