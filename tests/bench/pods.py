# SPDX-License-Identifier: Apache-2.0

"""Compares break0 with other ways to set and delete a pod's route."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import socket
import statistics
import struct
import subprocess
import time
from typing import Callable
from unittest import mock

import pyroute2

from kuryr_break0.break0.guard import Guard
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from tests.bench import at_most
from tests.bench import at_most_in_turns
from tests.bench import blamed
from tests.bench import Node
from tests.bench import POD
from tests.bench import ROUTE
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.support import lab

SIZES = (10, 250, 1000)
#: Pairs before the number of pods changes. With short rounds, a slow phase of
#: the machine affects all numbers of pods.
ROUND = 20
POD_HOST = '%s/32' % POD
OURS = 'ours'
UNGUARDED = 'ours, guard = off'
PROCESSES = 'ip processes'
ROUTE_ALONE = 'ours, the route alone'
KEPT_OPEN = 'pyroute2 IPRoute, kept open'
IPDB = 'IPDB per operation'

#: Times by way and number of pods
Medians = dict[str, dict[int, float]]
#: Milliseconds of each pair, by name of the way and number of other pods
Pairs = dict[str, dict[int, list[float]]]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to add the route of a pod and to delete it again.

    :ivar every: 1 to measure every pair; n to measure every n-th pair of a
        slow way
    :ivar recorded: whether the way also writes the ledger
    """

    name: str
    add: Callable[[], object]
    delete: Callable[[], object]
    every: int = 1
    recorded: bool = False


def _ours(node: Node, stack: contextlib.ExitStack) -> list[Way]:
    guarded = node.options
    off = dataclasses.replace(guarded, guard='off')
    # Keep the guard's table, so that no measured change has to load it.
    stack.enter_context(mock.patch.object(Guard, 'remove',
                                          return_value=False))

    def unguarded(call: Callable[[], None]) -> Callable[[], None]:
        def calling() -> None:
            node.options = off
            try:
                call()
            finally:
                node.options = guarded
        return calling

    return [Way(OURS, node.bind, node.unbind, recorded=True),
            Way(UNGUARDED, unguarded(node.bind), unguarded(node.unbind),
                recorded=True),
            Way(ROUTE_ALONE, node.bind_route, node.unbind, recorded=True)]


def _kept_open(node: Node, stack: contextlib.ExitStack) -> Way:
    ipr = stack.enter_context(pyroute2.IPRoute())
    common = {'dst': POD_HOST, 'oif': node.index,
              'proto': node.options.route_protocol}
    return Way(KEPT_OPEN,
               lambda: ipr.route('replace', scope=values.RT_SCOPE_LINK,
                                 prefsrc=lab.NODE, **common),
               lambda: ipr.route('del', scope=wire.RT_SCOPE_NOWHERE,
                                 **common))


def _raw(node: Node, stack: contextlib.ExitStack) -> Way:
    sock = stack.enter_context(socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
    sock.bind((0, 0))

    def ask(kind: int, flags: int) -> None:
        # linux/netlink.h, rtnetlink.h: nlmsghdr, rtmsg; RTA_DST, _OIF and
        # _PREFSRC
        sock.send(struct.pack(
            '=IHHII 8BI HH4s HHI HH4s', 52, kind, flags, 1, 0,
            socket.AF_INET, 32, 0, 0, node.options.route_table,
            node.options.route_protocol, values.RT_SCOPE_LINK,
            values.RTN_UNICAST, 0, 8, 1, POD.packed, 8, 4, node.index,
            8, 7, socket.inet_aton(lab.NODE)))
        answer, error = struct.unpack_from('=4xH10xi', sock.recv(4096))
        if answer != 2 or error:  # an ack is an NLMSG_ERROR with error 0
            raise OSError(-error, os.strerror(-error))

    return Way('raw netlink socket',
               # Both messages have NLM_F_REQUEST and _ACK. The first message
               # also has _REPLACE and _CREATE.
               lambda: ask(24, 0x505),  # RTM_NEWROUTE
               lambda: ask(25, 0x5))  # RTM_DELROUTE


def _processes(node: Node) -> Way:
    def run(*args: str) -> None:
        subprocess.run(('ip', 'route', *args), check=True)

    common = (POD_HOST, 'dev', node.options.device,
              'proto', str(node.options.route_protocol), 'scope', 'link')
    return Way(PROCESSES,
               lambda: run('replace', *common, 'src', lab.NODE),
               lambda: run('del', *common), every=4)


def _ipdb(node: Node) -> Way:
    def add() -> None:
        with pyroute2.IPDB() as ip:
            ip.routes.add({'dst': POD_HOST, 'oif': node.index,
                           'proto': node.options.route_protocol,
                           'scope': values.RT_SCOPE_LINK,
                           'prefsrc': lab.NODE}).commit()

    def delete() -> None:
        with pyroute2.IPDB() as ip:
            ip.routes[POD_HOST].remove().commit()

    return Way(IPDB, add, delete, every=ROUND)


def _verify(node: Node, way: Way) -> None:
    with blamed(way.name):
        way.add()
        node.require(True, way.recorded)
        way.delete()
        node.require(False, False)


def _timed(way: Way) -> float:
    with blamed(way.name):
        start = time.perf_counter()
        way.add()
        way.delete()
        taken = time.perf_counter() - start
    if way.every > 1:
        gc.collect()  # keeps this way's garbage out of the next way's time
    return taken * 1000


def _measure(node: Node, ways: list[Way], repeat: int) -> Pairs:
    times: Pairs = {
        way.name: {size: [] for size in SIZES} for way in ways}
    for start in range(0, repeat, ROUND):
        say('pair %d of %d' % (start + 1, repeat))
        for size in SIZES:
            node.resize(size)
            if start == 0:
                for way in ways:
                    _verify(node, way)
            for number in range(start, min(start + ROUND, repeat)):
                for way in ways:
                    if number % way.every == 0:
                        times[way.name][size].append(_timed(way))
            node.require(False, False)
    return times


def pairs(node: Node, repeat: int) -> Section:
    """Measure bind and unbind of one address, by each way."""
    with contextlib.ExitStack() as stack:
        times = _measure(node, [
            *_ours(node, stack), _kept_open(node, stack), _raw(node, stack),
            _processes(node), _ipdb(node)], repeat)
    medians = {name: {size: statistics.median(taken)
                      for size, taken in by_size.items()}
               for name, by_size in times.items()}
    low, middle, high = SIZES
    ratios = {name: {'to_ours': by_size[middle] / medians[OURS][middle],
                     'growth': by_size[high] / by_size[low]}
              for name, by_size in medians.items()}
    return Section(
        'One bind + unbind of one address, median ms',
        ['way', *('%d pods' % size for size in SIZES),
         'x ours at %d' % middle, '%d vs %d' % (high, low)],
        [[name, *('%.3f' % by_size[size] for size in SIZES),
          *('%.2f' % ratio for ratio in ratios[name].values())]
         for name, by_size in medians.items()],
        _pair_targets(medians, times),
        {'medians_ms': medians, 'ratios': ratios})


def _pair_targets(medians: Medians, times: Pairs) -> list[Target]:
    low, middle, high = SIZES
    ours = medians[OURS]
    growth = ours[high] / ours[low]
    # Like IPDB, ROUTE_ALONE sets no neighbours.
    gain = medians[IPDB][middle] / medians[ROUTE_ALONE][middle]
    route = medians[KEPT_OPEN][middle]
    return [
        at_most('the pair by ours at %d pods' % middle, ours[middle],
                route, 4.5, ROUTE),
        Target('ours at %d within 1.2 x of %d' % (high, low),
               '%.2f x' % growth, growth <= 1.2),
        Target('the route alone: at least 100 x faster than %s at %d' % (
            IPDB, middle), '%.0f x' % gain, gain >= 100),
        # The guard takes a fourth of the time of a pair. The machine's noise
        # would hide the guard in a difference of medians, so compare turns.
        at_most_in_turns(
            'the guard, at %d pods' % middle,
            [guarded - unguarded for guarded, unguarded in zip(
                times[OURS][middle], times[UNGUARDED][middle])],
            times[KEPT_OPEN][middle], 1, ROUTE)]
