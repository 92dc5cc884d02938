# SPDX-License-Identifier: Apache-2.0

"""Traces packets between a node and a pod, to the rule that drops them.

A table of its own marks these packets (``meta nftrace``), on the node and in
the pod, and ``nft monitor trace`` prints each rule that they come to, those of
iptables-nft too. It is removed afterwards. iptables-legacy cannot be traced.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from typing import Callable, ContextManager, Iterator, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.model import IPAddress

_TABLE = 'break0-trace'
_RULES = '''\
table inet {table} {{
    chain prerouting {{
        type filter hook prerouting priority -400; policy accept;
        {family} saddr {address} meta nftrace set 1
        {family} daddr {address} meta nftrace set 1
    }}
    chain output {{
        type filter hook output priority -400; policy accept;
        {family} saddr {address} meta nftrace set 1
        {family} daddr {address} meta nftrace set 1
    }}
}}
table netdev {table} {{
    chain ingress {{
        type filter hook ingress device "{device}" priority -500;
        policy accept;
        {family} saddr {address} meta nftrace set 1
        {family} daddr {address} meta nftrace set 1
    }}
}}
'''
#: Seconds until nft has printed what it heard, and for anything that it does.
_ENDS = 0.4
_TIMEOUT = 10
_NETLINK_NETFILTER = '12'
_LINE = re.compile(r'trace id (?P<id>\w+) (?P<table>\w+ \S+) (?P<chain>\S+) '
                   r'(?P<what>packet:|rule|policy) (?P<text>.*)')


class Place(NamedTuple):
    """A namespace in which packets are traced.

    :ivar name: what it is called in sentences
    :ivar device: the interface that leads to the other side
    :ivar entered: enters it, within the block
    """

    name: str
    device: str
    entered: Callable[[], ContextManager[None]]


class Trace:
    """What was seen of the packets.

    :ivar dropped: sentences, each of what dropped one
    :ivar seen: where packets to and from the pod came by
    """

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.seen: list[str] = []

    def arrived(self, at_pod: bool) -> bool:
        """Return whether a packet to the pod, or from it, has arrived."""
        where = ('to the pod, in the pod' if at_pod
                 else 'from the pod, on the node')
        return any(each.startswith(where) for each in self.seen)

    def explain(self) -> Iterator[str]:
        """Return what is to be said, if packets were not answered."""
        yield from self.dropped
        if self.dropped:
            return
        yield ('no rule of nftables dropped it. It was seen: %s. Between the '
               'last of these and the next, the kernel dropped it for '
               'another reason: rp_filter, a neighbour or an interface; '
               'see kuryr-break0 doctor' % (', '.join(self.seen)
                                            or 'nowhere'))

    def read(self, place: Place, address: IPAddress, text: str) -> None:
        """Take in what ``nft monitor trace`` has printed."""
        for line in text.splitlines():
            found = _LINE.match(line)
            if found is None:
                continue
            table, chain = found['table'], found['chain']
            if table.endswith(' ' + _TABLE):
                if found['what'] == 'packet:':
                    to_pod = ('daddr %s ' % address) in found['text']
                    self._note(self.seen, '%s, %s (%s)' % (
                        'to the pod' if to_pod else 'from the pod',
                        place.name, chain))
            elif found['what'] == 'rule' and 'verdict drop' in found['text']:
                self._note(self.dropped, '%s the table %s, chain %s, drops '
                           'it: %s' % (place.name, table, chain, re.sub(
                               r'\s*\(verdict.*', '', found['text'])))
            elif found['what'] == 'policy' and 'drop' in found['text']:
                self._note(self.dropped, '%s the policy of the table %s, '
                           'chain %s, drops it' % (place.name, table, chain))

    @staticmethod
    def _note(texts: list[str], text: str) -> None:
        if text not in texts:
            texts.append(text)


@contextlib.contextmanager
def traced(address: IPAddress, places: list[Place]) -> Iterator[Trace]:
    """Trace what goes to and from an address, within the block.

    :raises CannotTrace: without nft, or if it refuses
    """
    nft = kernel.find_program('nft')
    if nft is None:
        raise exceptions.CannotTrace(reason='there is no program nft')
    trace = Trace()
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(_traced_at(nft, place, address, trace))
        yield trace
        time.sleep(_ENDS)


@contextlib.contextmanager
def _traced_at(nft: str, place: Place, address: IPAddress,
               trace: Trace) -> Iterator[None]:
    rules = _RULES.format(table=_TABLE, device=place.device, address=address,
                          family='ip' if address.version == 4 else 'ip6')
    monitor: Optional[subprocess.Popen[str]] = None
    try:
        with place.entered():
            # What an earlier one has left, that was killed.
            _remove(nft)
            done = _run(nft, '-f', '-', text=rules)
            if done.returncode:
                raise exceptions.CannotTrace(reason=' '.join(
                    done.stderr.split())[:300])
            monitor = subprocess.Popen(
                [nft, 'monitor', 'trace'], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, errors='replace')
            _wait_until_it_listens(monitor)
        yield
    finally:
        if monitor is not None:
            monitor.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                trace.read(place, address, monitor.communicate(
                    timeout=_TIMEOUT)[0])
        with contextlib.suppress(exceptions.NetnsUnusable), place.entered():
            _remove(nft)


def _wait_until_it_listens(monitor: subprocess.Popen[str]) -> None:
    """Wait for its socket to be in a group, as /proc/net/netlink shows it."""
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline and monitor.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            with open('/proc/%d/net/netlink' % monitor.pid) as file:
                for line in file:
                    # sk Eth Pid Groups ...
                    _, protocol, port, groups, *_ = line.split()
                    if (protocol, port) == (_NETLINK_NETFILTER,
                                            str(monitor.pid)) and (
                            int(groups, 16)):
                        return
        time.sleep(0.02)


def _remove(nft: str) -> None:
    for family in ('inet', 'netdev'):
        _run(nft, 'delete', 'table', family, _TABLE)


def _run(nft: str, *args: str, text: Optional[str] = None
         ) -> subprocess.CompletedProcess[str]:
    return subprocess.run([nft, *args], input=text, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          timeout=_TIMEOUT)
