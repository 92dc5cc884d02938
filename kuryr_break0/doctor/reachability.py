# SPDX-License-Identifier: Apache-2.0

"""Pings between node and pods, whatever else was found.

What no check knows of shows here: firewalls, marks, policy routing. The
kernel's own trace then says what drops the packet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import time
from typing import Callable, Iterator, Optional, Sequence

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor.node import ParentView
from kuryr_break0.doctor.prober import Probe
from kuryr_break0.doctor.prober import Prober
from kuryr_break0.doctor import trace
from kuryr_break0 import exceptions
from kuryr_break0 import guard
from kuryr_break0 import kernel
from kuryr_break0.kernel import probes
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Record

#: Seconds for an answer, and pods without one after which it is enough.
_TIMEOUT = 0.5
_ENOUGH = 3
#: Seconds after which a pod that has just started answers: before that, its
#: IPv6 addresses may be tentative.
_SETTLED, _TRIES = 1.0, 3
#: Seconds for a connection, of which the kernel repeats the first packet
#: after one, and for who has an address to say so.
_CONNECTED, _ASKED = 2.5, 1.5
#: A port on which nobody listens (RFC 863). That it is refused is an answer.
_PORT = 9
#: Services of the node that are tried at most.
_SERVICES = 8
_FORWARDING = {4: 'ipv4/ip_forward', 6: 'ipv6/conf/all/forwarding'}
_IGNORING = {4: 'ipv4/icmp_echo_ignore_all', 6: 'ipv6/icmp/echo_ignore_all'}


class Pings:
    """Pings pods of one parent and, from them, the node.

    :ivar pinged: the number of addresses that were
    :ivar silent: the addresses of which not all pings were answered
    """

    def __init__(self, view: ParentView) -> None:
        self._view = view
        self.pinged = 0
        self.silent: list[IPAddress] = []

    def check(self, records: Sequence[Record]) -> Iterator[Finding]:
        """Ping addresses of pods.

        :raises NotPermitted: without CAP_NET_RAW
        """
        view = self._view
        silent: list[tuple[Record, Probe]] = []
        for record in records:
            self.pinged += 1
            probe = self._unanswered(record)
            if probe is not None:
                silent.append((record, probe))
            if len({each.owner for each, _ in silent}) >= _ENOUGH:
                break
        for _ in range(_TRIES if silent else 0):
            time.sleep(_SETTLED)
            silent = [(record, probe) for record, probe in (
                (record, self._unanswered(record)) for record, _ in silent)
                if probe is not None]
            if not silent:
                break
        view.refresh()
        silent = [(record, probe) for record, probe in silent
                  if record.address not in view.changing]
        self.silent = [record.address for record, _ in silent]
        if silent:
            yield from self._explained(silent)
        # One of each version of IP, until there is something to report.
        for check in (self._restricted, self._rewritten):
            answering = {record.address.version: record for record in records
                         if record.address not in self.silent}
            yield from itertools.islice(itertools.chain.from_iterable(
                map(check, answering.values())), 1)

    def _unanswered(self, record: Record) -> Optional[Probe]:
        """Return the probe without an answer that says most, if any."""
        prober = Prober(1, _TIMEOUT)
        view = self._view
        assert record.netns is not None and view.known is not None
        probes = [prober.from_node(record.address, view.name, record.mac)]
        with contextlib.suppress(exceptions.NetnsUnusable):
            probes += prober.from_pod(record.address, record.netns,
                                      record.namespace, view.known)
        # What break0 should have, and has not, is reported by itself.
        silent = [probe for probe in probes if not probe.answered
                  and probe.to in {record.address, *view.node.seen.own}]
        return next((probe for probe in silent if probe.misrouted),
                    silent[0] if silent else None)

    def _traced(self, record: Record,
                send: Callable[[], object]) -> Optional[trace.Trace]:
        """Return the trace of what is sent; None if there can be none."""
        with contextlib.suppress(exceptions.Break0Error, OSError), \
                trace.traced(record.address, trace.places(
                    self._view.name, record)) as found:
            send()
            return found
        return None

    def _explained(self, silent: Sequence[tuple[Record, Probe]]
                   ) -> Iterator[Finding]:
        record, probe = silent[0]
        kind, reason, commands = self._why(record, probe)
        finding = kind.found(
            'a ping %s, to %s, is not answered%s' % (
                'from the node' if probe.direction == 'node to pod'
                else 'from the pod', probe.to, reason and ': ' + reason),
            self.silent, commands=commands, address=record.address)
        yield (finding if kind in (findings.PROBE_UNANSWERED,
                                   findings.FIREWALL_RESTRICTS) else
               dataclasses.replace(finding, severity=findings.ERROR))

    def _why(self, record: Record, probe: Probe
             ) -> tuple[findings.Kind, str, Sequence[str]]:
        """Return the finding, what was seen, and other commands than its."""
        to_pod = probe.direction == 'node to pod'
        found = self._traced(record, lambda: self._unanswered(record))
        # What our own guard drops is an effect of something else.
        dropped = {} if found is None else {
            text: accept for text, accept in found.dropped.items()
            if ' %s-' % guard.PREFIX not in text}
        if dropped:
            accept = [each for each in dropped.values() if each]
            if accept and not to_pod and self._serves(record, probe.to):
                return (findings.FIREWALL_RESTRICTS, '; '.join(dropped),
                        accept)
            return (findings.FIREWALL_DROPS if accept
                    else findings.PACKET_DROPPED, '; '.join(dropped), accept)
        if found is not None and found.rewritten and to_pod:
            return (findings.SOURCE_REWRITTEN, '; '.join(found.rewritten)
                    + '. The pod has no way back to that address',
                    [each for each in found.rewritten.values() if each])
        astray = str(probe.problem) if probe.misrouted else self._astray(
            record, probe, to_pod)
        if astray is not None:
            return findings.PACKET_LOST, astray, ()
        if found is None or not found.is_complete or found.arrived(to_pod):
            ignoring = self._ignoring(record, to_pod)
            if ignoring is not None:
                return findings.PROBE_UNANSWERED, *ignoring
        claimants = self._claimants(record)
        if claimants:
            return findings.ADDRESS_DUPLICATE, (
                '%s is at %s too, by ARP or neighbour discovery' % (
                    record.address, ', '.join(claimants))), ()
        if found is not None and found.is_complete and (
                not found.arrived(to_pod)):
            return findings.PACKET_LOST, '; '.join((
                'it was seen %s' % (', '.join(found.seen) or 'nowhere'),
                *found.dropped)), ()
        return findings.PROBE_UNANSWERED, (
            '' if found is not None and found.is_complete
            else 'its way could not be traced by nft'), ()

    @staticmethod
    def _serves(record: Record, to: IPAddress) -> bool:
        """Return whether the pod reaches a service of the node.

        Then the firewall accepts what is wanted, and pings are not.
        """
        ports = list(_listening())
        with contextlib.suppress(exceptions.NetnsUnusable), \
                kernel.entered(str(record.netns), record.namespace):
            return any(probes.connect(to, port, 1, _TIMEOUT) != [None]
                       for port in ports[:_SERVICES])
        return False

    def _astray(self, record: Record, probe: Probe,
                to_pod: bool) -> Optional[str]:
        """Return by which other interface request or reply leaves."""
        view, ifname = self._view, record.owner.ifname
        path = probe.path
        if not to_pod and path is not None and path.device != ifname:
            return 'the pod sends it through %s, not %s' % (path.device,
                                                            ifname)
        with contextlib.suppress(exceptions.NetnsUnusable), (
                kernel.entered(str(record.netns), record.namespace)
                if to_pod else contextlib.nullcontext()), \
                kernel.Netlink() as netlink:
            back = (path.source if path else None) if to_pod else (
                record.address)
            way = None if back is None else netlink.lookup(
                back, record.address if to_pod else probe.to)
            name = (None if way is None or way.oif is None
                    else kernel.name_of(way.oif))
            if back is not None and name != (ifname if to_pod
                                             else view.name):
                return 'the reply of the %s leaves %s' % (
                    'pod' if to_pod else 'node',
                    'through %s' % name if name else 'nowhere: there is no '
                    'route to %s' % back)
        return None

    @staticmethod
    def _ignoring(record: Record, to_pod: bool
                  ) -> Optional[tuple[str, Sequence[str]]]:
        """Return the sysctl by which pings are ignored, and its command."""
        path = _IGNORING[record.address.version]
        command = 'sysctl -w net/%s=0' % path
        with contextlib.suppress(exceptions.NetnsUnusable):
            if not to_pod:
                if kernel.read_sysctl(path):
                    return '%s of the node is 1' % path, (command,)
                return None
            with kernel.entered(str(record.netns), record.namespace):
                if kernel.read_sysctl(path):
                    return '%s of the pod is 1' % path, (
                        'nsenter --net=%s %s' % (record.netns, command),)
        return None

    @staticmethod
    def _claimants(record: Record) -> list[str]:
        """Ask the LAN who has the address too."""
        with contextlib.suppress(exceptions.Break0Error), kernel.entered(
                str(record.netns), record.namespace):
            return sorted(kernel.claimants(record.owner.ifname,
                                           record.address, _ASKED))
        return []

    def _restricted(self, record: Record) -> Iterator[Finding]:
        """Try a connection, which a firewall may drop that lets pings pass."""
        assert self._view.known is not None
        to = next((each for each in self._view.known.addresses
                   if each.version == record.address.version), None)

        def connect() -> bool:
            assert to is not None
            with kernel.entered(str(record.netns), record.namespace):
                return probes.connect(to, _PORT, 1, _CONNECTED) == [None]

        with contextlib.suppress(exceptions.NetnsUnusable):
            if to is not None and connect():
                found = self._traced(record, connect)
                dropped = found.dropped if found is not None else {}
                if any(dropped.values()):
                    yield findings.FIREWALL_RESTRICTS.found(
                        'pings pass, but a connection from the pod %s to TCP '
                        'port %d of the node does not: %s' % (
                            record.address, _PORT, '; '.join(dropped)),
                        commands=list(filter(None, dropped.values())))

    def _rewritten(self, record: Record) -> Iterator[Finding]:
        """Look which source address the pod sees."""
        view, version = self._view, record.address.version
        with kernel.Netlink() as netlink:
            path = netlink.path_to(record.address)
        if path is None or path.device != view.name or path.source is None:
            return
        sources: list[str] = []
        found = None
        with contextlib.suppress(exceptions.Break0Error, OSError):
            sources = _sources_seen(record)
        if any(source != str(path.source) for source in sources):
            found = self._traced(record, lambda: _sources_seen(record))
            rules = found.rewritten if found is not None else {}
            yield findings.SOURCE_REWRITTEN.found(
                'the pod %s sees the node as %s, not as %s%s' % (
                    record.address, sources[0], path.source,
                    ''.join(': ' + each for each in rules)),
                commands=list(filter(None, rules.values())),
                address=record.address)
        elif kernel.read_sysctl(_FORWARDING[version]) and version == 4:
            rule = firewall.masquerading(view.parent_name or '', view.name)
            if rule is not None:
                yield findings.SOURCE_KEPT.found(
                    'the node forwards, and has the rule: %s' % rule,
                    device=view.name)


def _listening() -> Iterator[int]:
    """Return the TCP ports that somebody on the node listens on."""
    for name in ('tcp', 'tcp6'):
        with contextlib.suppress(OSError), open(
                '/proc/thread-self/net/' + name) as file:
            for fields in map(str.split, file):
                if fields[3] == '0A':  # TCP_LISTEN
                    yield int(fields[1].rpartition(':')[2], 16)


def _sources_seen(record: Record) -> list[str]:
    """Send a datagram to a pod, and return whom it takes for the sender."""
    family = (socket.AF_INET if record.address.version == 4
              else socket.AF_INET6)
    with kernel.entered(str(record.netns), record.namespace):
        # It stays in that namespace, and gets a copy of each datagram.
        wire = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP)
    mark = os.urandom(16)
    with wire, socket.socket(family, socket.SOCK_DGRAM) as own:
        own.sendto(mark, (str(record.address), _PORT))
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            wire.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(socket.timeout):
                data, source = wire.recvfrom(2048)
                if data.endswith(mark):
                    return [str(source[0])]
    return []
