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

"""What a pod is told of its node, in the pod's network namespace.

A pod that had to ask for the node would be answered by break0 for IPv4 only,
and where the node is outside its subnets it would go by its gateway, a way
that the node with ``rp_filter`` = 1 takes no packets from. So its namespace
gets the MAC address of each address of the node, and a route where needed.
"""

from __future__ import annotations

from typing import Callable, Collection, Iterable, Optional

from kuryr_break0.config import IPAddress
from kuryr_break0.config import IPNetwork
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Peer
from kuryr_break0 import netlink
from kuryr_break0.netlink import Verb
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour

#: The main routing table.
_TABLE = 254


def introduce(netns: str, ifname: str, peer: Peer, *,
              addresses: Collection[IPAddress],
              subnets: Collection[IPNetwork], protocol: int,
              before: Optional[Peer] = None) -> None:
    """Tell a pod how to reach its node.

    May be repeated. The interface has no address yet when Kuryr has just
    made it; neither entry nor route needs one.

    :param addresses: the pod's; of other families it is told nothing
    :param subnets: the networks that it is in on the link
    :param protocol: what marks the routes as ours
    :param before: what it has been told earlier
    :raises NetnsUnusable: if it cannot be entered or has no such interface
    :raises KernelRefused: the first error of its kernel
    """
    versions = {address.version for address in addresses}
    hosts = [host for host in peer.addresses if host.version in versions]
    outdated = [host for host in (before.addresses if before else ())
                if host not in peer.addresses]
    with netlink.entered(netns):
        index = netlink.index_of(ifname)
        if index is None:
            raise exceptions.NetnsUnusable(
                netns=netns, reason='has no interface %s' % ifname)
        with netlink.Kernel() as kernel:
            changes = list(_forgetting(outdated, index, protocol))
            if peer.mac is None and before is not None:
                changes += _unlearning(hosts, index)
            for host in hosts:
                if peer.mac is not None:
                    changes.append((Verb.REPLACE, Neighbour(
                        host, index, peer.mac, protocol)))
                # One by another interface of the pod is as good.
                if not (any(host in subnet for subnet in subnets)
                        or kernel.is_on_link(host)):
                    changes.append((Verb.REPLACE, HostRoute(
                        host, index, protocol, _TABLE)))
            _apply(kernel, changes)


def forget(netns: str, ifname: str, peer: Peer, protocol: int,
           still: Callable[[IPAddress], bool]) -> None:
    """Take back what :func:`introduce` did, if the interface is still there.

    :param still: whether another address of the interface is bound; what
        those of its family are told stays
    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    with netlink.entered(netns):
        index = netlink.index_of(ifname)
        if index is None:
            return
        with netlink.Kernel() as kernel:
            needed = {address.version for at, address in kernel.addresses()
                      if at == index and still(address)}
            _apply(kernel, _forgetting(
                (host for host in peer.addresses
                 if host.version not in needed), index, protocol))


def told(netns: str, ifname: str, protocol: int) -> list[Item]:
    """List what a pod has been told, by the mark that it carries there.

    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: if its kernel cannot be asked
    """
    with netlink.entered(netns):
        index = netlink.index_of(ifname)
        if index is None:
            return []
        with netlink.Kernel() as kernel:
            items: list[Item] = [
                route for route in kernel.routes().host
                if route.oif == index and route.table == _TABLE]
            items += kernel.neighbours(index)
            return [item for item in items if item.protocol == protocol]


def take_back(netns: str, items: Iterable[Item]) -> None:
    """Take away what :func:`told` has listed.

    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    with netlink.entered(netns), netlink.Kernel() as kernel:
        _apply(kernel, ((Verb.DELETE, item) for item in items))


def _forgetting(hosts: Iterable[IPAddress], index: int,
                protocol: int) -> Iterable[netlink.Change]:
    for host in hosts:
        yield Verb.DELETE, HostRoute(host, index, protocol, _TABLE)
        yield from _unlearning([host], index)


def _unlearning(hosts: Iterable[IPAddress],
                index: int) -> Iterable[netlink.Change]:
    for host in hosts:
        yield Verb.DELETE, Neighbour(host, index, '', None)


def _apply(kernel: netlink.Kernel,
           changes: Iterable[netlink.Change]) -> None:
    changes = list(changes)
    if not changes:
        return
    for (verb, _), err in zip(changes, kernel.change(changes)):
        if err is not None and not (verb is Verb.DELETE and err.absent):
            raise err
