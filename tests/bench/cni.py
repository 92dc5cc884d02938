# SPDX-License-Identifier: Apache-2.0

"""Compares an ADD by the CNI plugin with Debian's plugins."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import statistics
import subprocess
import time
from typing import Any

from tests.bench import at_most
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import timed
from tests.support import program

PLUGINS = '/usr/lib/cni'
SHIM = pathlib.Path(__file__).parents[2] / 'build/cni/break0'
CONF = '/run/bench.conf'
#: Configuration of the plugin tuning, which sets one sysctl
TUNING = {'type': 'tuning', 'sysctl': {'net.ipv4.conf.eth0.arp_notify': '1'}}
MACVLAN = {'type': 'macvlan', 'master': 'eth0', 'ipam': {
    'type': 'host-local', 'dataDir': '/run/ipam', 'ranges': [
        [{'subnet': '100.75.30.128/25'}]]}}
OURS = 'break0, by shim and agent'
SCRIPT = 'break0, in one process'
NAMES = ('macvlan with host-local', 'tuning', OURS, SCRIPT)
MAX_RATIO = 2.5  # largest allowed ratio to tuning


def adds(node: Node, repeat: int) -> Section:
    """Measure an ADD by each plugin, in turns."""
    open(CONF, 'w').close()
    with open('/run/script', 'w') as file:
        file.write('#!/bin/sh\nexec %s --config-file %s cni\n'
                   % (program.BREAK0, CONF))
    os.chmod('/run/script', 0o755)
    for name in ('config', 'previous'):
        open('/run/' + name, 'w').close()
    netns = node.lab.add_netns('container')
    with open('/run/agent.log', 'w') as log:
        agent = subprocess.Popen(
            [program.BREAK0, '--config-file', CONF, 'agent'], stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists('/run/kuryr-break0/cni.sock'):
            if time.monotonic() > deadline:
                raise Broken('the agent does not serve CNI requests')
            time.sleep(0.05)
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(repeat):
            if number % 50 == 0:
                say('CNI, round %d' % (number + 1))
            _round(netns, times, with_script=number % 20 == 0)
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait()
    medians = {name: statistics.median(values)
               for name, values in times.items()}
    return Section(
        'An ADD by a CNI plugin, process included, in ms',
        ['plugin', 'median', '99 %', 'x tuning'],
        [[name, '%.2f' % medians[name],
          '%.2f' % sorted(values)[int(len(values) * .99)],
          '%.2f' % (medians[name] / medians['tuning'])]
         for name, values in times.items()],
        [at_most('an ADD by the shim', medians[OURS], medians['tuning'],
                 MAX_RATIO, 'tuning')],
        {'medians': medians, 'times': times})


def _round(netns: str, times: dict[str, list[float]],
           with_script: bool) -> None:
    macvlan, tuning = ('%s/%s' % (PLUGINS, each)
                       for each in ('macvlan', 'tuning'))
    times[NAMES[0]].append(timed(lambda: _call(
        macvlan, 'ADD', MACVLAN, netns, '/run/previous')))
    with open('/run/previous') as file:
        previous = json.load(file)
    config = {'prevResult': previous}
    times[NAMES[1]].append(timed(lambda: _call(
        tuning, 'ADD', {**TUNING, **config}, netns)))
    ours = {'type': 'break0', **config}
    times[OURS].append(timed(lambda: _call(str(SHIM), 'ADD', ours, netns)))
    if not os.listdir('/run/kuryr-break0/addresses'):
        raise Broken('the ADD has bound nothing')
    _call(str(SHIM), 'DEL', ours, netns)
    if os.listdir('/run/kuryr-break0/addresses'):
        raise Broken('the DEL has left something')
    if with_script:
        times[SCRIPT].append(timed(lambda: _call(
            '/run/script', 'ADD', ours, netns)))
        _call(str(SHIM), 'DEL', ours, netns)
    _call(macvlan, 'DEL', MACVLAN, netns)


def _call(plugin: str, command: str, config: dict[str, Any], netns: str,
          output: str = '/dev/null') -> None:
    with open('/run/config', 'w') as file:
        json.dump({'cniVersion': '1.0.0', 'name': 'lan', **config}, file)
    with open('/run/config') as given, open(output, 'w') as taken:
        done = subprocess.run(
            [plugin], stdin=given, stdout=taken, env={
                'CNI_COMMAND': command, 'CNI_CONTAINERID': 'c0ffee',
                'CNI_IFNAME': 'eth0', 'CNI_NETNS': netns,
                'CNI_PATH': PLUGINS, 'PATH': os.environ['PATH']})
    if done.returncode:
        raise Broken('%s of %s failed' % (command, plugin))
