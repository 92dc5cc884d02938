# SPDX-License-Identifier: Apache-2.0

"""Measures the time of bind and unbind, and of each hold of the lock."""

from __future__ import annotations

import collections
import contextlib
import ipaddress
import multiprocessing
import statistics
import time
from typing import Callable, Iterator
from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import cache
from kuryr_break0 import manager
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import in_child
from tests.bench import keep
from tests.bench import Node
from tests.bench import POD
from tests.bench import ROUTE
from tests.bench import route_pairs
from tests.bench import say
from tests.bench import Section
from tests.bench import timed
from tests.bench import unit
from tests.bench import UNIT
from tests.support import lab

SIZES = (250, 10000)
#: Turns in which each size is measured
TURNS = 5
WORKERS = 30
#: Binds and unbinds of each worker
PAIRS = 20


def calls(node: Node, repeat: int) -> Section:
    """Measure bind and unbind with ledger, node's side and pod's side."""
    say('bind and unbind')
    repeat = max(repeat, 5)
    node.track()
    low, high = SIZES
    times: dict[int, dict[str, list[float]]] = {
        size: collections.defaultdict(list) for size in SIZES}
    forked_times: dict[str, list[float]] = collections.defaultdict(list)
    with route_pairs(node) as route_pair:
        # The sizes alternate, since the machine's speed changes within
        # minutes.
        for number in range(TURNS):
            for size in SIZES:
                say('%d pods, turn %d' % (size, number + 1))
                node.resize(size)
                _measure(node, max(repeat // TURNS, 1), timed, route_pair,
                         times[size])
        node.resize(low)
        keep()
        kernel.share_nft()  # as kuryr-daemon does before it forks
        _measure(node, repeat, lambda call: in_child(lambda: timed(call)),
                 route_pair, forked_times)
    with node.ledger.heartbeat.keep() as beat:
        beat()
        attended = statistics.median(
            in_child(lambda: timed(node.housekeep)) for _ in range(repeat))
    # The kernel walks the whole conntrack table, and sizes the table by the
    # machine's memory.
    forgetting = statistics.median(
        timed(lambda: kernel.delete_connections(POD)) for _ in range(repeat))
    medians = {
        name: {call: statistics.median(taken) for call, taken in each.items()}
        for name, each in (('%d pods' % low, times[low]),
                           ('%d pods' % high, times[high]),
                           ('%d pods, just forked' % low, forked_times))}
    few, many, forked = medians.values()
    processes = unit(node)
    targets = [
        at_most('bind and unbind at %d pods' % low,
                few['bind'] + few['unbind'], few[ROUTE], 5.5, ROUTE),
        at_most('the same, just forked, with an agent',
                forked['bind'] + forked['unbind'] + 2 * attended,
                forked[ROUTE], 5.5, ROUTE + ', just forked')]
    targets += [at_most('%s at %d pods' % (name, high), many[name],
                        few[name], 1.5, 'that at %d' % low)
                for name in ('bind', 'unbind')]
    return Section(
        'Time of kuryr-break0 per pod, median ms', ['call', *medians],
        [*([name, *('%.3f' % by_name[name] if name in by_name else '-'
                    for by_name in medians.values())] for name in few),
         ['housekeeping with an agent', '-', '-', '%.3f' % attended],
         ['of an unbind, to forget connections', '%.3f' % forgetting, '-',
          '-'],
         [UNIT, '%.3f' % processes, '-', '-']],
        targets, {'medians_ms': medians, 'attended_ms': attended,
                  'unit_ms': processes})


def _measure(node: Node, repeat: int,
             measure: Callable[[Callable[[], None]], float],
             route_pair: Callable[[], None],
             times: dict[str, list[float]]) -> None:
    """Add the ms of each call to the times, by the call's name."""
    for name, cached in (('bind', cache.MAX_AGE),
                         ('bind, a while later', 0)):
        with mock.patch.object(cache, 'MAX_AGE', cached):
            for _ in range(repeat):
                times[name].append(measure(node.bind))
                times['unbind'].append(measure(node.unbind))
                times[ROUTE].append(measure(route_pair))
    # Housekeeping is measured last, since it reads enough data to replace the
    # content of the CPU's caches.
    times['housekeeping'] += [measure(node.housekeep) for _ in range(repeat)]


class TimedLedger(ledger.Ledger):
    """A ledger that records for how many seconds its lock is held."""

    held: list[float] = []

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with super().lock():
            start = time.perf_counter()
            try:
                yield
            finally:
                self.held.append(time.perf_counter() - start)


def _work(number: int, node: Node, results: multiprocessing.Queue[list[float]]
          ) -> None:
    address = ipaddress.ip_address('100.75.31.%d' % number)
    owner = ledger.Owner('%064x' % number, 'eth0')
    manager.Ledger = TimedLedger  # type: ignore[misc]
    # Each worker must get the lock, even on a slow machine.
    TimedLedger.__init__.__defaults__ = (3600,)  # type: ignore[misc]
    try:
        for _ in range(PAIRS):
            manager.Break0Manager(node.options).bind(
                owner, [address], parent=lab.PARENT, mac='fa:16:3e:02:00:01')
            manager.Break0Manager(node.options).unbind(owner, [address])
    finally:
        results.put(TimedLedger.held)


def lock(node: Node, repeat: int) -> Section:
    """Measure how long the lock is held while many workers wait for it."""
    say('%d workers at once' % WORKERS)
    node.resize(250)
    node.track()
    keep()
    kernel.share_nft()  # as kuryr-daemon does before it forks
    TimedLedger.held.clear()  # each worker has a copy of this list
    forks = multiprocessing.get_context('fork')
    results = forks.Queue()
    workers = [forks.Process(target=_work, args=(number, node, results))
               for number in range(1, WORKERS + 1)]
    for worker in workers:
        worker.start()
    # The unit is measured while the workers run, and shares the processors
    # with them.
    processes = unit(node)
    held = sorted(seconds * 1000 for _ in workers for seconds in results.get())
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise Broken('a worker has failed')
    low, middle, high = (statistics.quantiles(held, n=100)[place - 1]
                         for place in (50, 90, 99))
    return Section(
        'The lock held by %d workers at once, ms' % WORKERS,
        ['holds', 'median', '90 %', '99 %', 'longest'],
        [['%d' % len(held), *('%.3f' % value for value in
                              (low, middle, high, held[-1]))]],
        [at_most('99 % of all holds', high, processes, 1)],
        {'unit_ms': processes, 'holds': len(held), 'median_ms': low,
         'p90_ms': middle, 'p99_ms': high, 'longest_ms': held[-1]})
