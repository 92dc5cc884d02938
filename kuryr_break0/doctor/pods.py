# SPDX-License-Identifier: Apache-2.0

"""Checks the pod side: whether pods can reach their node."""

from __future__ import annotations

import dataclasses
import time
from typing import Collection, Iterator, Mapping, Optional, Sequence

from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import WARNING
from kuryr_break0.doctor.node import largest_sysctl
from kuryr_break0.doctor.node import Node
from kuryr_break0 import exceptions
from kuryr_break0.guard import Guard
from kuryr_break0 import kernel
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import Record
from kuryr_break0 import podside
from kuryr_break0.snapshot import Parent

#: Seconds within which an ADD or DEL ends that has changed a pod.
_SETTLED = 1.0


@dataclasses.dataclass(frozen=True)
class _Pod:
    """A pod whose namespace was entered.

    :ivar records: its entries
    :ivar link: its interface
    :ivar missing: its addresses that the interface does not have
    :ivar is_apart: whether its interface can never reach break0
    :ivar mistaken: neighbours of the node that it needs, and what it has
    :ivar astray: the addresses of the node that it has no own route to, and
        whether it goes there by a gateway
    :ivar error: why it could not be examined
    """

    records: Sequence[Record]
    link: Optional[kernel.Link] = None
    missing: tuple[IPAddress, ...] = ()
    is_apart: bool = False
    mistaken: tuple[tuple[Neighbour, Optional[str]], ...] = ()
    astray: Mapping[IPAddress, bool] = dataclasses.field(
        default_factory=dict)
    error: Optional[str] = None

    @property
    def record(self) -> Record:
        return self.records[0]

    @property
    def is_down(self) -> bool:
        return self.link is not None and not self.link.up

    @property
    def has_another_mac(self) -> bool:
        return self.link is not None and (
            self.record.mac not in (None, self.link.mac))

    @property
    def is_healthy(self) -> bool:
        return not (self.error or self.is_down or self.is_apart
                    or self.missing or self.has_another_mac or self.mistaken
                    or self.astray)

    def __str__(self) -> str:
        return 'the interface %s in the sandbox %s' % (
            self.record.owner.ifname, self.record.owner)

    def command(self, text: str) -> str:
        """Return a command of ip(8) in its namespace."""
        return 'nsenter --net=%s ip %s' % (self.record.netns, text)


def check_configured(node: Node, parent: Parent) -> Iterator[Finding]:
    """Look by the ledger for pods that cannot find their node."""
    records = [parent.live[address] for address in node.settled(parent.live)]
    unconfigured = [record for record in records
                    if parent.node is not None and record.netns is not None
                    and record.configured != parent.node.digest]
    if unconfigured:
        yield KINDS['pod-not-configured'].found(
            'pods are not configured with the addresses of the node, or with '
            'others', _addresses(unconfigured))
    asking = [record for record in records
              if record.netns is None and record.address.version == 6]
    if asking and not Guard(node.options, node.ledger, parent.device).answers:
        yield KINDS['solicitations-unanswered'].found(
            'addresses are bound without a namespace, and no guard answers '
            'for the node by IPv6', _addresses(asking))
    asking = [record for record in records if record.address.version == 4
              and record.configured is None]
    # The larger of all and the interface is what counts.
    for where in ('all', parent.device):
        value = kernel.read_sysctl('ipv4/conf/%s/arp_ignore' % where)
        if value and asking:
            yield KINDS['arp-ignored'].found(
                'arp_ignore of %s is %d' % (where, value),
                _addresses(asking), where=where)
            return


def _addresses(records: Collection[Record]) -> list[IPAddress]:
    return [record.address for record in records]


def enterable(node: Node, parent: Parent) -> list[list[Record]]:
    """Return the records of each pod whose namespace can be entered."""
    return [records for records in node.pods(parent)
            if records[0].netns is not None and parent.node is not None
            and records[0].configured == parent.node.digest]


def check_inside(node: Node, parent: Parent, pods: Sequence[list[Record]]
                 ) -> Iterator[Finding]:
    """Examine the namespaces of pods, and change nothing there.

    :param pods: the entries of each
    """
    ill = [pod for pod in (_look_inside(node, parent, records)
                           for records in node.over(pods))
           if not pod.is_healthy]
    if ill:
        # An ADD or DEL may be half done, for some time without the lock.
        time.sleep(_SETTLED)
        ill = [_look_inside(node, parent, pod.records) for pod in ill]
        node.refresh()
        ill = [pod for pod in ill if pod.record.address not in node.changing
               and kernel.state(pod.record.netns, pod.record.namespace)
               is not kernel.State.GONE]
    unreadable = {str(pod.record.owner): pod.error for pod in ill
                  if pod.error is not None}
    if unreadable:
        yield KINDS['pod-unreadable'].found(
            str(next(iter(unreadable.values()))), unreadable)
    yield from _check_links(ill, parent.present.lower if parent.present
                            else None)
    # An interface that is down has lost what is looked for next.
    ill = [pod for pod in ill if not (pod.is_down or pod.is_apart)]
    yield from _check_neighbours(ill)
    yield from _check_ways(node, parent, ill)


def _look_inside(node: Node, parent: Parent,
                 records: Sequence[Record]) -> _Pod:
    record = records[0]
    assert parent.node is not None  # it is enterable
    try:
        with kernel.entered(str(record.netns), record.namespace), \
                kernel.Netlink(most=podside.MOST) as netlink:
            side = podside.PodSide(netlink, records, node.options)
            link = netlink.link(record.owner.ifname)
            assert link is not None  # or there is no such side
            # Kuryr gives the addresses after the driver has bound them.
            present = side.addresses()
            macs = {each.dst: each.mac
                    for each in netlink.neighbours(link.index)}
            needed = list(side.wanted(parent.node))
            astray = {item.dst: netlink.lookup(item.dst) is not None
                      for item in needed if isinstance(item, HostRoute)}
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        return _Pod(records, error=str(err).rstrip('.'))
    # The number of the namespace that its parent is in is of no use here.
    is_apart = (link.kind, link.mode, link.lower) != (
        'macvlan', 'bridge', parent.present and parent.present.lower)
    return _Pod(
        records, link,
        tuple(each.address for each in records
              if each.address not in present), is_apart,
        # Who has marked one changes nothing of where packets go.
        tuple((item, macs.get(item.dst)) for item in needed
              if isinstance(item, Neighbour)
              and macs.get(item.dst) != item.mac),
        astray)


def _check_links(pods: list[_Pod], lower: Optional[int]
                 ) -> Iterator[Finding]:
    """Look for interfaces that no neighbour and no route helps.

    :param lower: ifindex of the parent
    """
    apart = [pod for pod in pods if pod.is_apart]
    if apart:
        link = apart[0].link
        assert link is not None
        yield KINDS['pod-apart'].found(
            '%s is a %s%s, and not in bridge mode on %s' % (
                apart[0], link.kind or 'physical interface',
                ' in %s mode' % link.mode if link.mode else '',
                apart[0].record.parent),
            [pod.record.address for pod in apart],
            commands=[pod.command('link set %s type macvlan mode bridge'
                                  % pod.record.owner.ifname)
                      for pod in apart if pod.link and (
                          pod.link.kind, pod.link.lower) == ('macvlan', lower)
                      ])
    pods = [pod for pod in pods if not pod.is_apart]
    down = [pod for pod in pods if pod.is_down]
    if down:
        yield KINDS['pod-down'].found(
            '%s is down' % down[0], [pod.record.address for pod in down],
            commands=[*(pod.command('link set %s up' % pod.record.owner.ifname)
                        for pod in down), 'kuryr-break0 sync'])
    without = [(pod, address) for pod in pods for address in pod.missing]
    if without:
        yield KINDS['pod-address-missing'].found(
            '%s does not have %s' % without[0],
            [address for _, address in without],
            commands=[pod.command('address add %s/%d dev %s' % (
                address, _prefix(pod.record, address),
                pod.record.owner.ifname)) for pod, address in without])
    changed = [pod for pod in pods if pod.has_another_mac and not pod.is_down]
    if changed:
        first = changed[0]
        yield KINDS['pod-mac'].found(
            'the MAC address of %s is %s, but was %s' % (
                first, first.link and first.link.mac, first.record.mac),
            [pod.record.address for pod in changed],
            commands=[*(pod.command('link set %s address %s' % (
                pod.record.owner.ifname, pod.record.mac))
                for pod in changed), 'kuryr-break0 sync'])


def _prefix(record: Record, address: IPAddress) -> int:
    return next((subnet.prefixlen for subnet in record.subnets
                 if address in subnet), address.max_prefixlen)


def _check_neighbours(pods: list[_Pod]) -> Iterator[Finding]:
    # With its MAC address a pod loses what it knew.
    mistaken = [(pod, needed, found) for pod in pods
                if not pod.has_another_mac for needed, found in pod.mistaken]
    for kind, some in (
            (KINDS['pod-neighbour-missing'],
             [each for each in mistaken if each[2] is None]),
            (KINDS['pod-neighbour-wrong'],
             [each for each in mistaken if each[2] is not None])):
        if some:
            pod, needed, found = some[0]
            yield kind.found(
                'in the sandbox %s the neighbour entry of the node %s is %s, '
                'where %s is needed' % (pod.record.owner, needed.dst,
                                        found or 'missing', needed.mac),
                dict.fromkeys(pod.record.address for pod, _, _ in some))


def _check_ways(node: Node, parent: Parent,
                pods: list[_Pod]) -> Iterator[Finding]:
    """Look for pods that go to their node by a gateway."""
    is_strict = largest_sysctl('ipv4/conf/%s/rp_filter', 'all',
                               parent.name) == 1
    by_gateway, nowhere = (
        [(pod.record, host) for pod in pods
         for host, has_gateway in pod.astray.items() if has_gateway is wanted]
        for wanted in (True, False))
    dropped = [each for each in by_gateway
               if is_strict and each[1].version == 4]
    detour = [each for each in by_gateway if each not in dropped]
    unconfigured = [
        (record, host) for record in parent.live.values()
        for host in (parent.node.addresses if parent.node else ())
        if is_strict and record.configured is None and record.subnets
        and record.address not in node.changing
        and record.address.version == host.version == 4
        and not any(host in subnet for subnet in record.subnets)]
    if dropped or unconfigured:
        record, host = (dropped + unconfigured)[0]
        yield KINDS['rp-filter'].found(
            'rp_filter of %s is 1, and the sandbox %s has no route of its '
            'own to the node %s' % (parent.name, record.owner, host),
            dict.fromkeys(each.address for each, _ in dropped + unconfigured),
            commands=[*(['kuryr-break0 sync'] if dropped else []),
                      *(['sysctl -w net/ipv4/conf/%s/rp_filter=2'
                         % parent.name] if unconfigured else [])])
    for some, way, severity in (
            (nowhere, 'no route', ERROR),
            (detour, 'no route of its own', WARNING)):
        if some:
            yield dataclasses.replace(KINDS['pod-route-missing'].found(
                'the sandbox %s has %s to the node %s' % (
                    some[0][0].owner, way, some[0][1]),
                dict.fromkeys(record.address for record, _ in some)),
                severity=severity)
            return
