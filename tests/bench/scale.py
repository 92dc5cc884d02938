# SPDX-License-Identifier: Apache-2.0

"""Measures ``status`` and the agent's memory on a node with many pods."""

from __future__ import annotations

import os
import statistics
import subprocess
import time

import psutil

from kuryr_break0 import manager
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.bench import timed
from tests.support import program

SIZES = (250, 10000)
MIB = 2 ** 20
MAX_MEMORY = 128 * MIB


def scale(node: Node, repeat: int) -> Section:
    """Measure ``status``, and the memory of an agent with frequent syncs."""
    status: dict[int, float] = {}
    memory: dict[int, int] = {}
    environ = {**os.environ, 'OS_BREAK0__METRICS_BIND': '',
               'OS_BREAK0__RESYNC_INTERVAL': '1'}
    for size in SIZES:
        say('status and agent at %d pods' % size)
        node.resize(size)
        status[size] = statistics.median(
            timed(lambda: _status()) for _ in range(min(repeat, 5)))
        agent = subprocess.Popen([program.BREAK0, 'agent'], env=environ,
                                 stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        try:
            time.sleep(5 if size == SIZES[0] else 15)
            memory[size] = psutil.Process(agent.pid).memory_info().rss
        finally:
            agent.terminate()
            agent.wait()
    manager.Break0Manager(node.options).sync()
    sync = min(timed(manager.Break0Manager(node.options).sync)
               for _ in range(5))
    low, high = SIZES
    return Section(
        'A node with many pods', ['what', *('%d pods' % size
                                            for size in SIZES)],
        [['status, ms', *('%.0f' % status[size] for size in SIZES)],
         ["the agent's memory, MiB", *('%.0f' % (memory[size] / MIB)
                                       for size in SIZES)]],
        [at_most('status at %d pods' % high, status[high], sync, 4,
                 'a sync with nothing to do'),
         Target('the agent at %d pods: at most 128 MiB' % high,
                '%.0f MiB' % (memory[high] / MIB),
                memory[high] <= MAX_MEMORY)],
        {'status_ms': status, 'sync_ms': sync, 'memory_bytes': memory})


def _status() -> None:
    done = subprocess.run([program.BREAK0, 'status'], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    # 1 means that the node is out of sync; status has still run completely.
    if done.returncode not in (0, 1):
        raise Broken('status: %s' % done.stderr)
