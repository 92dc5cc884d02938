# SPDX-License-Identifier: Apache-2.0

"""Events of the namespace of this thread, and of the others of the node.

The kernel gives the events of all namespaces that this one has a number for
to one socket (NETLINK_LISTEN_ALL_NSID), and says when a number begins and
ends. A namespace gets one when an interface moves into it, or by
:func:`number`. That it has got a name is seen as a change of the mounts; of a
macvlan that is made in one without either, the parent is all that has events.
"""

from __future__ import annotations

import dataclasses
from typing import BinaryIO, NamedTuple, Optional

from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import node
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item

_LISTEN_ALL_NSID = 8
# linux/rtnetlink.h: RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE,
# _IPV6_IFADDR, _IPV6_ROUTE, and RTNLGRP_NEXTHOP as a bit
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 31
# RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, and RTNLGRP_NSID as a bit
_GROUPS_OF_ALL = 0x1 | 0x10 | 0x100 | 1 << 27
#: By the kind of what is new; what is gone has the next number.
_KINDS = {wire.RTM_NEWLINK: 'link', wire.RTM_NEWADDR: 'address',
          wire.RTM_NEWROUTE: 'route', wire.RTM_NEWNEXTHOP: 'nexthop',
          wire.RTM_NEWNEIGH: 'neighbour'}


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
    :ivar item: a route to a single address, or a permanent neighbour
    :ivar next_hops: of a route or nexthop object
    """

    what: str
    gone: bool = False
    ifindex: Optional[int] = None
    link: Optional[values.Link] = None
    dst: Optional[IPAddress] = None
    item: Optional[Item] = None
    next_hops: tuple[values.NextHop, ...] = ()


class Events(netlink.EventSocket):
    """Receives changes in the namespace of the calling thread."""

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_ROUTE, _GROUPS)

    def get(self) -> list[Event]:
        """Return what has come; nothing if nothing has."""
        events: list[Event] = []
        for data, _ in self._received():
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
    what, gone = _KINDS[message.kind & ~1], bool(message.kind & 1)
    found = wire.parse(message)
    if isinstance(found, values.Link):
        return Event(what, gone, found.index, found)
    if isinstance(found, values.Route):
        host = found.host_route
        return Event(what, gone, found.oif, dst=host.dst if host else None,
                     item=host, next_hops=found.next_hops)
    if isinstance(found, values.NeighbourState):
        return Event(what, gone, found.ifindex, dst=found.dst,
                     item=found.permanent)
    if isinstance(found, values.AddressState):
        return Event(what, gone, found.ifindex, dst=found.address)
    return Event(what, gone, next_hops=found or ())


class Changes(NamedTuple):
    """What has happened since it was asked for last.

    :ivar changed: numbers of namespaces in which something changed
    :ivar ended: numbers of namespaces that are no more
    :ivar is_new: whether there may be namespaces that are not known
    :ivar lost: whether there was more than the socket could hold
    :ivar messages: how many were read
    """

    changed: set[int]
    ended: set[int]
    is_new: bool
    lost: bool
    messages: int


class NamespaceEvents(netlink.EventSocket):
    """Receives changes of all numbered namespaces."""

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_ROUTE, _GROUPS_OF_ALL,
                         _LISTEN_ALL_NSID)

    def get(self) -> Changes:
        """Return what has come; nothing if nothing has."""
        changed: set[int] = set()
        ended: set[int] = set()
        is_new = lost = False
        count = 0
        for count, (data, extra) in enumerate(self._received(), 1):
            lost |= not data
            number = next((netlink.S32.unpack_from(value)[0]
                           for level, kind, value in extra if (level, kind)
                           == (netlink.SOL_NETLINK, _LISTEN_ALL_NSID)), None)
            if number is not None:
                changed.add(number)
                continue
            for message in netlink.messages(data):
                is_new |= message.kind in (wire.RTM_NEWNSID,
                                           wire.RTM_NEWLINK)
                if message.kind == wire.RTM_DELNSID:
                    ended.add(wire.parse(message))
        return Changes(changed, ended, is_new, lost, count)


def open_mounts() -> BinaryIO:
    """Open a file that notices changes of the mounts of this process.

    For select(2), a change is an exceptional condition (proc(5)).
    """
    return open(node.MOUNTS, 'rb')


def number(found: namespaces.Found) -> int:
    """Return the number that this namespace has for another one.

    It gets one if it has none, and keeps it until it ends.
    """
    with namespaces.opened(found.path, found.namespace) as fd, \
            Netlink() as own:
        present = own.namespace_number(fd)
        if present >= 0:
            return present
        own.number_namespace(fd)
        return own.namespace_number(fd)
