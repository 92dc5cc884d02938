# SPDX-License-Identifier: Apache-2.0

"""Measures throughput and round trips of the ways between node and pod."""

from __future__ import annotations

import json
import re
import socket
import statistics
import subprocess
import threading
import time
from typing import Callable, Optional

from tests.bench import Broken
from tests.bench import Node
from tests.bench import POD
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.support import lab

BREAK0 = 'break0'
UNGUARDED = 'break0, guard = off'
VETH = 'veth pair into the pod'
HAIRPIN = "the LAN's switch, with hairpin"
VETH_NODE, VETH_POD = '10.99.0.1', '10.99.0.2'
SECONDS = 1
#: Pairs of runs with and without guard, and the bytes of each run
PAIRS = 100
SIZE = 2 ** 26


def paths(node: Node, repeat: int) -> Section:
    """Measure each way, in turns."""
    run = node.lab.run
    run('ip', 'link', 'add', 'veth0', 'type', 'veth',
        'peer', 'name', 'veth0', 'netns', 'pod')
    run('ip', 'address', 'add', VETH_NODE + '/30', 'dev', 'veth0')
    run('ip', 'link', 'set', 'veth0', 'up')
    run('ip', 'address', 'add', VETH_POD + '/30', 'dev', 'veth0', netns='pod')
    run('ip', 'link', 'set', 'veth0', 'up', netns='pod')
    # Without break0, macvlans would need a switch that sends frames back to
    # their port.
    for command in ('link add switch type bridge', 'link set switch up',
                    'address flush dev nic', 'link set nic master switch',
                    'link set nic type bridge_slave hairpin on',
                    'address add %s/%d dev switch' % (lab.LAN, lab.PREFIX)):
        run('ip', *command.split(), netns='lan')

    def bind(guard: str) -> None:
        node.set_guard(guard)
        node.bind()

    ways: dict[str, tuple[str, str, Callable[[], None]]] = {
        BREAK0: (str(POD), lab.NODE, lambda: bind('auto')),
        UNGUARDED: (str(POD), lab.NODE, lambda: bind('off')),
        VETH: (VETH_POD, VETH_NODE, lambda: None),
        HAIRPIN: (str(POD), lab.NODE, lambda: node.unbind(False))}
    results: dict[str, dict[str, list[float]]] = {
        name: {'to': [], 'from': [], 'round_trip': []} for name in ways}
    for number in range(min(repeat, 5)):
        for name, (pod, host, prepare) in ways.items():
            say('%s, round %d' % (name, number + 1))
            prepare()
            if not node.lab.ping(pod):
                raise Broken('%s: the pod does not answer' % name)
            result = results[name]
            result['to'].append(_throughput(node.lab, 'pod', None, pod))
            result['from'].append(_throughput(node.lab, None, 'pod', host))
            result['round_trip'].append(_round_trip(node.lab, pod))
    medians = {name: {what: statistics.median(taken)
                      for what, taken in result.items()}
               for name, result in results.items()}
    node.set_guard('auto')
    return Section(
        'Between node and pod, median',
        ['way', 'node to pod, Gbit/s', 'pod to node, Gbit/s',
         'round trip, us'],
        [[name, '%.1f' % each['to'], '%.1f' % each['from'],
          '%.1f' % each['round_trip']] for name, each in medians.items()],
        [], {'medians': medians})


def guarded(node: Node, repeat: int) -> Section:
    """Measure the guard's cost in throughput, by many short pairs of runs."""
    node.bind()
    times: dict[str, dict[str, list[float]]] = {
        what: {'auto': [], 'off': []} for what in ('to', 'from')}
    for number in range(min(repeat, PAIRS)):
        say('with and without guard, %d' % (number + 1))
        # Alternate the order within a pair.
        for guard in sorted(('auto', 'off'), reverse=bool(number % 2)):
            node.set_guard(guard)
            for what, way in (('to', ('pod', None, str(POD))),
                              ('from', (None, 'pod', lab.NODE))):
                times[what][guard].append(_transfer(node.lab, *way))
    node.set_guard('auto')
    rows, targets = [], []
    for what, title in (('to', 'to a pod'), ('from', 'from a pod')):
        both = times[what]
        cost = statistics.median(
            on / off for on, off in zip(both['auto'], both['off'])) - 1
        rows.append([title, *('%.1f' % (
            SIZE * 8 / 1e9 / statistics.median(taken))
            for taken in both.values()), '%+.1f %%' % (100 * cost)])
        targets.append(Target(
            'throughput %s: the guard costs at most 3 %%' % title,
            '%.1f %%' % (100 * cost), cost <= 0.03))
    return Section(
        'Throughput with and without guard, %d short runs each' % len(
            times['to']['off']),
        ['direction', 'with, Gbit/s', 'without', 'median of the differences'],
        rows, targets, {'seconds': times})


def _transfer(made: lab.Lab, server: Optional[str], client: Optional[str],
              address: str) -> float:
    """Return the seconds for SIZE bytes over one TCP connection."""
    with made.socket(socket.AF_INET, netns=server) as listening:
        listening.bind((address, 0))
        listening.listen()
        with made.socket(socket.AF_INET, netns=client) as sender:
            sender.connect(listening.getsockname())
            with listening.accept()[0] as receiver:
                thread = threading.Thread(
                    target=sender.sendall, args=(bytes(SIZE),))
                buffer, left = bytearray(2 ** 20), SIZE
                start = time.perf_counter()
                thread.start()
                while left:
                    left -= receiver.recv_into(buffer)
                taken = time.perf_counter() - start
                thread.join()
    return taken


def _throughput(made: lab.Lab, server: Optional[str], client: Optional[str],
                address: str) -> float:
    """Return Gbit/s from client to server over one TCP connection."""
    prefix = ['ip', 'netns', 'exec', server] if server else []
    serving = subprocess.Popen(
        [*prefix, 'iperf3', '--server', '--one-off', '--bind', address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(50):  # until the server listens
            done = made.run(
                'iperf3', '--json', '--time', str(SECONDS), '--client',
                address, netns=client, check=False)
            answer = json.loads(done.stdout)
            if 'error' not in answer:
                return float(answer['end']['sum_received']
                             ['bits_per_second']) / 1e9
            time.sleep(0.1)
        raise Broken('iperf3: %s' % answer['error'])
    finally:
        serving.kill()
        serving.wait()


def _round_trip(made: lab.Lab, address: str) -> float:
    """Return the average microseconds of consecutive pings."""
    done = made.run('ping', '-n', '-q', '-A', '-c', '1000', address)
    found = re.search(r' = [\d.]+/([\d.]+)/', done.stdout)
    if found is None:
        raise Broken('ping: ' + done.stdout)
    return float(found.group(1)) * 1000
