# SPDX-License-Identifier: Apache-2.0

"""Measures RunPodSandbox and StopPodSandbox of a pod, as kubelet calls them.

kubelet calls RunPodSandbox of containerd by CRI. containerd runs Kuryr's CNI
plugin, which sends a request to kuryr-daemon. pip installs a plugin in Python,
Kuryr's image has a plugin in Go. If kuryr-daemon has not yet read the pod's
KuryrPort, it checks again every second.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import threading
from typing import Iterator

from tests.bench import at_most
from tests.bench import binding
from tests.bench import blamed
from tests.bench import Broken
from tests.bench import LeftOut
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.bench import timed
from tests.engines import base
from tests.functional.cni.base import PLUGINS
from tests.support import kuryr
from tests.support import lab

GO = pathlib.Path(__file__).parents[2] / 'build/kuryr-cni'
#: Kuryr's CNI plugins by language
KURYR_CNI = {'Python': os.path.join(kuryr.BIN, 'kuryr-cni'), 'Go': str(GO)}
BIN = '/run/cni-bin'
BREAK0 = 'break0'
DAEMONS = (binding.STOCK, BREAK0)
ALONE = 'containerd alone, no network'
#: Seconds from the call until the creation of a late KuryrPort
LATER = 0.3
MOST_MS = 250
#: With the tests' timeout of 20 seconds, the daemon sometimes misses events.
NO_PAUSE = '\n[kubernetes]\nwatch_read_timeout = 3600'
#: Divisor of ``--repeat``, since a sandbox is slow
SHARE = 20
ROUNDS = 2

#: The daemon and the language of the plugin
Way = tuple[str, str]
WAYS = [(daemon, language) for daemon in DAEMONS for language in KURYR_CNI]


class _Host(base.EngineTestCase):
    """The node of a lab, on which containerd runs as in tests.engines."""

    def __init__(self, node: lab.Lab) -> None:
        super().__init__()
        self.lab = node

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        # With chrt(1), the benchmark is a real-time process. The kernel does
        # not move such a process to the control group of a container.
        return super().start('chrt', '--other', '0', *command)


class _Sandboxes:
    """Runs pods of Kuryr by containerd."""

    def __init__(self, node: kuryr.Node, containerd: base.Containerd) -> None:
        self._node = node
        self._containerd = containerd
        self._count = 0
        #: Times in ms
        self.there: dict[Way, list[float]] = {way: [] for way in WAYS}
        self.later: dict[Way, list[float]] = {way: [] for way in WAYS}
        self.stop: dict[Way, list[float]] = {way: [] for way in WAYS}
        self.alone: list[float] = []

    def use(self, language: str) -> None:
        """Install Kuryr's plugin in this language for containerd."""
        os.symlink(KURYR_CNI[language], BIN + '/new')
        os.replace(BIN + '/new', BIN + '/kuryr-cni')

    def measure(self, way: Way) -> None:
        """Run and stop two pods, the second with a late KuryrPort.

        The late KuryrPort is created :data:`LATER` seconds after the call.
        """
        start, stop = self._pod(way, later=0)
        self.there[way].append(start)
        self.stop[way].append(stop)
        self.later[way].append(self._pod(way, LATER)[0])

    def measure_alone(self) -> None:
        """Run a pod on the node's network, which calls no plugin."""
        # security_context { namespace_options { network: NODE } }
        linux = base.message(2, base.message(1, b'\x08\x02'))
        ids: list[str] = []
        self.alone.append(timed(lambda: ids.append(
            self._containerd.run_sandbox('alone', linux=linux))))
        for method in ('StopPodSandbox', 'RemovePodSandbox'):
            self._containerd.call(method, base.message(1, ids[0]))

    def _pod(self, way: Way, later: float) -> tuple[float, float]:
        """Return the durations of start and stop of a pod, in ms.

        :param later: seconds from the call until the KuryrPort is created; 0
            if kuryr-daemon has read the KuryrPort before the call
        """
        self._count += 1
        name = 'sandbox-%d' % self._count
        pod = self._node.add_pod(name, binding.POD, netns='of containerd',
                                 has_port=not later)
        ids: list[str] = []
        port = threading.Timer(later, self._node.add_port, [pod])
        if later:
            port.start()
        else:
            lab.until(lambda: self._is_known(name), self._node.output)
        start = timed(lambda: ids.append(self._containerd.run_sandbox(
            name, 'default', pod.uid)))
        if later:
            port.join()
        self._require(ids[0], way)
        stop = timed(lambda: self._containerd.call(
            'StopPodSandbox', base.message(1, ids[0])))
        if binding.POD in self._node.lab.routes():
            raise Broken('the route of a pod that was stopped is left')
        # Do not call RemovePodSandbox: containerd would call the plugin
        # without CNI_NETNS, and stock Kuryr would delete the node's eth0.
        self._node.delete_pod(pod)
        return start, stop

    def _is_known(self, name: str) -> bool:
        """Return whether kuryr-daemon has read the KuryrPort of a pod."""
        return 'Releasing lock "default/%s"' % name in self._node.output()

    def _require(self, sandbox: str, way: Way) -> None:
        """Check that the pod has its address, and the node a route to it."""
        address = self._containerd.address(sandbox)
        routed = binding.POD in self._node.lab.routes()
        if (address, routed) != (binding.POD, way[0] == BREAK0):
            raise Broken('the pod has %s, and %s route' % (
                address, 'a' if routed else 'no'))


@contextlib.contextmanager
def _containerd(node: kuryr.Node) -> Iterator[base.Containerd]:
    """Run containerd with Kuryr's own network configuration."""
    os.makedirs(BIN)
    os.symlink(PLUGINS + '/loopback', BIN + '/loopback')
    os.makedirs('/run/net.d')
    with open('/run/net.d/10-kuryr.conflist', 'w') as file:
        json.dump({'name': 'kuryr', 'cniVersion': '0.3.1', 'plugins': [
            {'type': 'kuryr-cni', 'kuryr_conf': node.conf,
             'debug': True}]}, file)
    host = _Host(node.lab)
    try:
        yield base.Containerd(host, BIN)
    finally:
        host.doCleanups()
        host.kill_all()


def sandboxes(outer: Node, repeat: int) -> Section:
    """Measure start and stop of a sandbox, by stock Kuryr and with break0.

    :raises LeftOut: without root of the machine
    """
    if not base.is_root():
        raise LeftOut('containerd needs root of the machine')
    if not GO.exists():
        raise Broken('%s is missing: tools/kuryr-cni-in-go %s' % (GO, GO))
    rounds = min(ROUNDS, repeat)
    count = -(-repeat // (SHARE * rounds))
    with kuryr.Node(outer.lab) as node, _containerd(node) as containerd:
        stock = kuryr.stock_environment(os.path.join(node.dir, 'venv'))
        pods = _Sandboxes(node, containerd)
        for number in range(rounds):
            for daemon in DAEMONS:
                say('sandboxes, round %d of %d: %s' % (
                    number + 1, rounds, daemon))
                node.start_daemon(NO_PAUSE, stock if daemon == binding.STOCK
                                  else kuryr.BIN)
                # With an agent's heartbeat, ADD and DEL do no housekeeping.
                with outer.ledger.heartbeat.keep() as beat:
                    beat()
                    for turn in range(count):
                        for way in (each for each in WAYS
                                    if each[0] == daemon):
                            pods.use(way[1])
                            with blamed('%s, %s' % way):
                                pods.measure(way)
                        pods.measure_alone()
                node.kill_daemon()
    return _section(pods)


def _section(pods: _Sandboxes) -> Section:
    there, later, stop = (
        {way: statistics.median(times) for way, times in each.items()}
        for each in (pods.there, pods.later, pods.stop))
    alone = statistics.median(pods.alone)
    ours, stock = there[BREAK0, 'Go'], there[binding.STOCK, 'Go']
    return Section(
        "A pod's sandbox by containerd, median of %d, ms" % len(pods.alone),
        ['way', 'start, KuryrPort there', 'x stock, Go',
         'start, KuryrPort %.1f s later' % LATER, 'stop'],
        [['%s, plugin in %s' % way, '%.0f' % there[way],
          '%.2f' % (there[way] / stock), '%.0f' % later[way],
          '%.0f' % stop[way]] for way in WAYS]
        + [[ALONE, '%.0f' % alone, '%.2f' % (alone / stock), '-', '-']],
        [at_most("a sandbox's start, break0 with Go", ours, stock, 0.5,
                 'stock with Go'),
         Target("a sandbox's start, break0 with Go: at most %d ms" % MOST_MS,
                '%.0f ms' % ours, ours <= MOST_MS)],
        {'alone_ms': pods.alone,
         **{name: {'%s, %s' % way: times for way, times in each.items()}
            for name, each in (('there_ms', pods.there),
                               ('later_ms', pods.later),
                               ('stop_ms', pods.stop))}})
