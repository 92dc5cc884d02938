# SPDX-License-Identifier: Apache-2.0

"""Pings between node and pods.

Lost pings show faults that no check covers, such as firewalls, marks and
policy routing. The kernel's trace then shows the rule that drops the packet.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import time
from typing import Callable, Iterator, Optional, Sequence, TypeVar

from kuryr_break0.break0 import guard
from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import inside
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor.prober import Probe
from kuryr_break0.doctor.prober import Prober
from kuryr_break0.doctor import trace
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import probes
from kuryr_break0 import model

_T = TypeVar('_T')
#: Seconds to wait for an answer, and the number of silent pods after which
#: no more pods are pinged.
_TIMEOUT = 0.5
_ENOUGH = 3
#: Seconds between retries, and number of retries. The IPv6 addresses of a new
#: pod are tentative for about a second.
_SETTLED, _TRIES = 1.0, 3
#: Seconds to wait for a connection. The kernel sends a second SYN after one
#: second.
_CONNECTED = 2.5
#: The discard port (RFC 863), normally without a listener. A refused
#: connection is an answer too.
_PORT = 9
#: Largest number of the node's services to try.
_SERVICES = 8
_IGNORING = {4: 'ipv4/icmp_echo_ignore_all', 6: 'ipv6/icmp/echo_ignore_all'}


class Pings:
    """Pings between the node and the pods on one parent.

    :ivar pinged: number of pinged addresses
    :ivar silent: addresses with unanswered pings, in either direction
    """

    def __init__(self, node: Node, parent: Parent) -> None:
        self._node = node
        self._parent = parent
        self.pinged = 0
        self.silent: list[model.IPAddress] = []

    def check(self, records: Sequence[model.Record]) -> Iterator[Finding]:
        """Ping the addresses of pods, and report lost pings.

        :raises NotPermitted: without CAP_NET_RAW
        """
        silent: dict[model.Record, Probe] = {}
        for record in self._node.over(records):
            self.pinged += 1
            silent.update(self._unanswered(record))
            if len({each.owner for each in silent}) >= _ENOUGH:
                break
        for _ in range(_TRIES):
            if silent:
                time.sleep(_SETTLED)
                silent = {record: probe for each in silent for record, probe
                          in self._unanswered(each).items()}
        self._node.refresh()
        self.silent = self._node.settled(each.address for each in silent)
        for record, probe in silent.items():
            if record.address in self.silent:
                yield self._explained(record, probe)
                break
        answering = [record for record in records
                     if record.address not in self.silent]
        yield from self._restricted(answering)
        # Examine one pod for each version of IP; stop at the first finding.
        yield from itertools.islice(itertools.chain.from_iterable(
            map(self._rewritten, {record.address.version: record
                                  for record in answering}.values())), 1)

    def _unanswered(self, record: model.Record) -> dict[model.Record, Probe]:
        """Return an unanswered probe of a record, by record; empty if none.

        If several probes are unanswered, a misrouted probe is preferred,
        because it shows the cause.
        """
        prober = Prober(1, _TIMEOUT)
        assert record.netns is not None and self._parent.node is not None
        tried = [prober.probe(record.address, self._parent.device, record.mac)]
        with contextlib.suppress(exceptions.NetnsUnusable):
            tried += prober.from_pod(record.address, record.netns,
                                     record.namespace, self._parent.node)
        # A missing address of break0 has its own finding, so pings to such an
        # address do not count.
        silent = [probe for probe in tried if not probe.answered
                  and probe.to in {
                      record.address,
                      *self._node.snapshot.facts.node_addresses}]
        return {record: max(silent, key=lambda probe: probe.misrouted)
                } if silent else {}

    def _traced(self, record: model.Record,
                send: Callable[[], object]) -> trace.Trace:
        """Call a function, and return the trace of its packets.

        :returns: an empty trace if the packets cannot be traced
        """
        with contextlib.suppress(exceptions.Break0Error, OSError), \
                trace.traced(record.address, trace.places(
                    self._parent.device, record)) as traced:
            send()
            return traced
        return trace.Trace(is_complete=False)

    def _explained(self, record: model.Record, probe: Probe) -> Finding:
        kind, reason, commands = self._why(record, probe)
        return KINDS[kind].finding(
            'a ping %s is not answered%s' % (
                'from the node to the pod %s at %s' % (
                    record.owner_text, probe.to) if probe.is_to_pod
                else 'from the pod %s to the node at %s' % (
                    record.owner_text, probe.to), reason and ': ' + reason),
            self.silent, commands, address=record.address,
            severity=ERROR if kind == 'source-rewritten' else None)

    def _why(self, record: model.Record, probe: Probe
             ) -> tuple[str, str, Sequence[str]]:
        """Return the id of the finding, the cause, and commands.

        If no commands are returned, the commands of the finding's template
        apply.
        """
        traced = self._traced(record, lambda: self._unanswered(record))
        arrived = traced.arrived(probe.is_to_pod)
        dropped = _but_by_guard(traced)
        accept = list(filter(None, dropped.values()))
        if dropped:
            kind = ('packet-dropped' if not accept
                    else 'firewall-restricts' if not probe.is_to_pod
                    and self._serves(record, probe.to) else 'firewall-drops')
            return kind, '; '.join(dropped), accept
        if traced.rewritten and probe.is_to_pod:
            return 'source-rewritten', (
                '; '.join(traced.rewritten)
                + '. The pod has no route to that address'), list(
                    filter(None, traced.rewritten.values()))
        astray = str(probe.problem) if probe.misrouted else self._astray(
            record, probe)
        if astray is not None:
            return 'packet-lost', astray, () if probe.is_to_pod else [
                inside(record.netns, 'ip route get %s', probe.to),
                inside(record.netns, 'ip route show table all')]
        if arrived or not traced.is_complete:
            ignoring = self._ignoring(record, probe.is_to_pod)
            if ignoring is not None:
                return 'probe-unanswered', *ignoring
        claimants = _asked(record, lambda: kernel.find_claimants(
            record.owner.ifname, record.address))
        if claimants:
            return 'address-duplicate', (
                '%s is at %s too, as ARP or neighbour discovery shows' % (
                    record.address, ', '.join(claimants))), ()
        if traced.is_complete and not arrived:
            return 'packet-lost', '; '.join((
                'the trace saw packets: ' + traced.way, *traced.dropped)), ()
        return 'probe-unanswered', '' if traced.is_complete else (
            'nft could not trace the packets'), ()

    @staticmethod
    def _serves(record: model.Record, to: model.IPAddress) -> bool:
        """Return whether the pod can connect to a service of the node.

        If the pod can connect, the firewall may drop pings on purpose.
        """
        ports = list(_listening())[:_SERVICES]
        return bool(_asked(record, lambda: any(
            probes.connect(to, port, 1, _TIMEOUT) != [None]
            for port in ports)))

    def _astray(self, record: model.Record, probe: Probe) -> Optional[str]:
        """Return the wrong outgoing interface of the request or reply.

        :returns: a sentence; None if no wrong interface was found
        """
        path, ifname = probe.path, record.owner.ifname
        if path is None or path.source is None:
            return None
        if not probe.is_to_pod and path.device != ifname:
            return 'the pod sends the ping through %s, not %s' % (
                path.device, ifname)
        source = path.source

        def of_reply() -> str:
            with kernel.Netlink() as netlink:
                way = netlink.lookup(source, probe.to)
            return kernel.format_ifname(way.oif) if way and way.oif else ''

        who, expected, leaves = (
            ('pod', ifname, _asked(record, of_reply)) if probe.is_to_pod
            else ('node', self._parent.device, of_reply()))
        if leaves == '':
            return 'the %s cannot reply: it has no route to %s' % (who, source)
        return None if leaves in (None, expected) else (
            'the reply of the %s to %s leaves through %s, not %s' % (
                who, source, leaves, expected))

    @staticmethod
    def _ignoring(record: model.Record, is_to_pod: bool
                  ) -> Optional[tuple[str, Sequence[str]]]:
        """Return the sysctl that ignores pings, and a command to reset it.

        :returns: None if pings are not ignored
        """
        path = _IGNORING[record.address.version]
        command = 'sysctl -w net/%s=0' % path
        who, value, command = (
            ('pod', _asked(record, lambda: kernel.read_sysctl(path)),
             inside(record.netns, command)) if is_to_pod
            else ('node', kernel.read_sysctl(path), command))
        return ('%s of the %s is 1' % (path, who), [command]
                ) if value else None

    def _restricted(self, records: Sequence[model.Record]
                    ) -> Iterator[Finding]:
        """Report a firewall that accepts pings but drops connections."""
        hosts = {each.version: each for each in reversed(
            self._parent.node.addresses if self._parent.node else ())}

        def is_lost(record: model.Record) -> bool:
            to = hosts.get(record.address.version)
            return to is not None and [None] == _asked(
                record, lambda: probes.connect(to, _PORT, 1, _CONNECTED))

        lost = next(filter(is_lost, records), None)
        if lost is not None:
            dropped = _but_by_guard(self._traced(
                lost, functools.partial(is_lost, lost)))
            if dropped:
                yield KINDS['firewall-restricts'].finding(
                    'pings pass, but a connection from the pod %s at %s to '
                    'TCP port %d of the node does not: %s' % (
                        lost.owner_text, lost.address, _PORT,
                        '; '.join(dropped)),
                    commands=list(filter(None, dropped.values())))

    def _rewritten(self, record: model.Record) -> Iterator[Finding]:
        """Report a changed source address, or a missing masquerade rule."""
        device = self._parent.device
        with kernel.Netlink() as netlink:
            path = netlink.path_to(record.address)
        if path is None or path.device != device or path.source is None:
            return
        source = _read_source(record)
        if source not in (None, str(path.source)):
            rules = self._traced(
                record, lambda: _read_source(record)).rewritten
            yield KINDS['source-rewritten'].finding(
                'the pod %s at %s sees the node as %s, not as %s%s' % (
                    record.owner_text, record.address, source, path.source,
                    ''.join(': ' + each for each in rules)),
                commands=list(filter(None, rules.values())),
                address=record.address)
        elif record.address.version == 4 and kernel.read_sysctl(
                'ipv4/ip_forward'):
            rule = firewall.masquerading(self._parent.name, device)
            if rule is not None:
                yield KINDS['source-kept'].finding(
                    'the node forwards packets, and has the rule: %s'
                    % rule[0],
                    command=rule[1])


def _but_by_guard(traced: trace.Trace) -> dict[str, str]:
    """Return the rules that dropped packets, and commands to accept them.

    Rules of the guard are left out: the guard drops packets of a probe only
    because of other faults.
    """
    return {text: accept for text, accept in traced.dropped.items()
            if ' %s-' % guard.PREFIX not in text}


def _asked(record: model.Record, ask: Callable[[], _T]) -> Optional[_T]:
    """Call a function in the namespace of a pod.

    :returns: the result; None if the namespace cannot be entered, or the
        kernel refuses
    """
    with contextlib.suppress(exceptions.Break0Error), \
            kernel.enter_namespace(str(record.netns), record.namespace):
        return ask()
    return None


def _listening() -> Iterator[int]:
    """Return the TCP ports of the node that have a listener."""
    for name in ('tcp', 'tcp6'):
        with contextlib.suppress(OSError), open(
                '/proc/thread-self/net/' + name) as file:
            for fields in map(str.split, file):
                if fields[3] == '0A':  # TCP_LISTEN
                    yield int(fields[1].rpartition(':')[2], 16)


def _read_source(record: model.Record) -> Optional[str]:
    """Send a datagram to a pod; return the source that the pod sees."""
    family = (socket.AF_INET if record.address.version == 4
              else socket.AF_INET6)
    mark = os.urandom(16)
    with contextlib.suppress(exceptions.Break0Error, OSError), \
            contextlib.ExitStack() as stack:
        with kernel.enter_namespace(str(record.netns), record.namespace):
            # A socket stays in the namespace that it was created in. A raw
            # socket receives a copy of each datagram (raw(7)).
            wire = stack.enter_context(socket.socket(
                family, socket.SOCK_RAW, socket.IPPROTO_UDP))
        own = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        own.sendto(mark, (str(record.address), _PORT))
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            wire.settimeout(max(0.01, deadline - time.monotonic()))
            data, source = wire.recvfrom(2048)
            if data.endswith(mark):
                return str(source[0])
    return None
