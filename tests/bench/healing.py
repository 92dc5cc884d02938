# SPDX-License-Identifier: Apache-2.0

"""From the loss of break0 until the agent has restored all."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from kuryr_break0 import kernel
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import unit

PODS = 250
PROGRAM = os.path.join(os.path.dirname(sys.executable), 'kuryr-break0')


def repairs(node: Node, repeat: int) -> Section:
    """break0 is deleted; until the last route is there again."""
    node.resize(PODS)
    agent = subprocess.Popen(
        [PROGRAM, 'agent'], env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        times = deletions(node, min(repeat, 21))
    finally:
        agent.terminate()
        agent.wait()
    median = statistics.median(times)
    return Section(
        'break0 deleted with %d pods bound, until all is restored, ms' % PODS,
        ['times', 'fastest', 'median', 'slowest'],
        [[str(len(times)), *('%.0f' % value for value in
                             (min(times), median, max(times)))]],
        [at_most('break0 deleted with %d pods' % PODS, median, unit(node),
                 60)],
        {'times_ms': times, 'median_ms': median})


def deletions(node: Node, count: int) -> list[float]:
    """Delete break0 so many times, and return the ms until all is there."""
    node.lab.run('ip', 'route', 'flush', 'dev', node.options.device)
    _wait(node)  # until the agent is there
    times = []
    for number in range(count):
        say('repair %d' % (number + 1))
        time.sleep(0.5)
        node.lab.run('ip', 'link', 'del', node.options.device)
        times.append(_wait(node) * 1000)
        node.require(False, False)
    return times


def _wait(node: Node) -> float:
    """Seconds until all have their routes."""
    start = time.perf_counter()
    while kernel.count_host_routes([node.options.device]) != PODS:
        if time.perf_counter() - start > 60:
            raise Broken('the agent does not repair')
        time.sleep(0.001)
    return time.perf_counter() - start
