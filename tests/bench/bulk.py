# SPDX-License-Identifier: Apache-2.0

"""Compares a sync of many pods with ``ip -batch`` for the same entries."""

from __future__ import annotations

import statistics
from unittest import mock

from kuryr_break0.break0 import guard
from kuryr_break0 import manager
from tests.bench import at_most_in_turns
from tests.bench import Broken
from tests.bench import Node
from tests.bench import own
from tests.bench import ROUTE
from tests.bench import route_units
from tests.bench import say
from tests.bench import Section
from tests.bench import timed
from tests.bench import Times

SIZES = (1000, 10000)
#: Repetitions of each measurement. The measurements alternate, since the
#: machine's speed changes within minutes.
TURNS = 5
BATCH = 'ip -batch'
FROM_NOTHING = 'sync from nothing'
NOTHING_TO_DO = 'sync with nothing to do'
DELETED = 'sync, guard deleted'
CHANGED = 'sync, guard changed'
HELD = 'longest hold of the lock'


def syncs(node: Node, repeat: int) -> Section:
    """Measure syncs that set all routes and neighbours of many pods."""
    times: dict[str, dict[int, Times]] = {
        name: {size: [] for size in SIZES}
        for name in (BATCH, FROM_NOTHING, NOTHING_TO_DO, DELETED, CHANGED,
                     HELD)}
    routes: dict[int, Times] = {size: [] for size in SIZES}
    with mock.patch.object(manager, 'Ledger', own.TimedLedger), \
            route_units(node) as route_unit:
        for number in range(min(repeat, TURNS)):
            for size in SIZES:
                say('syncs of %d pods, turn %d' % (size, number + 1))
                node.resize(size)
                for name, taken in _turn(node, size).items():
                    times[name][size].append(taken)
                routes[size].append(route_unit())
    low, high = SIZES
    targets = [
        at_most_in_turns(
            '%s, %d pods' % (name, size), times[name][size], routes[size],
            limit, ROUTE + ' for each', size)
        for name, size, limit in (
            (FROM_NOTHING, low, 0.3), (NOTHING_TO_DO, low, 0.25),
            (NOTHING_TO_DO, high, 0.25), (DELETED, high, 0.45),
            (CHANGED, high, 0.4))]
    targets += [
        at_most_in_turns('%s, %d against %d' % (name, high, low),
                         times[name][high], times[name][low], 13)
        for name in (FROM_NOTHING, NOTHING_TO_DO)]
    targets.append(at_most_in_turns(
        '%s, %d pods' % (HELD, high), times[HELD][high], times[BATCH][high],
        0.6, BATCH))
    return Section(
        'All pods of a node at once, median ms',
        ['way', *('%d pods' % size for size in SIZES)],
        [[name, *('%.0f' % statistics.median(taken)
                  for taken in by_size.values())]
         for name, by_size in times.items()],
        targets, {'times_ms': times, 'routes_ms': routes})


def _turn(node: Node, size: int) -> dict[str, float]:
    """Measure each way once.

    :returns: the ms by the way's name
    """
    device = node.options.device
    table = guard.table_of(device)

    def sync() -> None:
        manager.Break0Manager(node.options).sync()

    def flush() -> None:
        node.lab.run('ip', 'route', 'flush', 'dev', device)
        node.lab.run('ip', 'neigh', 'flush', 'dev', device,
                     'nud', 'permanent')

    node.write_batch('add', node.records(0, size))
    sync()  # removes the guard entries of deleted pods
    own.TimedLedger.held.clear()
    taken = {}
    flush()
    taken[BATCH] = timed(node.run_batch)
    node.require(False, False)
    flush()
    taken[FROM_NOTHING] = timed(sync)
    node.require(False, False)
    taken[NOTHING_TO_DO] = timed(sync)
    for name, command in ((DELETED, 'delete table netdev ' + table),
                          (CHANGED, 'flush chain netdev %s from-pods'
                           % table)):
        node.lab.run('nft', command)
        taken[name] = timed(sync)
        if manager.Break0Manager(node.options).sync(dry_run=True):
            raise Broken('%s leaves something to do' % name)
    taken[HELD] = 1000 * max(own.TimedLedger.held)
    return taken
