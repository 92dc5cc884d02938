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

"""The messages that change routes and neighbours."""

from __future__ import annotations

import enum
import ipaddress
from typing import Any, Sequence

from pyroute2 import netlink
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl import ndmsg
from pyroute2.netlink.rtnl import rtmsg

from kuryr_break0.config import IPAddress
from kuryr_break0.netlink.node import family_of
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour

# linux/rtnetlink.h
RT_SCOPE_LINK = 253
#: A wildcard in a deletion; with the default, universe, a route that is
#: scoped to the link would not be found.
RT_SCOPE_NOWHERE = 255
#: What stands in the header for a table whose number is too large for it.
RT_TABLE_COMPAT = 252
RT_TABLE_MAIN = 254
RTN_UNICAST = 1


class Verb(enum.Enum):
    """What to do with a route or a neighbour.

    ADD fails where there is one, REPLACE puts it in its place; DELETE is of
    the route with this interface, protocol and table, or of the neighbour,
    whatever its MAC address.
    """

    ADD = 'add'
    REPLACE = 'set'
    DELETE = 'delete'


Change = tuple[Verb, Item]

_FLAGS = {Verb.ADD: netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
          Verb.REPLACE: netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
          Verb.DELETE: 0}


def _as_bytes(nla_map: Sequence[Any], *names: str) -> tuple[Any, ...]:
    """Let some attributes be given as the bytes that are sent.

    Texts would be made of addresses only to be read again.
    """
    return tuple((each[0], 'cdata') if each[0] in names else each
                 for each in nla_map)


# Not derived from pyroute2's, since what that compiles of a class would be
# inherited. It looks up their fields again and again, by a __getitem__ that
# serves other messages and takes a fifth of the time.
class RouteMessage(rtmsg.rtmsg_base, netlink.nlmsg):  # type: ignore[misc]
    """pyroute2's, with addresses as bytes."""

    __slots__ = ()
    prefix = rtmsg.rtmsg.prefix
    nla_map = _as_bytes(rtmsg.rtmsg_base.nla_map, 'RTA_DST', 'RTA_PREFSRC')
    __getitem__: Any = dict.__getitem__


class NeighbourMessage(netlink.nlmsg):  # type: ignore[misc]
    """pyroute2's, with addresses as bytes, and NDA_PROTOCOL (linux 5.0)."""

    __slots__ = ()
    prefix = ndmsg.ndmsg.prefix
    fields = ndmsg.ndmsg.fields
    nla_map = (*_as_bytes(ndmsg.ndmsg.nla_map, 'NDA_DST', 'NDA_LLADDR'),
               ('NDA_PROTOCOL', 'uint8'))
    cacheinfo = ndmsg.ndmsg.cacheinfo
    __getitem__: Any = dict.__getitem__


def change(verb: Verb, what: Item) -> Any:
    """Make the message that sets or deletes a route or a neighbour.

    It is twice as fast as by pyroute2's own ``IPRoute.route()``, most of
    which looks at its arguments.
    """
    if isinstance(what, HostRoute):
        message = _route(verb, what)
        kinds = rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE
    else:
        message = neighbour(what.ifindex, what.dst)
        if verb is not Verb.DELETE:
            message['state'] = ndmsg.NUD_PERMANENT
            message['attrs'] += [
                ('NDA_LLADDR', bytes.fromhex(what.mac.replace(':', ''))),
                ('NDA_PROTOCOL', what.protocol)]
        kinds = rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH
    message['header']['type'] = kinds[verb is Verb.DELETE]
    message['header']['flags'] = netlink.NLM_F_REQUEST | _FLAGS[verb]
    return message


def _route(verb: Verb, what: HostRoute) -> Any:
    message = RouteMessage()
    message['family'] = family_of(what.dst)
    message['dst_len'] = what.dst.max_prefixlen
    message['table'] = what.table if what.table < 256 else RT_TABLE_COMPAT
    message['proto'] = what.protocol
    message['scope'] = (RT_SCOPE_NOWHERE if verb is Verb.DELETE
                        else RT_SCOPE_LINK)
    message['type'] = RTN_UNICAST
    message['attrs'] = [('RTA_DST', what.dst.packed), ('RTA_OIF', what.oif)]
    if what.table >= 256:
        message['attrs'].append(('RTA_TABLE', what.table))
    if what.src is not None:
        message['attrs'].append(('RTA_PREFSRC', what.src.packed))
    return message


def neighbour(ifindex: int, dst: IPAddress) -> Any:
    """Make a message about a neighbour."""
    message = NeighbourMessage()
    message['ifindex'] = ifindex
    message['family'] = family_of(dst)
    message['attrs'] = [('NDA_DST', dst.packed)]
    return message


def dispose(message: Any) -> None:
    """Let nothing of a message that was encoded refer to itself.

    Else it is garbage to be looked for, which takes a tenth of the time of
    a sync.
    """
    for part in (message, *(slot.cell[1] for slot in message['attrs'])):
        part.chain.clear()


def prepare() -> None:
    """Let pyroute2 compile the messages, as it does at the first use."""
    address = ipaddress.ip_address('192.0.2.1')
    for what in (HostRoute(address, 1, 0, RT_TABLE_MAIN, address),
                 Neighbour(address, 1, '02:00:00:00:00:00', 0)):
        change(Verb.ADD, what).encode()
