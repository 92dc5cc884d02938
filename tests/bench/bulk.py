# SPDX-License-Identifier: Apache-2.0

"""Compares a sync of many pods with other ways to set the same entries."""

from __future__ import annotations

from typing import Callable
from unittest import mock

from kuryr_break0 import guard
from kuryr_break0 import manager
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import own
from tests.bench import ROUTE
from tests.bench import route_unit
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.bench import timed

SIZES = (1000, 10000)
BATCH = 'ip -batch'
FROM_NOTHING = 'sync from nothing'
NOTHING_TO_DO = 'sync with nothing to do'
HELD = 'longest hold of the lock'


def syncs(node: Node, repeat: int) -> Section:
    """Measure syncs that set all routes and neighbours of many pods."""
    times: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in SIZES}
        for name in (BATCH, FROM_NOTHING, NOTHING_TO_DO)}

    def sync() -> None:
        manager.Break0Manager(node.options).sync()

    def flush() -> None:
        device = node.options.device
        node.lab.run('ip', 'route', 'flush', 'dev', device)
        node.lab.run('ip', 'neigh', 'flush', 'dev', device,
                     'nud', 'permanent')

    for size in SIZES:
        node.resize(size)
        node.write_batch('add', node.records(0, size))
        for number in range(min(repeat, 5)):
            say('sync %d of %d pods' % (number + 1, size))
            flush()
            times[BATCH][size].append(timed(node.run_batch))
            node.require(False, False)
            flush()
            times[FROM_NOTHING][size].append(timed(sync))
            node.require(False, False)
            times[NOTHING_TO_DO][size].append(timed(sync))
            if manager.Break0Manager(node.options).sync(dry_run=True):
                raise Broken('a sync leaves something to do')
    # The minimum, since other processes of the machine only add time.
    least = {name: {size: min(taken) for size, taken in by_size.items()}
             for name, by_size in times.items()}
    low, high = SIZES
    route = route_unit(node)
    targets = [at_most('%s, %d pods' % (name, size), least[name][size] / size,
                       route, limit, ROUTE + ' for each')
               for name, size, limit in (
                   (FROM_NOTHING, low, 0.2), (NOTHING_TO_DO, low, 0.15),
                   (NOTHING_TO_DO, high, 0.15))]
    for name in (FROM_NOTHING, NOTHING_TO_DO):
        growth = least[name][high] / least[name][low]
        targets.append(Target('%s, %d against %d: at most 12 x' % (
            name, high, low), '%.1f x' % growth, growth <= 12))
    rows = [[name, '%.0f' % least[name][low], '%.0f' % least[name][high]]
            for name in least]
    held: list[float] = []
    loads = _loads(node, sync, held)
    rows += [[name, '-', '%.0f' % taken]
             for name, taken in (*loads.items(), (HELD, max(held)))]
    targets += [at_most('%s, %d pods' % (name, high), taken / high, route,
                        0.25, ROUTE + ' for each')
                for name, taken in loads.items()]
    targets.append(at_most('%s, %d pods' % (HELD, high), max(held),
                           least[BATCH][high], 0.7, BATCH))
    return Section(
        'All pods of a node at once, ms',
        ['way', *('%d pods' % size for size in SIZES)], rows, targets,
        {'least_ms': least, 'loads_ms': loads, 'held_ms': held,
         'route_ms': route})


def _loads(node: Node, sync: Callable[[], None],
           held: list[float]) -> dict[str, float]:
    """Return the ms of a sync that must load the guard, by its cause.

    :param held: receives the ms for which each sync holds the lock
    """
    table = guard.table_of(node.options.device)
    commands = {'sync, guard deleted': 'delete table netdev ' + table,
                'sync, guard changed':
                    'flush chain netdev %s from-pods' % table}

    def load(command: str) -> float:
        node.lab.run('nft', command)
        return timed(sync)

    found = {}
    with mock.patch.object(manager, 'Ledger', own.TimedLedger):
        own.TimedLedger.held.clear()
        for name, command in commands.items():
            say(name)
            found[name] = min(load(command) for _ in range(5))
            if manager.Break0Manager(node.options).sync(dry_run=True):
                raise Broken('%s leaves something to do' % name)
        held += [1000 * each for each in own.TimedLedger.held]
    return found
