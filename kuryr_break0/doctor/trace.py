# SPDX-License-Identifier: Apache-2.0

"""Traces packets between a node and a pod, and finds rules that drop them.

A temporary table on the node and in the pod marks the packets (``meta
nftrace``), and ``nft monitor trace`` prints the rules that the packets
traverse, including rules of iptables-nft. The kernel does not trace
iptables-legacy. For its rules, and for all iptables rules if nft is not
installed, the counters before and after the packets are compared.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from typing import (Callable, ContextManager, Iterator, NamedTuple, Optional)

from kuryr_break0.break0 import guard
from kuryr_break0.doctor import firewall
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import model

_TABLE = 'break0-trace'
_MARK = '''\
        {family} saddr {address} meta nftrace set 1
        {family} daddr {address} meta nftrace set 1
'''
_RULES = '''\
table inet {table} {{
    chain prerouting {{
        type filter hook prerouting priority -400; policy accept;
{mark}    }}
    chain output {{
        type filter hook output priority -400; policy accept;
{mark}    }}
}}
table netdev {table} {{
    chain ingress {{
        type filter hook ingress device "{device}" priority -500;
        policy accept;
{mark}    }}
}}
'''
#: Seconds to wait for nft.
_TIMEOUT = 10
_NETLINK_NETFILTER = '12'
_LINE = re.compile(r'trace id (?P<id>\w+) (?P<table>\w+ \S+) (?P<chain>\S+) '
                   r'(?P<what>packet:|rule|policy) (?P<text>.*)')


class Place(NamedTuple):
    """A namespace in which packets are traced.

    :ivar name: a phrase for sentences, such as ``on the node``
    :ivar device: the interface that leads to the other namespace
    :ivar entered: context manager that enters the namespace
    :ivar is_node: whether this is the namespace of the node
    """

    name: str
    device: str
    entered: Callable[[], ContextManager[None]]
    is_node: bool = False


def places(device: str, record: Optional[model.Record]) -> list[Place]:
    """Return the namespace of the node, and the pod's if it is recorded.

    :param device: the break0 that leads to the pod
    """
    steps = [Place('on the node', device, contextlib.nullcontext, True)]
    if record is not None and record.netns is not None:
        netns, namespace = record.netns, record.namespace
        steps.append(Place('in the pod', record.owner.ifname,
                           lambda: kernel.enter_namespace(netns, namespace)))
    return steps


class Trace:
    """The rules that dropped or changed packets, and the path of the packets.

    :ivar dropped: for each rule that dropped a packet, a sentence, and the
        command that accepts the packet. The command is empty for rules in the
        pod and rules of the guard
    :ivar rewritten: the same for rules that changed the source address
    :ivar hooks: direction, namespace and chain of the packets
    :ivar is_complete: whether nft traced the packets
    """

    def __init__(self, is_complete: bool) -> None:
        self.is_complete = is_complete
        self.dropped: dict[str, str] = {}
        self.rewritten: dict[str, str] = {}
        self.hooks: list[str] = []

    def arrived(self, at_pod: bool) -> bool:
        """Return whether a packet has arrived.

        :param at_pod: whether the destination is the pod, not the node
        """
        where = ('to the pod, in the pod' if at_pod
                 else 'from the pod, on the node')
        return any(each.startswith(where) for each in self.hooks)

    def explain(self) -> Iterator[str]:
        """Yield sentences that explain why packets were not answered."""
        if self.dropped:
            yield from self.dropped
        elif not self.is_complete:
            yield ('no rule of iptables dropped the packet. To trace it '
                   'through nftables, install the program nft')
        else:
            yield ('no rule of nftables dropped the packet. The trace saw '
                   'packets: %s. After the last of these places, the kernel '
                   'dropped a packet for another reason, such as rp_filter, a '
                   'neighbour or an interface; run kuryr-break0 doctor' % (
                       self.way))

    @property
    def way(self) -> str:
        """Return the places that packets passed, in this order."""
        return ', '.join(sorted(self.hooks, key=lambda each: (
            each.startswith('from'),
            each.startswith('from') is ('on the node' in each)))) or 'nowhere'

    def read(self, place: Place, address: model.IPAddress, text: str) -> None:
        """Add the output of ``nft monitor trace``."""
        to_pod: set[str] = set()
        for match in filter(None, map(_LINE.match, text.splitlines())):
            number, table, chain, what, text = match.groups()
            if what == 'packet:':
                if 'daddr %s ' % address in text:
                    to_pod.add(number)
                came_by = '%s the pod, %s (%s)' % (
                    'to' if number in to_pod else 'from', place.name, chain)
                if table.endswith(' ' + _TABLE) and came_by not in self.hooks:
                    self.hooks.append(came_by)
                continue
            where = 'the table %s, chain %s, ' % (table, chain)
            rule = firewall.plain(text)
            accept = '' if guard.PREFIX in table or not place.is_node else (
                firewall.accept(table, chain, place.device,
                                number not in to_pod, what))
            if what == 'policy' and 'drop' in text:
                self.dropped['%s the policy of %sdrops the packet' % (
                    place.name, where)] = accept
            elif what == 'rule' and 'verdict drop' in text:
                self.dropped['%s %sdrops the packet: %s' % (
                    place.name, where, rule)] = accept
            elif what == 'rule' and firewall.rewrites(text):
                self.rewritten['%s %shas: %s' % (
                    place.name, where, rule)] = accept

    def count(self, place: Place, rule: firewall.Rule) -> None:
        """Add a rule whose counter has risen."""
        accept = rule.accept(
            place.device, rule.chain in ('PREROUTING', 'INPUT')
            or ' -i ' in rule.text) if place.is_node else ''
        if rule.drops:
            self.dropped['%s %s' % (place.name, rule)] = accept
        elif firewall.rewrites(rule.text):
            self.rewritten['%s %s' % (place.name, rule)] = accept


@contextlib.contextmanager
def traced(address: model.IPAddress, places: list[Place]) -> Iterator[Trace]:
    """Trace packets to and from an address during a ``with`` block.

    :raises CannotTrace: if neither nft nor iptables is installed, or if nft
        fails
    """
    nft = kernel.find_program('nft')
    if nft is None and kernel.find_program('iptables-save') is None:
        raise exceptions.CannotTrace(
            reason='the program nft is not installed')
    trace = Trace(nft is not None)
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(_counted_at(place, address, trace))
            if nft is not None:
                stack.enter_context(_traced_at(nft, place, address, trace))
        yield trace


@contextlib.contextmanager
def _counted_at(place: Place, address: model.IPAddress,
                trace: Trace) -> Iterator[None]:
    with place.entered():
        before = firewall.counters(address.version)
    yield
    with contextlib.suppress(exceptions.NetnsUnusable), place.entered():
        for rule in firewall.risen(
                before, firewall.counters(address.version), place.device):
            trace.count(place, rule)


@contextlib.contextmanager
def _traced_at(nft: str, place: Place, address: model.IPAddress,
               trace: Trace) -> Iterator[None]:
    rules = _RULES.format(table=_TABLE, device=place.device, mark=_MARK.format(
        address=address, family='ip' if address.version == 4 else 'ip6'))
    monitor: Optional[subprocess.Popen[str]] = None
    try:
        with place.entered():
            # An earlier trace that was killed has left its table.
            _remove(nft)
            completed = _run(nft, '-f', '-', text=rules)
            if completed.returncode:
                raise exceptions.CannotTrace(reason=' '.join(
                    completed.stderr.split())[:300])
            monitor = subprocess.Popen(
                [nft, 'monitor', 'trace'], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, errors='replace')
            _wait(monitor, lambda: _unread(monitor) is not None)
        yield
        _wait(monitor, lambda: _unread(monitor) == 0 and _sleeps(monitor))
    finally:
        if monitor is not None:
            monitor.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                trace.read(place, address, monitor.communicate(
                    timeout=_TIMEOUT)[0])
        with contextlib.suppress(exceptions.NetnsUnusable), place.entered():
            _remove(nft)


def _wait(monitor: subprocess.Popen[str],
          condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while (time.monotonic() < deadline and monitor.poll() is None
           and not condition()):
        time.sleep(0.02)


def _unread(monitor: subprocess.Popen[str]) -> Optional[int]:
    """Return the unread bytes of nft's socket; None before nft listens."""
    with contextlib.suppress(OSError, ValueError), open(
            '/proc/%d/net/netlink' % monitor.pid) as file:
        for line in file:
            # sk Eth Pid Groups Rmem ...
            _, protocol, port, groups, unread, *_ = line.split()
            if (protocol, port) == (_NETLINK_NETFILTER, str(
                    monitor.pid)) and int(groups, 16):
                return int(unread)
    return None


def _sleeps(monitor: subprocess.Popen[str]) -> bool:
    """Return whether nft waits for the next message."""
    with contextlib.suppress(OSError), open(
            '/proc/%d/stat' % monitor.pid) as file:
        return file.read().rpartition(')')[2].split()[0] == 'S'
    return False


def _remove(nft: str) -> None:
    for family in ('inet', 'netdev'):
        _run(nft, 'delete', 'table', family, _TABLE)


def _run(nft: str, *args: str, text: Optional[str] = None
         ) -> subprocess.CompletedProcess[str]:
    return subprocess.run([nft, *args], input=text, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          timeout=_TIMEOUT)
