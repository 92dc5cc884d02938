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

"""break0 and the addresses behind it, as they are now."""

from __future__ import annotations

import dataclasses
from typing import Optional

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Peer
from kuryr_break0 import netlink
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour
from kuryr_break0.policy import Look
from kuryr_break0.policy import Policy


#: Seconds to wait for a bind or unbind to end.
_PATIENCE = 1


@dataclasses.dataclass(frozen=True)
class AddressStatus:
    """An address that a pod of this node has, or that has a route.

    :ivar entry: None for a route or neighbour of no recorded sandbox
    :ivar route: what is there
    :ivar neighbour: what is there
    :ivar problem: what is not as it should be; None if nothing
    """

    address: IPAddress
    entry: Optional[Entry]
    route: Optional[HostRoute]
    neighbour: Optional[Neighbour]
    problem: Optional[str]


@dataclasses.dataclass(frozen=True)
class Status:
    """What a look at the node has found.

    :ivar link: None if there is no such interface
    :ivar peer: what pods are to know of the node; None without break0
    :ivar foreign: routes of others to addresses of pods
    :ivar unreadable: addresses whose entry in the ledger cannot be read
    """

    link: Optional[netlink.Link]
    link_addresses: tuple[IPAddress, ...]
    peer: Optional[Peer]
    addresses: tuple[AddressStatus, ...]
    foreign: tuple[HostRoute, ...]
    unreadable: frozenset[IPAddress]

    @property
    def in_sync(self) -> bool:
        return (not any(address.problem for address in self.addresses)
                and (self.link is None or self.link.up))


def read(options: config.Options) -> Status:
    """Look at break0, ledger, routes and neighbours; changes nothing.

    :raises Break0Error: if any of them cannot be read
    """
    policy = Policy(options)
    ledger = Ledger(options.state_dir, options.lock_timeout)
    with netlink.Kernel() as kernel:
        (entries, unreadable), look, _ = ledger.beside(
            ledger.read, lambda: Look(kernel, kernel.link(options.device)),
            _PATIENCE)
    live = {entry.address: entry for entry in entries}
    desired, refused = policy.desired(look, live)
    plan = policy.plan(look, desired)
    peer = policy.peer_seen(look, live, desired)
    problems = {address: 'it is ' + reason
                for address, reason in refused.items()}
    for neighbour in plan.learn:
        problems[neighbour.dst] = 'its neighbour entry is ' + (
            'wrong' if neighbour.dst in look.neighbours else 'missing')
    for route in plan.replace:
        problems[route.dst] = 'its route is ' + (
            'wrong' if route.dst in look.on_break0 else 'missing')
    for route in plan.foreign:
        problems[route.dst] = (
            'it has a route of others, on %s with protocol %s' %
            (netlink.name_of(route.oif), route.protocol))
    unclaimed: list[Item] = [*plan.forget, *plan.delete]
    for item in unclaimed:
        problems[item.dst] = 'no pod claims it'
    for entry in entries:
        if entry.sandbox_gone:
            problems[entry.address] = 'its sandbox is gone'
        elif entry.netns is not None and entry.peer != peer:
            problems.setdefault(entry.address, 'its pod has not been told '
                                'how to reach the node')
    for address in unreadable:
        problems[address] = 'its entry in the ledger cannot be read'
    return Status(
        look.link, look.addresses_of(look.index), peer,
        tuple(AddressStatus(address, live.get(address),
                            look.on_break0.get(address),
                            look.neighbours.get(address),
                            problems.get(address))
              for address in sorted(
                  live.keys() | problems.keys(),
                  key=lambda address: (address.version, int(address)))),
        plan.foreign, frozenset(unreadable))
