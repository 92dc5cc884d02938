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

"""What has to change so that the kernel holds what the ledger says."""

from __future__ import annotations

import dataclasses
from typing import Collection, Iterable, Mapping, Optional, Union

from kuryr_break0.config import IPAddress


@dataclasses.dataclass(frozen=True)
class HostRoute:
    """A route to a single address: /32, for IPv6 /128.

    :ivar oif: ifindex of its interface; None for one without, or several
    :ivar src: the node's address that it speaks from
    :ivar direct: whether it leads to a neighbour on that interface: unicast,
        without gateway and, for IPv4, scoped to the link
    """

    dst: IPAddress
    oif: Optional[int]
    protocol: int
    table: int
    src: Optional[IPAddress] = None
    direct: bool = True


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """The MAC address of an address on an interface, set for good.

    :ivar protocol: whose it is, as of a route; None for one that no program
        has marked
    """

    dst: IPAddress
    ifindex: int
    mac: str
    protocol: Optional[int]


Item = Union[HostRoute, Neighbour]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a pod's address is to have on the node.

    :ivar neighbour: None where it is found by ARP
    """

    route: HostRoute
    neighbour: Optional[Neighbour] = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The difference. Neighbours are set before routes, and go after them.

    :ivar replace: routes to set, in place of what is there
    :ivar delete: our routes that no pod claims
    :ivar foreign: routes of others to addresses of pods. Not touched, or,
        where they are taken over, what is replaced
    :ivar learn: neighbours to set, in place of what is there
    :ivar forget: our neighbours that no pod claims
    """

    replace: tuple[HostRoute, ...] = ()
    delete: tuple[HostRoute, ...] = ()
    foreign: tuple[HostRoute, ...] = ()
    learn: tuple[Neighbour, ...] = ()
    forget: tuple[Neighbour, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.replace or self.delete or self.learn or self.forget)


def compute(desired: Mapping[IPAddress, Wanted],
            routes: Iterable[HostRoute], neighbours: Iterable[Neighbour] = (),
            *, device: int, protocol: int, takeover: bool = False,
            keep: Collection[IPAddress] = ()) -> Plan:
    """Compare what should be with what is.

    A route that is on break0, or carries our protocol number, was put there
    for a pod, so in the way of a pod's route it is replaced. All else
    belongs to others. What no pod claims is deleted only if it is both.

    :param desired: what the addresses of pods are to have
    :param routes: the host routes of the node
    :param neighbours: those that are set for good on break0
    :param device: ifindex of break0
    :param keep: addresses of which nothing is to be deleted yet
    """
    present: set[IPAddress] = set()
    blocked: set[IPAddress] = set()
    delete, foreign, forget = [], [], []
    for route in routes:
        wanted = desired.get(route.dst)
        ours = route.oif == device and route.protocol == protocol
        if wanted is not None and route.table == wanted.route.table:
            if route == wanted.route:
                present.add(route.dst)
            elif route.oif != device and route.protocol != protocol:
                foreign.append(route)
                if not takeover:
                    blocked.add(route.dst)
        elif ours and route.dst not in keep:
            delete.append(route)
    known = set()
    for neighbour in neighbours:
        wanted = desired.get(neighbour.dst)
        if wanted is not None and wanted.neighbour is not None:
            if neighbour == wanted.neighbour:
                known.add(neighbour.dst)
        elif (neighbour.ifindex == device and neighbour.protocol == protocol
                and neighbour.dst not in keep):
            forget.append(neighbour)
    settled = present | blocked
    in_order = [wanted for _, wanted in sorted(desired.items(),
                                               key=_by_address)]
    return Plan(
        replace=tuple(wanted.route for wanted in in_order
                      if wanted.route.dst not in settled),
        delete=tuple(sorted(delete, key=_order)),
        foreign=tuple(sorted(foreign, key=_order)),
        learn=tuple(wanted.neighbour for wanted in in_order
                    if wanted.neighbour is not None
                    and wanted.neighbour.dst not in known),
        forget=tuple(sorted(forget, key=_place)))


def _by_address(item: tuple[IPAddress, Wanted]) -> tuple[int, int]:
    return item[0].version, int(item[0])


def _place(what: Item) -> tuple[int, int]:
    return what.dst.version, int(what.dst)


def _order(route: HostRoute) -> tuple[int, ...]:
    return (*_place(route), route.table, route.protocol, route.oif or 0)
