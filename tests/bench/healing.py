# SPDX-License-Identifier: Apache-2.0

"""Measures the time from break0's deletion until traffic flows again."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import time

from kuryr_break0 import kernel
from tests.bench import at_most
from tests.bench import at_most_in_turns
from tests.bench import Broken
from tests.bench import Node
from tests.bench import POD
from tests.bench import ROUTE
from tests.bench import route_units
from tests.bench import say
from tests.bench import Section
from tests.bench import Times
from tests.support import lab
from tests.support import program

PODS = 250


def repairs(node: Node, repeat: int) -> Section:
    """Delete break0, and measure its repair by the agent."""
    node.resize(PODS)
    agent = subprocess.Popen(
        [program.BREAK0, 'agent'],
        env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        times, routes = deletions(node, min(max(repeat, 2), 21))
    finally:
        agent.terminate()
        agent.wait()
    median = statistics.median(times)
    name = 'break0 deleted with %d pods' % PODS
    # The first repair takes longer. The agent imports pyroute2 only when it
    # first creates break0, because pyroute2 takes 10 MiB of memory, and most
    # agents never create break0.
    return Section(
        name + ', until all is restored and a pod and the node hear each '
        'other, ms', ['times', 'first', 'fastest', 'median', 'slowest other'],
        [[str(len(times)), *('%.0f' % value for value in
                             (times[0], min(times), median, max(times[1:])))]],
        [at_most_in_turns(name, times, routes, 200, ROUTE),
         at_most(name + ', the first', times[0], median, 3.5, 'the median'),
         at_most(name + ', the slowest other', max(times[1:]), median, 2.5,
                 'the median')],
        {'times_ms': times, 'routes_ms': routes, 'median_ms': median})


def deletions(node: Node, count: int) -> tuple[Times, Times]:
    """Delete break0 repeatedly.

    :returns: the ms of each repair, and the ms of a route by pyroute2 after
        each repair
    """
    node.bind()
    with contextlib.ExitStack() as stack:
        route_unit = stack.enter_context(route_units(node))
        ends = [stack.enter_context(node.lab.socket(
            socket.AF_INET, socket.SOCK_DGRAM, netns))
            for netns in (None, 'pod')]
        for end, address in zip(ends, (lab.NODE, str(POD))):
            end.bind((address, 9999))
            end.setblocking(False)
        node.lab.run('ip', 'route', 'flush', 'dev', node.options.device)
        _wait(node, ends)  # until the agent has started
        times, routes = [], []
        for number in range(count):
            say('repair %d' % (number + 1))
            time.sleep(0.5)
            # The time starts before ip(8) runs: the agent may finish the
            # repair before ip(8) returns.
            start = time.perf_counter()
            node.lab.run('ip', 'link', 'del', node.options.device)
            _wait(node, ends)
            times.append((time.perf_counter() - start) * 1000)
            node.require(True, True)
            routes.append(route_unit())
    node.unbind()
    return times, routes


def _wait(node: Node, ends: list[socket.socket]) -> None:
    """Wait until all routes exist, and both sockets receive packets.

    :raises Broken: after 60 seconds
    """
    start = time.perf_counter()
    names = [end.getsockname() for end in ends]
    silent = set(ends)
    while silent or kernel.count_host_routes(
            [node.options.device]) != PODS + 1:
        if time.perf_counter() - start > 60:
            raise Broken('the agent does not repair')
        for sender, name in zip(ends, reversed(names)):
            with contextlib.suppress(OSError):  # no route, or a full queue
                sender.sendto(b'x', name)
        time.sleep(0.001)
        for end in ends:
            with contextlib.suppress(OSError):
                end.recv(10)
                silent.discard(end)
    for end in ends:
        with contextlib.suppress(OSError):
            while end.recv(10):
                pass
