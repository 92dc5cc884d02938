# SPDX-License-Identifier: Apache-2.0

"""Measures the time from a container's address to its route by discovery."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Callable, ContextManager, Iterator

from kuryr_break0 import kernel
from tests import bench
from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.support import lab
from tests.support import program

CONF = '/run/found.conf'
ADDRESS = ipaddress.ip_address('100.75.30.61')
#: The numbers of idle namespaces, and of the noisy container's macvlans
SIZES = (3000, 1500)
#: Addresses of each of these macvlans
ADDRESSES = 8
#: Measured containers, for each way to start them and each load on the node
TIMES = 15
LIMIT = 300  # ms
#: Program that creates namespaces, each with a user namespace and a process
_IDLE = '''
import ctypes, gc, os, signal, sys
libc = ctypes.CDLL(None)
gc.freeze()
for number in range(int(sys.argv[1])):
    reading, writing = os.pipe()
    if not os.fork():
        libc.prctl(1, signal.SIGKILL)
        os.write(writing, b'%d' % libc.unshare(0x50000000))
        for file in 0, 1, reading, writing:
            os.close(file)
        signal.pause()
    if os.read(reading, 2) != b'0':
        sys.exit('unshare fails')
    os.close(writing)
    os.close(reading)
print('ready', flush=True)
signal.pause()
'''
#: Ends a container
End = Callable[[], None]


@contextlib.contextmanager
def idle(count: int) -> Iterator[None]:
    """Run idle namespaces on the node within the block."""
    say('%d namespaces' % count)
    with subprocess.Popen([sys.executable, '-c', _IDLE, str(count)],
                          stdout=subprocess.PIPE) as processes:
        try:
            assert processes.stdout is not None
            if processes.stdout.readline() != b'ready\n':
                raise Broken('no namespaces can be made')
            yield
        finally:
            processes.kill()


@contextlib.contextmanager
def noisy(node: Node, count: int) -> Iterator[None]:
    """Run a container that keeps changing its addresses within the block.

    :param count: number of the container's macvlans
    """
    say('a container with %d macvlans' % count)
    node.lab.add_pod('noisy', '100.75.30.60')
    with open('/run/noise', 'w') as file:
        for number in range(count):
            file.write('link add m%d link eth0 type macvlan mode bridge\n'
                       % number)
            for host in range(1, ADDRESSES + 1):
                file.write('address add 10.%d.%d.%d/32 dev m%d\n' % (
                    1 + number // 250, number % 250, host, number))
    node.lab.run('ip', '-batch', '/run/noise', netns='noisy')
    with open('/run/noise', 'w') as file:
        for number in range(min(count, 100)):
            for change in (
                    'link set m%d address 02:00:00:01:00:%02x' % (number,
                                                                  number),
                    'address add 10.9.9.%d/32 dev m%d' % (number, number),
                    'address del 10.9.9.%d/32 dev m%d' % (number, number),
                    'link add x link eth0 type macvlan mode bridge',
                    'link del x'):
                file.write(change + '\n')
    noise = subprocess.Popen(
        ['ip', 'netns', 'exec', 'noisy', 'sh', '-c',
         'while :; do ip -batch /run/noise; done'], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(noise.pid, signal.SIGKILL)
        noise.wait()
        node.lab.del_netns('noisy')


def _named(node: Node) -> End:
    """Start a container in a named namespace, like Podman and CNI."""
    netns = node.lab.add_netns('new')
    _add_macvlan(node, netns, False)
    for command in ('link set new up', 'address add %s/24 dev new' % ADDRESS):
        node.lab.run('ip', *command.split(), netns='new')
    return lambda: node.lab.del_netns('new')


def _unnamed(node: Node, is_moved: bool) -> End:
    """Start a container in an unnamed namespace, like LXC or nspawn.

    :param is_moved: True creates the macvlan on the node, and moves it to the
        namespace; False creates it in the namespace
    """
    process = subprocess.Popen(['unshare', '--net', 'sleep', '1000'])

    def end() -> None:
        process.kill()
        process.wait()

    pid = str(process.pid)
    lab.until(lambda: os.readlink('/proc/%s/ns/net' % pid)
              != os.readlink('/proc/self/ns/net'))
    _add_macvlan(node, pid, is_moved)
    for command in ('link set new up', 'address add %s/24 dev new' % ADDRESS):
        node.lab.run('nsenter', '--net', '--target', pid, 'ip',
                     *command.split())
    return end


def _add_macvlan(node: Node, netns: str, is_moved: bool) -> None:
    node.lab.run('ip', 'link', 'add', 'new', 'link', lab.PARENT,
                 *(() if is_moved else ('netns', netns)),
                 'type', 'macvlan', 'mode', 'bridge')
    if is_moved:
        node.lab.run('ip', 'link', 'set', 'new', 'netns', netns)


WAYS: dict[str, Callable[[Node], End]] = {
    'with a name': _named,
    'without, its macvlan moved in': lambda node: _unnamed(node, True),
    'without, its macvlan made there': lambda node: _unnamed(node, False)}


def found(node: Node, repeat: int) -> Section:
    """Measure discovery on an empty node, and beside other containers."""
    with open(CONF, 'w') as file:
        file.write('[break0]\ndiscover = true\nmetrics_bind =\n'
                   'allowed_cidrs = 100.75.30.0/24\n')
    agent = subprocess.Popen(
        [program.BREAK0, '--config-file', CONF, 'agent'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    many, macvlans = SIZES
    others: dict[str, ContextManager[None]] = {
        'empty node': contextlib.nullcontext(),
        '%d idle namespaces' % many: idle(many),
        'and a noisy container': noisy(node, macvlans)}
    times: dict[str, dict[str, list[float]]] = {}
    try:
        with contextlib.ExitStack() as stack:
            _bound(node, _named)  # waits until the agent has started
            for name, other in others.items():
                stack.enter_context(other)
                times[name] = {way: [] for way in WAYS}
                for _ in range(min(repeat, TIMES)):
                    for way, start in WAYS.items():
                        with bench.blamed('%s, %s' % (name, way)):
                            times[name][way].append(_bound(node, start))
    finally:
        agent.terminate()
        agent.wait()
    empty, _, noise = (sorted(each for taken in by_way.values()
                              for each in taken)
                       for by_way in times.values())
    slowest = noise[int(0.95 * len(noise))]
    title = 'a container beside %d namespaces and a noisy one' % many
    return Section(
        'From the address of a container until it is bound, by discovery, ms: '
        'median and slowest',
        ['container', *times],
        [[way, *('%.0f %.0f' % (statistics.median(by_way[way]),
                                max(by_way[way]))
                 for by_way in times.values())] for way in WAYS],
        [Target('%s, 95 %%: at most %d ms' % (title, LIMIT),
                '%.0f ms' % slowest, slowest <= LIMIT),
         at_most(title + ', median', statistics.median(noise),
                 statistics.median(empty), 2.5, 'an empty node')],
        {'times_ms': times})


def _bound(node: Node, start: Callable[[Node], End]) -> float:
    """Start a container, and return the ms until its route exists.

    The time begins when the command that adds the address has ended.
    """
    end = start(node)
    try:
        taken = _until_routed(node, True)
    finally:
        end()
    _until_routed(node, False)
    return taken


def _until_routed(node: Node, is_wanted: bool) -> float:
    began = time.perf_counter()
    with kernel.Netlink() as netlink:
        while True:
            route = netlink.lookup(ADDRESS)
            if is_wanted == (route is not None and route.oif == node.index):
                return 1000 * (time.perf_counter() - began)
            if time.perf_counter() - began > lab.PATIENCE:
                raise Broken('it is not bound' if is_wanted
                             else 'it stays bound')
            time.sleep(0.001)
