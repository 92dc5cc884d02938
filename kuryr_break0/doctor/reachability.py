# SPDX-License-Identifier: Apache-2.0

"""Pings between node and pods, after all other checks found nothing.

What no check knows of shows here: rules in a pod, marks, policy routing. The
kernel's own trace then says what drops the packet.
"""

from __future__ import annotations

import contextlib
import time
from typing import Iterator, Optional, Sequence

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import ParentView
from kuryr_break0.doctor.prober import Probe
from kuryr_break0.doctor.prober import Prober
from kuryr_break0.doctor import trace
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.model import Record

#: Seconds for an answer, and pods without one after which it is enough.
_TIMEOUT = 0.5
_ENOUGH = 3
#: Seconds after which a pod that has just started answers: before that, its
#: IPv6 addresses may be tentative.
_SETTLED, _TRIES = 1.0, 3


def check(view: ParentView, pods: Sequence[list[Record]]
          ) -> Iterator[Finding]:
    """Ping pods and, from them, the node.

    :param pods: the records of each
    :raises NotPermitted: without CAP_NET_RAW
    """
    silent: list[tuple[Record, Probe]] = []
    for records in pods:
        for record in records:
            probe = _unanswered(view, record)
            if probe is not None:
                silent.append((record, probe))
        if len(silent) >= _ENOUGH:
            break
    for _ in range(_TRIES):
        if not silent:
            return
        time.sleep(_SETTLED)
        silent = [(record, probe) for record, probe in (
            (record, _unanswered(view, record)) for record, _ in silent)
            if probe is not None]
    view.refresh()
    silent = [(record, probe) for record, probe in silent
              if record.address not in view.changing]
    if not silent:
        return
    record, probe = silent[0]
    kind, reason = _explained(view, record, probe)
    yield kind.found(
        'a ping %s, to %s, is not answered%s' % (
            'from the node' if probe.direction == 'node to pod'
            else 'from the pod', probe.to, reason and ': ' + reason),
        [each.address for each, _ in silent], address=record.address)


def _unanswered(view: ParentView, record: Record) -> Optional[Probe]:
    """Return the probe without an answer that says most, if there is one."""
    prober = Prober(1, _TIMEOUT)
    assert record.netns is not None and view.known is not None
    probes = [prober.from_node(record.address, view.name, record.mac)]
    with contextlib.suppress(exceptions.NetnsUnusable):
        probes += prober.from_pod(record.address, record.netns,
                                  record.namespace, view.known)
    silent = [probe for probe in probes if not probe.answered]
    return next((probe for probe in silent if probe.misrouted),
                silent[0] if silent else None)


def _explained(view: ParentView, record: Record,
               probe: Probe) -> tuple[findings.Kind, str]:
    """Find out why a probe was not answered."""
    netns, namespace = record.netns, record.namespace
    assert netns is not None
    places = [
        trace.Place('on the node', view.name, contextlib.nullcontext),
        trace.Place('in the pod', record.owner.ifname,
                    lambda: kernel.entered(netns, namespace))]
    found = None
    with contextlib.suppress(exceptions.Break0Error, OSError), \
            trace.traced(record.address, places) as found:
        _unanswered(view, record)
    if found is not None and found.dropped:
        return findings.PACKET_DROPPED, '; '.join(found.dropped)
    if probe.misrouted:
        return findings.PACKET_LOST, str(probe.problem)
    if found is not None and not found.arrived(
            probe.direction == 'node to pod'):
        return findings.PACKET_LOST, 'it was seen %s' % (
            ', '.join(found.seen) or 'nowhere')
    return findings.PROBE_UNANSWERED, (
        '' if found is not None else 'its way could not be traced by nft')
