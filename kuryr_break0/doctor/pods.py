# SPDX-License-Identifier: Apache-2.0

"""Checks of the pod side: neighbours, routes and interfaces in pods."""

from __future__ import annotations

import functools
import time
from typing import Iterator, Sequence

from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import inside
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import merged
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

#: Seconds after which an ADD or DEL that has changed a pod is done.
_SETTLED = 1.0
_SYNC = 'kuryr-break0 sync'


def check_configured(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report pods without current node addresses, by the ledger."""
    records = [parent.live[address] for address in node.settled(parent.live)]
    unconfigured = [record.address for record in records
                    if parent.node is not None and record.netns is not None
                    and record.configured != parent.node.digest
                    and not podside.has_lost_interface(record, node.options)]
    if unconfigured:
        yield KINDS['pod-not-configured'].found(
            'pods are not configured with the addresses of the node, or with '
            'others', unconfigured)
    asking: list[IPAddress] = [
        record.address for record in records
        if record.netns is None and record.address.version == 6]
    if asking and not Guard(node.options, node.ledger, parent.device).answers:
        yield KINDS['solicitations-unanswered'].found(
            'addresses are bound without a namespace, and no guard answers '
            'for the node by IPv6', asking)
    asking = [record.address for record in records
              if record.address.version == 4 and record.configured is None]
    # The kernel applies the larger value of all and the interface.
    for where in ('all', parent.device):
        value = kernel.read_sysctl('ipv4/conf/%s/arp_ignore' % where)
        if value and asking:
            yield KINDS['arp-ignored'].found(
                'arp_ignore of %s is %d' % (where, value), asking,
                where=where)
            return


def enterable(node: Node, parent: Parent) -> list[list[Record]]:
    """Return the records of each pod with an enterable namespace."""
    return [records for records in node.pods(parent)
            if records[0].netns is not None and parent.node is not None
            and (records[0].configured == parent.node.digest
                 or podside.has_lost_interface(records[0], node.options))]


def check_inside(node: Node, parent: Parent, pods: Sequence[list[Record]]
                 ) -> Iterator[Finding]:
    """Examine the namespaces of pods, and change nothing there.

    :param pods: the records of each pod
    """
    found = list(_check_unconfigured(node, parent))
    ill = [records for records in node.over(pods)
           if any(_check_pod(node, parent, records))]
    if ill:
        # A runtime changes a pod before and after it calls the driver, so a
        # pod can be incomplete while the lock is free.
        time.sleep(_SETTLED)
        again = [(records[0], list(_check_pod(node, parent, records)))
                 for records in ill]
        node.refresh()
        for record, of_pod in again:
            if record.address not in node.changing and kernel.state(
                    record.netns, record.namespace) is not kernel.State.GONE:
                found += of_pod
    yield from merged(found)


def _check_pod(node: Node, parent: Parent, records: Sequence[Record]
               ) -> Iterator[Finding]:
    """Examine a pod: causes before effects."""
    record, ifname = records[0], records[0].owner.ifname
    place = 'the interface %s in the sandbox %s' % (ifname, record.owner)
    command = functools.partial(inside, record.netns)
    assert parent.node is not None  # enterable() has checked it
    try:
        with kernel.entered(str(record.netns), record.namespace), \
                kernel.Netlink(most=podside.MOST) as netlink:
            side = podside.PodSide(netlink, records, node.options)
            link = netlink.link(ifname)
            assert link is not None  # otherwise PodSide raises InterfaceGone
            # Kuryr adds the addresses after the driver has bound them.
            present = side.addresses()
            macs = {each.dst: each.mac
                    for each in netlink.neighbours(link.index)}
            needed = list(side.wanted(parent.node))
            has_way = {item.dst: netlink.lookup(item.dst) is not None
                       for item in needed if isinstance(item, HostRoute)}
    except exceptions.InterfaceGone:
        yield KINDS['pod-interface-gone'].found(
            'the namespace %r has no interface %s' % (record.netns, ifname),
            [each.address for each in records])
        return
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        yield KINDS['pod-unreadable'].found(str(err).rstrip('.'),
                                            [record.owner])
        return
    # Read in the pod, the id of the parent's namespace (IFLA_LINK_NETNSID)
    # cannot be compared with the node's ids.
    is_beside = parent.present is not None and (
        link.kind, link.lower) == ('macvlan', parent.present.lower)
    if not is_beside or link.mode != 'bridge':
        yield KINDS['pod-apart'].found(
            '%s is %s, and not in bridge mode on %s' % (
                place, link.described, record.parent), [record.address],
            commands=[command(
                'ip link set %s type macvlan mode bridge', ifname)]
            if is_beside else ())
        return
    if not link.up:
        yield KINDS['pod-down'].found(
            '%s is down' % place, [record.address],
            commands=[command('ip link set %s up', ifname), _SYNC])
    for each in records:
        if each.address not in present:
            yield KINDS['pod-address-missing'].found(
                '%s does not have %s' % (place, each.address), [each.address],
                commands=[command(
                    'ip address add %s/%s dev %s', each.address,
                    _prefix(record, each.address), ifname)])
    if not link.up:
        return  # the kernel has deleted its routes and neighbours
    if record.mac not in (None, link.mac):
        yield KINDS['pod-mac'].found(
            'the MAC address of %s is %s, but was %s' % (
                place, link.mac, record.mac), [record.address],
            commands=[command('ip link set %s address %s', ifname,
                              record.mac),
                      _SYNC])
    else:  # a new MAC address makes the kernel delete the neighbours
        for item in needed:
            found = macs.get(item.dst)
            # The protocol of a neighbour does not matter for traffic.
            if isinstance(item, Neighbour) and found != item.mac:
                yield KINDS['pod-neighbour-wrong' if found
                            else 'pod-neighbour-missing'].found(
                    'in the sandbox %s the neighbour entry of the node %s is '
                    '%s, where %s is needed' % (
                        record.owner, item.dst, found or 'missing',
                        item.mac), [record.address])
    for host, is_reached in has_way.items():
        if is_reached and host.version == 4 and _is_strict(parent):
            yield _dropped(parent, record, host, _SYNC)
        else:
            yield KINDS['pod-route-missing'].found(
                'the sandbox %s has no route %sto the node %s' % (
                    record.owner, 'of its own ' if is_reached else '', host),
                [record.address], severity=None if is_reached else ERROR)


def _prefix(record: Record, address: IPAddress) -> int:
    return next((subnet.prefixlen for subnet in record.subnets
                 if address in subnet), address.max_prefixlen)


def _check_unconfigured(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report pods that send through a gateway, which rp_filter drops."""
    if parent.node is None or not _is_strict(parent):
        return
    for record in parent.live.values():
        for host in parent.node.addresses:
            if (record.configured is None and record.subnets
                    and record.address not in node.changing
                    and record.address.version == host.version == 4
                    and not any(host in each for each in record.subnets)):
                yield _dropped(parent, record, host, 'sysctl -w net/ipv4/conf/'
                               '%s/rp_filter=2' % parent.name)


def _is_strict(parent: Parent) -> bool:
    return largest_sysctl('ipv4/conf/%s/rp_filter', 'all', parent.name) == 1


def _dropped(parent: Parent, record: Record, host: IPAddress,
             command: str) -> Finding:
    return KINDS['rp-filter'].found(
        'rp_filter of %s is 1, and the sandbox %s has no route of its own to '
        'the node %s' % (parent.name, record.owner, host), [record.address],
        commands=[command])
