# SPDX-License-Identifier: Apache-2.0

"""Checks the pod side: whether pods can reach their node."""

from __future__ import annotations

import dataclasses
import time
from typing import Iterable, Iterator, Optional, Sequence

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import ParentView
from kuryr_break0 import exceptions
from kuryr_break0.guard import Guard
from kuryr_break0 import kernel
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Record

#: Pods whose namespaces are entered; each takes some milliseconds. More than
#: the 110 that kubelet allows on a node by default.
ENTERED = 128
#: Seconds within which an ADD or DEL ends that has changed a pod.
_SETTLED = 1.0


@dataclasses.dataclass(frozen=True)
class _Pod:
    """A pod whose namespace was entered.

    :ivar entry: the first of its entries
    :ivar known: what it must know of the node
    :ivar hosts: the addresses of the node that are of a family of its own
    :ivar link: its interface
    :ivar missing: its addresses that the interface does not have
    :ivar is_on_parent: whether it is a macvlan on the recorded parent
    :ivar macs: what it takes for those of the node's addresses
    :ivar astray: the addresses of the node that it goes to by a gateway
    :ivar error: why it could not be examined
    """

    record: Record
    known: NodeAddresses
    hosts: tuple[IPAddress, ...]
    link: Optional[kernel.Link] = None
    missing: tuple[IPAddress, ...] = ()
    is_on_parent: bool = True
    macs: dict[IPAddress, str] = dataclasses.field(default_factory=dict)
    astray: tuple[IPAddress, ...] = ()
    error: Optional[str] = None

    @property
    def mac(self) -> str:
        return self.link.mac if self.link is not None else ''

    @property
    def is_down(self) -> bool:
        return self.link is not None and not self.link.up

    @property
    def is_apart(self) -> bool:
        """Return whether its interface can never reach break0."""
        return self.link is not None and not (
            self.is_on_parent and self.link.mode == 'bridge')

    @property
    def has_another_mac(self) -> bool:
        return self.error is None and self.record.mac not in (None, self.mac)

    @property
    def mistaken(self) -> tuple[IPAddress, ...]:
        """Return the addresses of the node with a wrong or no neighbour."""
        if self.error is not None:
            return ()
        return tuple(host for host in self.hosts
                     if self.macs.get(host) != self.known.mac)

    @property
    def healthy(self) -> bool:
        return not (self.error or self.is_down or self.is_apart
                    or self.missing or self.has_another_mac or self.mistaken
                    or self.astray)


def check_configured(view: ParentView) -> Iterator[Finding]:
    """Look by the ledger for pods that cannot find their node."""
    options = view.options
    records = [record for address, record in view.live.items()
               if address not in view.changing]
    unconfigured = [record for record in records
                    if _is_not_configured(view, record)]
    if unconfigured:
        yield findings.POD_NOT_CONFIGURED.found(
            'pods are not configured with the addresses of the node, or with '
            'others',
            [record.address for record in unconfigured])
    asking = [record.address for record in records
              if record.netns is None and record.address.version == 6]
    if asking and not Guard(options, view.node.ledger, view.name).answers:
        yield findings.SOLICITATIONS_UNANSWERED.found(
            'addresses are bound without a namespace, and no guard answers '
            'for the node by IPv6', asking)
    yield from _check_arp(view, records)


def _is_not_configured(view: ParentView, record: Record) -> bool:
    return (view.known is not None and record.netns is not None
            and record.configured != view.known.digest)


def _check_arp(view: ParentView, records: list[Record]) -> Iterator[Finding]:
    asking = [record.address for record in records
              if record.address.version == 4
              and record.configured is None]
    if not asking:
        return
    # The larger of all and the interface is what counts.
    for where in ('all', view.name):
        value = view.sysctl('ipv4/conf/%s/arp_ignore', where)
        if value:
            yield findings.ARP_IGNORED.found(
                'arp_ignore of %s is %d' % (where, value), asking,
                where=where)
            return


def enterable(view: ParentView) -> list[list[Record]]:
    """Return the records of each pod whose namespace can be entered."""
    known = view.known
    return [records for records in view.pods()
            if records[0].netns is not None and known is not None
            and records[0].configured == known.digest]


def check_inside(view: ParentView, pods: Sequence[list[Record]]
                 ) -> Iterator[Finding]:
    """Examine the namespaces of pods, and change nothing there.

    :param pods: the entries of each
    """
    ill = [pod for pod in (_look_inside(view, records) for records in pods)
           if not pod.healthy]
    if ill:
        # An ADD or DEL may be half done, for some time without the lock.
        time.sleep(_SETTLED)
        owners = {pod.record.owner for pod in ill}
        ill = [_look_inside(view, records) for records in pods
               if records[0].owner in owners]
        view.refresh()
        ill = [pod for pod in ill if pod.record.address not in view.changing
               and kernel.state(pod.record.netns, pod.record.namespace)
               is not kernel.State.GONE]
    unreadable = {str(pod.record.owner): pod.error for pod in ill
                  if pod.error is not None}
    if unreadable:
        yield findings.POD_UNREADABLE.found(
            next(iter(unreadable.values())), unreadable)
    yield from _check_links(ill)
    # An interface that is down has lost what is looked for next.
    ill = [pod for pod in ill if not (pod.is_down or pod.is_apart)]
    yield from _check_macs(ill)
    yield from _check_neighbours(ill)
    yield from _check_ways(view, ill)


def _look_inside(view: ParentView, records: list[Record]) -> _Pod:
    record = records[0]
    netns, known = record.netns, view.known
    assert netns is not None and known is not None  # it is enterable
    versions = {record.address.version for record in records}
    hosts = tuple(host for host in known.addresses if host.version in versions)
    try:
        with kernel.entered(netns, record.namespace), \
                kernel.Netlink() as netlink:
            link = netlink.link(record.owner.ifname)
            if link is None:
                raise exceptions.NetnsUnusable(
                    netns=netns,
                    reason='has no interface ' + record.owner.ifname)
            present = {address for index, address in netlink.addresses()
                       if index == link.index}
            # Kuryr gives the addresses after the driver has bound them.
            missing = tuple(each.address for each in records
                            if each.address not in present)
            return _Pod(
                record, known, hosts, link, missing,
                _is_on_parent(view, link),
                {each.dst: each.mac
                 for each in netlink.neighbours(link.index)},
                tuple(host for host in hosts
                      if not any(host in subnet for subnet in record.subnets)
                      and not netlink.is_on_link(host)))
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        return _Pod(record, known, hosts, error=str(err))


def _is_on_parent(view: ParentView, link: kernel.Link) -> bool:
    # The number of the namespace that it counts in is of no use here.
    return link.kind == 'macvlan' and view.link is not None and (
        link.lower == view.link.lower)


def _check_links(pods: list[_Pod]) -> Iterator[Finding]:
    """Look for interfaces that no neighbour and no route helps."""
    apart = [pod for pod in pods if pod.is_apart]
    if apart:
        first = apart[0]
        assert first.link is not None
        yield findings.POD_APART.found(
            'the interface %s in the sandbox %s is a %s%s, and not in bridge '
            'mode on %s' % (
                first.record.owner.ifname, first.record.owner,
                first.link.kind or 'physical interface',
                ' in %s mode' % first.link.mode if first.link.mode else '',
                first.record.parent),
            [pod.record.address for pod in apart],
            commands=[_within(pod, 'link set %s type macvlan mode bridge'
                              % pod.record.owner.ifname)
                      for pod in apart if pod.is_on_parent])
    down = [pod for pod in pods if pod.is_down and not pod.is_apart]
    if down:
        yield findings.POD_DOWN.found(
            'the interface %s in the sandbox %s is down' % (
                down[0].record.owner.ifname, down[0].record.owner),
            [pod.record.address for pod in down],
            commands=[_within(pod, 'link set %s up' % pod.record.owner.ifname)
                      for pod in down])
    without = [pod for pod in pods if pod.missing and not pod.is_apart]
    if without:
        yield findings.POD_ADDRESS_MISSING.found(
            'the interface %s in the sandbox %s does not have %s' % (
                without[0].record.owner.ifname, without[0].record.owner,
                without[0].missing[0]),
            [address for pod in without for address in pod.missing],
            commands=[_within(pod, 'address add %s/%d dev %s' % (
                address, _prefix(pod.record, address),
                pod.record.owner.ifname))
                for pod in without for address in pod.missing])


def _prefix(record: Record, address: IPAddress) -> int:
    return next((subnet.prefixlen for subnet in record.subnets
                 if address in subnet), address.max_prefixlen)


def _check_macs(pods: list[_Pod]) -> Iterator[Finding]:
    changed = [pod for pod in pods if pod.has_another_mac]
    if changed:
        pod = changed[0]
        yield findings.POD_MAC.found(
            'the MAC address of %s in the sandbox %s is %s, but was %s' % (
                pod.record.owner.ifname, pod.record.owner, pod.mac,
                pod.record.mac),
            [pod.record.address for pod in changed],
            commands=[command for pod in changed for command in (
                _within(pod, 'link set %s address %s' % (
                    pod.record.owner.ifname, pod.record.mac)),
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
                    pod.record.owner, host, pod.macs.get(host, 'missing'),
                    pod.known.mac),
                {pod.record.address: None for pod, _ in some},
                commands=[_lesson(pod, host) for pod, host in some])


def _lesson(pod: _Pod, host: IPAddress) -> str:
    return _within(pod, 'neigh replace %s lladdr %s dev %s nud permanent' % (
        host, pod.known.mac, pod.record.owner.ifname))


def _within(pod: _Pod, command: str) -> str:
    return 'nsenter --net=%s ip %s' % (pod.record.netns, command)


def _check_ways(view: ParentView, pods: list[_Pod]) -> Iterator[Finding]:
    """Look for pods that go to their node by a gateway."""
    strict = view.parent_name is not None and view.sysctl(
        'ipv4/conf/%s/rp_filter', 'all', view.parent_name) == 1
    astray = [(pod, host) for pod in pods
              for host in pod.astray]
    dropped: list[tuple[_Pod, IPAddress]] = [
        (pod, host) for pod, host in astray
        if strict and host.version == 4]
    detour = [each for each in astray if each not in dropped]
    unconfigured: list[tuple[Record, IPAddress]] = [
        (record, host) for record in view.live.values()
        for host in (view.known.addresses if view.known is not None else ())
        if strict and record.configured is None and record.subnets
        and record.address not in view.changing
        and record.address.version == host.version == 4
        and not any(host in subnet for subnet in record.subnets)]
    if dropped or unconfigured:
        known: list[tuple[Record, IPAddress]] = [
            (pod.record, host) for pod, host in dropped]
        record, at = (known + unconfigured)[0]
        yield findings.RP_FILTER.found(
            'rp_filter of %s is 1, and the sandbox %s has no route of its '
            'own to the node %s' % (view.parent_name, record.owner, at),
            {**{pod.record.address: None for pod, _ in dropped},
             **{record.address: None for record, _ in unconfigured}},
            commands=[*_introductions(dropped),
                      'sysctl -w net/ipv4/conf/%s/rp_filter=2' %
                      view.parent_name])
    if detour:
        pod, host = detour[0]
        yield findings.POD_ROUTE_MISSING.found(
            'the sandbox %s has no route of its own to the node %s' % (
                pod.record.owner, host),
            {pod.record.address: None for pod, _ in detour},
            commands=_introductions(detour))


def _introductions(ways: Iterable[tuple[_Pod, IPAddress]]) -> list[str]:
    return [_within(pod, 'route replace %s dev %s' % (
        host, pod.record.owner.ifname)) for pod, host in ways]
