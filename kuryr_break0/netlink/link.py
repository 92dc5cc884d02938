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

"""A network interface."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from pyroute2.netlink.rtnl import ifinfmsg

from kuryr_break0.netlink.node import name_of


@dataclasses.dataclass(frozen=True)
class Link:
    """A network interface as the kernel reports it.

    :ivar kind: None for a physical one
    :ivar mode: of a macvlan
    :ivar lower: ifindex of the interface that it is stacked on
    :ivar lower_elsewhere: whether that one is in another namespace, where
        its ifindex counts
    """

    name: str
    index: int
    kind: Optional[str]
    mode: Optional[str]
    lower: Optional[int]
    lower_elsewhere: bool
    mtu: int
    mac: str
    multicast: bool
    up: bool
    loopback: bool

    @property
    def lower_name(self) -> Optional[str]:
        """The name of ``lower``; None if there is none in this namespace."""
        if self.lower is None or self.lower_elsewhere:
            return None
        return name_of(self.lower)

    @property
    def lower_of_macvlans(self) -> tuple[Optional[int], bool]:
        """What a macvlan on it has as ``lower`` and ``lower_elsewhere``.

        The kernel puts a macvlan of a macvlan beside that, on the lower
        interface of both (macvlan_common_newlink).
        """
        if self.kind == 'macvlan':
            return self.lower, self.lower_elsewhere
        return self.index, False


def parse(message: Any) -> Link:
    """Read what pyroute2 has made of the kernel's message."""
    info = message.get_attr('IFLA_LINKINFO')
    data = info.get_attr('IFLA_INFO_DATA') if info else None
    kind = info.get_attr('IFLA_INFO_KIND') if info else None
    return Link(
        name=message.get_attr('IFLA_IFNAME'),
        index=message['index'],
        kind=kind,
        mode=(data.get_attr('IFLA_MACVLAN_MODE')
              if data and kind == 'macvlan' else None),
        lower=message.get_attr('IFLA_LINK'),
        lower_elsewhere=message.get_attr('IFLA_LINK_NETNSID') is not None,
        mtu=message.get_attr('IFLA_MTU'),
        mac=message.get_attr('IFLA_ADDRESS') or '',
        multicast=bool(message['flags'] & ifinfmsg.IFF_MULTICAST),
        up=bool(message['flags'] & ifinfmsg.IFF_UP),
        loopback=bool(message['flags'] & ifinfmsg.IFF_LOOPBACK))
