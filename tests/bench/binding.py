# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.


"""What Kuryr's binding of a pod takes, alone and with break0."""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
from typing import Callable, Iterator
import uuid

from kuryr_kubernetes.cni.binding import base as b_base
from kuryr_kubernetes.cni.daemon import service  # noqa: F401 (as kuryr-daemon)
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes import objects
import os_vif
from os_vif.objects import instance_info

from kuryr_break0 import config
from kuryr_break0 import vif as break0_vif
from tests.bench import blamed
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests import kuryr
from tests import lab

SIZES = (0, 250, 1000)
#: So many pods are bound by each way before the number of others changes.
ROUND = 2
#: Each is this share of what is repeated elsewhere, since it is slow.
PODS_SHARE = 10
BURSTS_SHARE = 25
BURST = 30
POD = '100.75.30.72'
STOCK = 'stock Kuryr'
KURYR = 'break0, pod_binding = kuryr'
DIRECT = 'break0, pod_binding = direct'

#: By the name of the way and the number of other pods
Times = dict[str, dict[int, list[float]]]
Medians = dict[str, dict[int, float]]


class _Binding:
    """Binds a pod as a request of kuryr-daemon does, in a process forked."""

    def __init__(self, node: Node) -> None:
        k_config.CONF([], project='kuryr', default_config_files=[])
        k_config.CONF.set_override('link_iface', lab.PARENT, group='binding')
        config.register(k_config.CONF)
        objects.register_locally_defined_vifs()
        os_vif.initialize()
        # Its disconnect warns of what it has to delete.
        logging.getLogger('kuryr_kubernetes').setLevel(logging.ERROR)
        self._node = node
        self._netns = node.lab.add_netns('bound')
        stock = kuryr.macvlan_vif(POD)
        ours = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', stock.obj_to_primitive())
        self._vifs = {STOCK: stock, KURYR: ours, DIRECT: ours}

    def connect(self, way: str) -> float:
        """Bind the pod; how long it has taken, in ms."""
        return self._request(way, b_base.connect)

    def disconnect(self, way: str) -> float:
        return self._request(way, b_base.disconnect)

    def verify(self, way: str) -> None:
        """Bind and unbind the pod, and look at what that does."""
        with blamed(way):
            self.connect(way)
            self._require(True, way != STOCK)
            self.disconnect(way)
            self._require(False, False)

    def _require(self, bound: bool, routed: bool) -> None:
        found = [(link['ifname'], address['local'])
                 for link in self._node.lab.ip('address', 'show',
                                               netns='bound')
                 for address in link['addr_info']
                 if address['scope'] == 'global']
        if found != ([('eth0', POD)] if bound else []):
            raise Broken('the pod has %s' % found)
        if (POD in self._node.lab.routes()) != routed:
            raise Broken('its route is wrong')

    def _request(self, way: str, work: Callable[..., None]) -> float:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            # pyroute2 prints at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                k_config.CONF.set_override(
                    'pod_binding', way.rpartition(' ')[2] if way != STOCK
                    else config.KURYR, group=config.GROUP)
                info = instance_info.InstanceInfo(uuid=str(uuid.uuid4()),
                                                  name='bound')
                start = time.perf_counter()
                work(self._vifs[way], info, 'eth0', netns=self._netns,
                     container_id='c' * 64)
                taken = time.perf_counter() - start
                os.write(writing, repr(taken * 1000).encode())
                os._exit(0)
            except BaseException as err:
                os.write(writing, repr(err).encode())
            os._exit(1)
        os.close(writing)
        # Not to its end: Kuryr leaves processes that have it open.
        with open(reading, 'rb', buffering=0) as file:
            answer = file.read(1024).decode()
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise Broken(answer)
        return float(answer)


def binding(node: Node, repeat: int) -> Section:
    """One b_base.connect and disconnect of a pod, by each way."""
    bound = _Binding(node)
    ways = (STOCK, KURYR, DIRECT)
    connects: Times = {way: {size: [] for size in SIZES} for way in ways}
    disconnects: Times = {way: {size: [] for size in SIZES} for way in ways}
    pods = -(-repeat // PODS_SHARE)
    for start in range(0, pods, ROUND):
        say('pod %d of %d bound by Kuryr' % (start + 1, pods))
        for size in SIZES:
            node.resize(size)
            for way in ways:
                bound.verify(way)
            for _ in range(start, min(start + ROUND, pods)):
                for way in ways:
                    with blamed(way):
                        connects[way][size].append(bound.connect(way))
                        disconnects[way][size].append(bound.disconnect(way))
    connect, disconnect = _medians(connects), _medians(disconnects)
    low, _, high = SIZES
    return Section(
        'b_base.connect / disconnect of one pod, median ms',
        ['way', *('%d other pods' % size for size in SIZES),
         'x stock at %d' % low, '%d vs %d' % (high, low)],
        [[way, *('%.0f / %.0f' % (connect[way][size], disconnect[way][size])
                 for size in SIZES),
          '%.2f' % (connect[way][low] / connect[STOCK][low]),
          '%.2f' % (connect[way][high] / connect[way][low])]
         for way in ways],
        _binding_targets(connect),
        {'connect_ms': connect, 'disconnect_ms': disconnect})


def _medians(times: Times) -> Medians:
    return {way: {size: statistics.median(taken)
                  for size, taken in by_size.items()}
            for way, by_size in times.items()}


def _binding_targets(connect: Medians) -> list[Target]:
    low, _, high = SIZES
    growth = connect[KURYR][high] / connect[KURYR][low]
    shares = {size: connect[DIRECT][size] / connect[STOCK][low]
              for size in (low, high)}
    return [
        Target('b_base.connect at %d pods within 1.15 x of %d' % (high, low),
               '%.2f x' % growth, growth <= 1.15),
        *(Target('the same, direct, at %d: at most 0.4 x stock at %d' %
                 (size, low), '%.2f x' % share, share <= 0.4)
          for size, share in shares.items())]


@contextlib.contextmanager
def _daemon(node: kuryr.Node, way: str, stock: str) -> Iterator[None]:
    if way == STOCK:
        node.start_daemon(bin_dir=stock)
    else:
        node.start_daemon(way.partition(', ')[2])
    try:
        yield
    finally:
        node.kill_daemon()


def _burst(node: kuryr.Node, name: str) -> tuple[float, int]:
    """How long so many ADDs at once take, in ms, and how many fail."""
    pods = [node.add_pod('%s-%d' % (name, number), '100.75.30.%d' % number)
            for number in range(100, 100 + BURST)]
    start = time.perf_counter()
    added = node.requests(pods, 'ADD')
    taken = time.perf_counter() - start
    failed = sum(answer.status != 202 for answer in added)
    node.requests(pods, 'DEL')
    for pod in pods:
        node.delete_pod(pod)
        node.lab.run('ip', 'netns', 'del', pod.name)
    return taken * 1000, failed


def bursts(outer: Node, repeat: int) -> Section:
    """Many ADDs at once, through kuryr-daemon."""
    count = -(-repeat // BURSTS_SHARE)
    times: dict[str, list[float]] = {way: [] for way in (STOCK, KURYR,
                                                         DIRECT)}
    failures = dict.fromkeys(times, 0)
    with kuryr.Node() as node:
        stock = kuryr.stock_environment(os.path.join(node.dir, 'venv'))
        for half in range(0, count, -(-count // 2)):
            for way in times:
                with _daemon(node, way, stock):
                    for number in range(half, min(count,
                                                  half + -(-count // 2))):
                        say('burst %d of %d: %s' % (number + 1, count, way))
                        taken, failed = _burst(
                            node, 'pod-%d-%d' % ([*times].index(way),
                                                 number))
                        times[way].append(taken)
                        failures[way] += failed
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    share = medians[DIRECT] / medians[STOCK]
    return Section(
        '%d x %d ADDs at once by kuryr-daemon, median ms of a burst' %
        (count, BURST),
        ['way', 'burst', 'x stock', 'failed'],
        [[way, '%.0f' % median, '%.2f' % (median / medians[STOCK]),
          '%d of %d' % (failures[way], count * BURST)]
         for way, median in medians.items()],
        [Target('a burst, direct: at most 0.6 x stock', '%.2f x' % share,
                share <= 0.6),
         Target('no ADD of the bursts fails, direct',
                '%d' % failures[DIRECT], failures[DIRECT] == 0)],
        {'medians_ms': medians, 'failed': failures,
         'of': count * BURST})
