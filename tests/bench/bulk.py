# SPDX-License-Identifier: Apache-2.0

"""A sync of many pods, against ``ip -batch`` with the same."""

from __future__ import annotations

import statistics

from kuryr_break0 import manager
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.bench import timed

SIZES = (1000, 10000)
BATCH = 'ip -batch'
FROM_NOTHING = 'sync from nothing'
NOTHING_TO_DO = 'sync with nothing to do'


def syncs(node: Node, repeat: int) -> Section:
    """All routes and neighbours of so many pods, set at once."""
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
        for number in range(min(repeat, 9)):
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
    medians = {name: {size: statistics.median(taken)
                      for size, taken in by_size.items()}
               for name, by_size in times.items()}
    low, high = SIZES
    targets = [at_most('%s, %d pods' % (name, low), medians[name][low],
                       medians[BATCH][low], 6, BATCH)
               for name in (FROM_NOTHING, NOTHING_TO_DO)]
    for name in (FROM_NOTHING, NOTHING_TO_DO):
        growth = medians[name][high] / medians[name][low]
        targets.append(Target('%s, %d against %d: at most 12 x' % (
            name, high, low), '%.1f x' % growth, growth <= 12))
    return Section(
        'All pods of a node at once, median ms',
        ['way', *('%d pods' % size for size in SIZES)],
        [[name, *('%.0f' % taken for taken in by_size.values())]
         for name, by_size in medians.items()],
        targets, {'medians_ms': medians})
