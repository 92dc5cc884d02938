# SPDX-License-Identifier: Apache-2.0

"""Checks of the pod side: neighbours, routes and interfaces in pods."""

from __future__ import annotations

import time
from typing import Iterator, Sequence

from kuryr_break0.break0.guard import Guard
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import merged
from kuryr_break0.doctor import known
from kuryr_break0.doctor.node import Node
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import model

#: Seconds after which an ADD or DEL that has changed a pod has ended.
_SETTLED = 1.0


def check_asking(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report pods that ask for the node's MAC address and get no answer."""
    records = [parent.live[address] for address in node.settled(parent.live)]
    asking: list[model.IPAddress] = [
        record.address for record in records
        if record.netns is None and record.address.version == 6]
    if asking and not Guard(node.options, node.ledger, parent.device).answers:
        yield KINDS['solicitations-unanswered'].finding(
            'addresses are bound without a namespace, and no guard answers '
            'their neighbour solicitations', asking)
    asking = [record.address for record in records
              if record.address.version == 4 and record.configured is None]
    # The kernel applies the larger value of "all" and the interface.
    for where in ('all', parent.device):
        value = kernel.read_sysctl('ipv4/conf/%s/arp_ignore' % where)
        if value and asking:
            yield KINDS['arp-ignored'].finding(
                'arp_ignore of %s is %d' % (where, value), asking,
                where=where)
            return


def enterable(node: Node, parent: Parent) -> list[list[model.Record]]:
    """Return each pod's records, if namespace and node addresses are known."""
    return [records for records in node.pods(parent)
            if records[0].netns is not None and parent.node is not None]


def check_inside(node: Node, parent: Parent, pods: Sequence[list[model.Record]]
                 ) -> Iterator[Finding]:
    """Examine the namespaces of pods, and change nothing there.

    :param pods: the records of each pod
    """
    findings = list(_check_unconfigured(node, parent))
    ill = [records for records in node.over(pods)
           if any(_check_pod(node, records))]
    if ill:
        # A runtime changes a pod before and after it calls the driver, so a
        # pod can be incomplete while the lock is free.
        time.sleep(_SETTLED)
        examined = [(records[0], list(_check_pod(node, records)))
                    for records in ill]
        node.refresh()
        for record, of_pod in examined:
            if record.address not in node.changing and kernel.judge_state(
                    record.netns, record.namespace) is not kernel.State.GONE:
                findings += of_pod
    yield from merged(findings)


def _check_pod(node: Node, records: Sequence[model.Record]
               ) -> Iterator[Finding]:
    try:
        # Kuryr adds the addresses after the driver has bound them.
        yield from known.check(node, problems.of_pod(
            records, node.snapshot, _SETTLED))
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        yield KINDS['pod-unreadable'].finding(
            'the pod %s: %s' % (records[0].owner_text,
                                str(err).rstrip('.')), [records[0].owner])


def _check_unconfigured(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report pods that send through a gateway: rp_filter drops the packets."""
    if parent.node is None or not problems.is_strict(parent):
        return
    for record in parent.live.values():
        for host in parent.node.addresses:
            if (record.configured is None and record.subnets
                    and record.address not in node.changing
                    and record.address.version == host.version == 4
                    and not any(host in each for each in record.subnets)):
                yield KINDS['rp-filter'].finding(
                    'rp_filter of %s is 1, and the pod %s has no direct '
                    'route to the node address %s' % (
                        parent.name, record.owner_text, host),
                    [record.address], commands=[
                        'sysctl -w net/ipv4/conf/%s/rp_filter=2'
                        % parent.name])
