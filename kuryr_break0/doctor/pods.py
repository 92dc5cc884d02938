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

"""The other way: whether pods reach their node."""

from __future__ import annotations

import dataclasses
import time
from typing import Iterable, Iterator, Optional, Sequence

from kuryr_break0.config import IPAddress
from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import Node
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Peer
from kuryr_break0 import netlink

#: Pods whose namespaces are entered; each takes some milliseconds. More than
#: the 110 that kubelet allows on a node by default.
ENTERED = 128
#: Seconds within which an ADD or DEL ends that has changed a pod.
_SETTLED = 1.0


@dataclasses.dataclass(frozen=True)
class _Pod:
    """A pod whose namespace was entered.

    :ivar entry: the first of its entries
    :ivar peer: what it has been told of the node
    :ivar hosts: the addresses of the node that are of a family of its own
    :ivar mac: what its interface has
    :ivar macs: what it takes for those of the node's addresses
    :ivar astray: the addresses of the node that it goes to by a gateway
    :ivar error: why it could not be looked at
    """

    entry: Entry
    peer: Peer
    hosts: tuple[IPAddress, ...]
    mac: str = ''
    macs: dict[IPAddress, str] = dataclasses.field(default_factory=dict)
    astray: tuple[IPAddress, ...] = ()
    error: Optional[str] = None

    @property
    def has_another_mac(self) -> bool:
        return self.error is None and self.entry.mac not in (None, self.mac)

    @property
    def mistaken(self) -> tuple[IPAddress, ...]:
        """The addresses of the node whose MAC address it does not know."""
        if self.error is not None or self.peer.mac is None:
            return ()
        return tuple(host for host in self.hosts
                     if self.macs.get(host) != self.peer.mac)

    @property
    def healthy(self) -> bool:
        return not (self.error or self.has_another_mac or self.mistaken
                    or self.astray)


def check_told(node: Node) -> Iterator[Finding]:
    """Look by the ledger for pods that cannot find their node."""
    options = node.options
    entries = [entry for address, entry in node.live.items()
               if address not in node.changing]
    untold = [entry for entry in entries if _untold(node, entry)]
    if untold:
        yield findings.POD_NOT_TOLD.found(
            'pods have not been told the addresses of the node, or others',
            [entry.address for entry in untold])
    if not options.static_neighbours:
        asking = [entry.address for entry in entries
                  if entry.address.version == 6]
        if asking:
            yield findings.IPV6_NOT_TOLD.found(
                'static_neighbours is false, but pods have IPv6 addresses',
                asking)
    yield from _check_arp(node, entries)


def _untold(node: Node, entry: Entry) -> bool:
    if node.peer is None:
        return False
    if entry.netns is not None:
        return entry.peer != node.peer
    # Bound without its namespace, it can ask by ARP.
    return entry.address.version == 6 and node.options.static_neighbours


def _check_arp(node: Node, entries: list[Entry]) -> Iterator[Finding]:
    asking = [entry.address for entry in entries
              if entry.address.version == 4
              and (entry.peer is None or entry.peer.mac is None)]
    if not asking:
        return
    # The larger of all and the interface is what counts.
    for where in ('all', node.options.device):
        value = node.sysctl('ipv4/conf/%s/arp_ignore', where)
        if value:
            yield findings.ARP_IGNORED.found(
                'arp_ignore of %s is %d' % (where, value), asking,
                where=where)
            return


def enterable(node: Node) -> list[list[Entry]]:
    """The entries of each pod that was told something in its namespace."""
    return [entries for entries in node.pods().values()
            if entries[0].netns is not None and entries[0].peer is not None]


def check_inside(node: Node, pods: Sequence[list[Entry]]
                 ) -> Iterator[Finding]:
    """Look into the namespaces of pods, and change nothing there.

    :param pods: the entries of each
    """
    ill = [pod for pod in map(_look_inside, pods) if not pod.healthy]
    if ill:
        # An ADD or DEL may be half done, for some time without the lock.
        time.sleep(_SETTLED)
        owners = {pod.entry.owner for pod in ill}
        ill = [_look_inside(entries) for entries in pods
               if entries[0].owner in owners]
        node.refresh()
        ill = [pod for pod in ill if pod.entry.address not in node.changing
               and not pod.entry.sandbox_gone]
    unreadable = {str(pod.entry.owner): pod.error for pod in ill
                  if pod.error is not None}
    if unreadable:
        yield findings.POD_UNREADABLE.found(
            next(iter(unreadable.values())), unreadable)
    yield from _check_macs(ill)
    yield from _check_neighbours(ill)
    yield from _check_ways(node, ill)


def _look_inside(entries: list[Entry]) -> _Pod:
    entry = entries[0]
    netns, peer = entry.netns, entry.peer
    assert netns is not None and peer is not None  # it is enterable
    versions = {entry.address.version for entry in entries}
    hosts = tuple(host for host in peer.addresses if host.version in versions)
    try:
        with netlink.entered(netns), netlink.Kernel() as kernel:
            link = kernel.link(entry.owner.ifname)
            if link is None:
                raise exceptions.NetnsUnusable(
                    netns=netns,
                    reason='has no interface ' + entry.owner.ifname)
            return _Pod(
                entry, peer, hosts, link.mac,
                {each.dst: each.mac
                 for each in kernel.neighbours(link.index)},
                tuple(host for host in hosts
                      if not any(host in subnet for subnet in entry.subnets)
                      and not kernel.is_on_link(host)))
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        return _Pod(entry, peer, hosts, error=str(err))


def _check_macs(pods: list[_Pod]) -> Iterator[Finding]:
    changed = [pod for pod in pods if pod.has_another_mac]
    if changed:
        pod = changed[0]
        yield findings.POD_MAC.found(
            'the MAC address of %s in the sandbox %s is %s, but was %s' % (
                pod.entry.owner.ifname, pod.entry.owner, pod.mac,
                pod.entry.mac),
            [pod.entry.address for pod in changed],
            commands=[command for pod in changed for command in (
                _within(pod, 'link set %s address %s' % (
                    pod.entry.owner.ifname, pod.entry.mac)),
                *(_lesson(pod, host) for host in pod.hosts))])


def _check_neighbours(pods: list[_Pod]) -> Iterator[Finding]:
    # With its MAC address a pod loses what it knew.
    mistaken = [(pod, host) for pod in pods if not pod.has_another_mac
                for host in pod.mistaken]
    for kind, known in ((findings.POD_NEIGHBOUR_MISSING, False),
                        (findings.POD_NEIGHBOUR_WRONG, True)):
        some = [(pod, host) for pod, host in mistaken
                if (host in pod.macs) == known]
        if some:
            pod, host = some[0]
            yield kind.found(
                'in the sandbox %s the neighbour entry of the node %s is %s, '
                'where %s is needed' % (
                    pod.entry.owner, host, pod.macs.get(host, 'missing'),
                    pod.peer.mac),
                {pod.entry.address: None for pod, _ in some},
                commands=[_lesson(pod, host) for pod, host in some])


def _lesson(pod: _Pod, host: IPAddress) -> str:
    return _within(pod, 'neigh replace %s lladdr %s dev %s nud permanent' % (
        host, pod.peer.mac, pod.entry.owner.ifname))


def _within(pod: _Pod, command: str) -> str:
    return 'nsenter --net=%s ip %s' % (pod.entry.netns, command)


def _check_ways(node: Node, pods: list[_Pod]) -> Iterator[Finding]:
    """Look for pods that go to their node by a gateway."""
    strict = node.parent_name is not None and node.sysctl(
        'ipv4/conf/%s/rp_filter', 'all', node.parent_name) == 1
    astray = [(pod, host) for pod in pods
              for host in pod.astray]
    dropped: list[tuple[_Pod, IPAddress]] = [
        (pod, host) for pod, host in astray
        if strict and host.version == 4]
    detour = [each for each in astray if each not in dropped]
    untold: list[tuple[Entry, IPAddress]] = [
        (entry, host) for entry in node.live.values()
        for host in (node.peer.addresses if node.peer is not None else ())
        if strict and entry.peer is None and entry.subnets
        and entry.address not in node.changing
        and entry.address.version == host.version == 4
        and not any(host in subnet for subnet in entry.subnets)]
    if dropped or untold:
        told: list[tuple[Entry, IPAddress]] = [
            (pod.entry, host) for pod, host in dropped]
        entry, at = (told + untold)[0]
        yield findings.RP_FILTER.found(
            'rp_filter of %s is 1, and the sandbox %s has no route of its '
            'own to the node %s' % (node.parent_name, entry.owner, at),
            {**{pod.entry.address: None for pod, _ in dropped},
             **{entry.address: None for entry, _ in untold}},
            commands=[*_introductions(dropped),
                      'sysctl -w net.ipv4.conf.%s.rp_filter=2' %
                      node.parent_name])
    if detour:
        pod, host = detour[0]
        yield findings.POD_ROUTE_MISSING.found(
            'the sandbox %s has no route of its own to the node %s' % (
                pod.entry.owner, host),
            {pod.entry.address: None for pod, _ in detour},
            commands=_introductions(detour))


def _introductions(ways: Iterable[tuple[_Pod, IPAddress]]) -> list[str]:
    return [_within(pod, 'route replace %s dev %s' % (
        host, pod.entry.owner.ifname)) for pod, host in ways]
