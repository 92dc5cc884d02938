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

"""What has to change so that the kernel's routes are those of the ledger."""

from __future__ import annotations

import dataclasses
from typing import Collection, Iterable, Mapping, Optional

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
class Plan:
    """The difference, in the order in which to apply it.

    :ivar replace: routes to set, in place of what is there
    :ivar delete: our routes that no pod claims
    :ivar foreign: routes of others to addresses of pods. Not touched, or,
        where they are taken over, what is replaced
    """

    replace: tuple[HostRoute, ...] = ()
    delete: tuple[HostRoute, ...] = ()
    foreign: tuple[HostRoute, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.replace or self.delete)


def compute(desired: Mapping[IPAddress, HostRoute],
            actual: Iterable[HostRoute], *, device: int, protocol: int,
            takeover: bool = False,
            keep: Collection[IPAddress] = ()) -> Plan:
    """Compare what should be with what is.

    What is on break0, or carries our protocol number, was put there for a
    pod, so in the way of a pod's route it is replaced. All else belongs to
    others. What no pod claims is deleted only if it is both.

    :param desired: the routes of the pods, by their address
    :param actual: the host routes of the node
    :param device: ifindex of break0
    :param keep: addresses whose routes are not to be deleted yet
    """
    present: set[IPAddress] = set()
    blocked: set[IPAddress] = set()
    delete, foreign = [], []
    for route in actual:
        wanted = desired.get(route.dst)
        ours = route.oif == device and route.protocol == protocol
        if wanted is not None and route.table == wanted.table:
            if route == wanted:
                present.add(route.dst)
            elif route.oif != device and route.protocol != protocol:
                foreign.append(route)
                if not takeover:
                    blocked.add(route.dst)
        elif ours and route.dst not in keep:
            delete.append(route)
    return Plan(
        replace=tuple(wanted for dst, wanted in sorted(
            desired.items(), key=_by_address)
            if dst not in present and dst not in blocked),
        delete=tuple(sorted(delete, key=_order)),
        foreign=tuple(sorted(foreign, key=_order)))


def _by_address(item: tuple[IPAddress, HostRoute]) -> tuple[int, int]:
    return item[0].version, int(item[0])


def _order(route: HostRoute) -> tuple[int, ...]:
    return (route.dst.version, int(route.dst), route.table, route.protocol,
            route.oif or 0)
