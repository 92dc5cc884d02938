# SPDX-License-Identifier: Apache-2.0

"""Measures reading the next hops of a node with hundreds of interfaces."""

from __future__ import annotations

import statistics

from kuryr_break0 import kernel
from tests.bench import at_most
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import timed
from tests.bench import unit

INTERFACES = 300
SIZES = (250, 10000)


def next_hops(node: Node, repeat: int) -> Section:
    """Measure with few and many pods, and few and many interfaces."""
    say('next hops')
    rows: dict[str, dict[int, float]] = {}
    for name in ('as the node is', '%d interfaces more' % INTERFACES):
        if rows:
            with open('/run/batch', 'w') as file:
                for number in range(INTERFACES // 2):
                    file.write('link add v%d up type veth peer name w%d\n' % (
                        number, number))
            node.run_batch()
        rows[name] = {}
        for size in SIZES:
            node.resize(size)
            rows[name][size] = statistics.median(
                timed(lambda: _read(node)) for _ in range(max(repeat, 5)))
    with open('/run/batch', 'w') as file:
        for number in range(INTERFACES // 2):
            file.write('link del v%d\n' % number)
    node.run_batch()
    few, many = rows.values()
    low, high = SIZES
    return Section(
        'The next hops of the node, median ms',
        ['node', *('%d pods' % size for size in SIZES)],
        [[name, *('%.2f' % by_size[size] for size in SIZES)]
         for name, by_size in rows.items()],
        [at_most('with %d interfaces more' % INTERFACES, many[low],
                 unit(node), 2),
         at_most('at %d pods' % high, few[high], unit(node), 1)],
        {'medians_ms': rows})


def _read(node: Node) -> None:
    with kernel.Netlink() as netlink:
        netlink.next_hops([node.index], node.options.route_protocol)
