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

"""What the kernel tells of the namespace of this thread."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import pyroute2
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.netlink import rtnl

from kuryr_break0.config import IPAddress
from kuryr_break0.netlink.node import as_address


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
        dst = (message.get_attr('RTA_DST')
               if message['dst_len'] in (32, 128) else None)
        return Event('route', gone, message.get_attr('RTA_OIF'),
                     dst=as_address(dst), protocol=message['proto'])
    if name.endswith('NEIGH'):
        return Event('neighbour', gone, message['ifindex'],
                     dst=as_address(message.get_attr('NDA_DST')))
    return None
