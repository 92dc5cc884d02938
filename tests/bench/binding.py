# SPDX-License-Identifier: Apache-2.0


"""Measures Kuryr's binding of a pod, alone and with break0."""

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
from kuryr_break0 import kernel
from kuryr_break0.kuryr import vif as break0_vif
from tests.bench import at_most
from tests.bench import blamed
from tests.bench import Broken
from tests.bench import in_child
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.bench import timed
from tests.support import kuryr
from tests.support import lab

SIZES = (0, 250, 1000)
#: Pods bound by each way before the number of other pods changes
ROUND = 2
#: Divisors of ``--repeat``, since the binding of a pod and a burst are slow.
PODS_SHARE = 10
BURSTS_SHARE = 25
BURST = 30
#: Maximum ADDs of one pod by Kuryr alone. On a busy machine, events can
#: disturb its IPDB; kubelet then deletes and adds the sandbox again.
ATTEMPTS = 5
POD = '100.75.30.72'
STOCK = 'stock Kuryr'
KURYR = 'break0, pod_binding = kuryr'
DIRECT = 'break0, pod_binding = auto'

#: Times in ms by way and number of other pods
Times = dict[str, dict[int, list[float]]]
Medians = dict[str, dict[int, float]]


class _Binding:
    """Binds a pod in a forked process, like a request of kuryr-daemon."""

    def __init__(self, node: Node) -> None:
        k_config.CONF([], project='kuryr', default_config_files=[])
        k_config.CONF.set_override('link_iface', lab.PARENT, group='binding')
        config.register(k_config.CONF)
        objects.register_locally_defined_vifs()
        os_vif.initialize()
        # Kuryr's disconnect logs a warning for each interface it deletes.
        logging.getLogger('kuryr_kubernetes').setLevel(logging.ERROR)
        self._node = node
        self._count = 0
        stock = kuryr.macvlan_vif(POD)
        ours = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', stock.obj_to_primitive())
        self._vifs = {STOCK: stock, KURYR: ours, DIRECT: ours}

    @property
    def _name(self) -> str:
        return 'bound-%d' % self._count

    def connect(self, way: str) -> float:
        """Bind a new pod, and return the duration in ms.

        The pod's namespace is new: in a used namespace the kernel would first
        wait until the tables of the deleted interface are unused.
        """
        self._count += 1
        self._node.lab.add_netns(self._name)
        return self._request(way, b_base.connect)

    def disconnect(self, way: str) -> float:
        return self._request(way, b_base.disconnect)

    def deletion(self) -> float:
        """Bind the pod, and return the ms that deleting its eth0 takes."""
        self.connect(DIRECT)
        taken = []

        def delete() -> None:
            with kernel.Netlink() as netlink:
                taken.append(timed(lambda: netlink.delete_link('eth0')))

        self._node.lab.in_netns(delete, self._name)
        self.disconnect(DIRECT)
        return taken[0]

    def verify(self, way: str) -> None:
        """Check that binding and unbinding change addresses and routes."""
        with blamed(way):
            self.connect(way)
            self._require(True, way != STOCK)
            self.disconnect(way)
            self._require(False, False)

    def _require(self, bound: bool, routed: bool) -> None:
        found = [(link['ifname'], address['local'])
                 for link in self._node.lab.ip('address', 'show',
                                               netns=self._name)
                 for address in link['addr_info']
                 if address['scope'] == 'global']
        if found != ([('eth0', POD)] if bound else []):
            raise Broken('the pod has %s' % found)
        if (POD in self._node.lab.routes()) != routed:
            raise Broken('its route is wrong')

    def _request(self, way: str, work: Callable[..., None]) -> float:
        info = instance_info.InstanceInfo(uuid=str(uuid.uuid4()),
                                          name='bound')

        def measure() -> float:
            k_config.CONF.set_override(
                'pod_binding', way.rpartition(' ')[2] if way != STOCK
                else config.KURYR, group=config.GROUP)
            return timed(lambda: work(
                self._vifs[way], info, 'eth0',
                netns='/run/netns/' + self._name,
                container_id='c' * 64))

        return in_child(measure)


def binding(node: Node, repeat: int) -> Section:
    """Measure b_base.connect and disconnect of a pod, by each way."""
    bound = _Binding(node)
    ways = (STOCK, KURYR, DIRECT)
    connects: Times = {way: {size: [] for size in SIZES} for way in ways}
    disconnects: Times = {way: {size: [] for size in SIZES} for way in ways}
    deletions: list[float] = []
    pods = -(-repeat // PODS_SHARE)
    for start in range(0, pods, ROUND):
        say('pod %d of %d bound by Kuryr' % (start + 1, pods))
        for size in SIZES:
            node.resize(size)
            # With an agent's heartbeat, ADD and DEL do no housekeeping.
            with node.ledger.heartbeat.keep() as beat:
                beat()
                for way in ways:
                    bound.verify(way)
                for _ in range(start, min(start + ROUND, pods)):
                    for way in ways:
                        with blamed(way):
                            connects[way][size].append(bound.connect(way))
                            disconnects[way][size].append(
                                bound.disconnect(way))
                    deletions.append(bound.deletion())
    connect, disconnect = _medians(connects), _medians(disconnects)
    low, _, high = SIZES
    deletion = statistics.median(deletions)
    return Section(
        'b_base.connect / disconnect of one pod, median ms',
        ['way', *('%d other pods' % size for size in SIZES),
         'x stock at %d' % low, '%d vs %d' % (high, low)],
        [[way, *('%.0f / %.0f' % (connect[way][size], disconnect[way][size])
                 for size in SIZES),
          '%.2f' % (connect[way][low] / connect[STOCK][low]),
          '%.2f' % (connect[way][high] / connect[way][low])]
         for way in ways] + [
             ['the kernel, to delete a macvlan', '- / %.0f' % deletion,
              *['-'] * len(SIZES), '-']],
        _binding_targets(connect, disconnect, deletion),
        {'connect_ms': connect, 'disconnect_ms': disconnect,
         'deletion_ms': deletion})


def _medians(times: Times) -> Medians:
    return {way: {size: statistics.median(taken)
                  for size, taken in by_size.items()}
            for way, by_size in times.items()}


def _binding_targets(connect: Medians, disconnect: Medians,
                     deletion: float) -> list[Target]:
    low, _, high = SIZES
    stock, direct = disconnect[STOCK][low], disconnect[DIRECT][low]
    return [
        *(at_most('connect at %d pods, %s' % (high, way), connect[way][high],
                  connect[way][low], 1.15, 'that at %d' % low)
          for way in (KURYR, DIRECT)),
        *(at_most('connect at %d pods, %s' % (size, DIRECT),
                  connect[DIRECT][size], connect[STOCK][low], 0.1,
                  'stock at %d' % low) for size in (low, high)),
        at_most('disconnect at %d pods, %s' % (low, DIRECT), direct, stock,
                0.8, 'stock at %d' % low),
        at_most("the same, without the kernel's time in both",
                direct - deletion, stock - deletion, 0.4,
                'stock at %d' % low)]


#: Text of sitecustomize.py, which records the ms for which the lock is held
_NOTING = '''
import contextlib
import time

from kuryr_break0 import ledger


class Ledger(ledger.Ledger):

    @contextlib.contextmanager
    def lock(self):
        with super().lock():
            start = time.perf_counter()
            try:
                yield
            finally:
                taken = time.perf_counter() - start
        with open(%r, 'a') as file:
            file.write('%%f\\n' %% (taken * 1000))


ledger.Ledger = Ledger
'''


@contextlib.contextmanager
def _daemon(node: kuryr.Node, way: str, stock: str) -> Iterator[list[float]]:
    """Run kuryr-daemon in the block, and yield a list.

    After the block, the list has the ms of each hold of the ledger's lock. For
    stock Kuryr, the list stays empty.
    """
    held: list[float] = []
    path = os.path.join(node.dir, 'held')
    if way == STOCK:
        node.start_daemon(bin_dir=stock)
    else:
        with open(os.path.join(node.dir, 'sitecustomize.py'), 'w') as file:
            file.write(_NOTING % path)
        node.start_daemon(way.partition(', ')[2], PYTHONPATH=node.dir)
    try:
        yield held
    finally:
        node.kill_daemon()
        if way != STOCK:
            with open(path) as file:
                held += map(float, file)
            os.unlink(path)


def _burst(node: kuryr.Node, name: str) -> tuple[float, int]:
    """Return the ms that a burst of ADDs takes, and the number of errors."""
    pods = [node.add_pod('%s-%d' % (name, number), '100.75.30.%d' % number)
            for number in range(100, 100 + BURST)]
    start = time.perf_counter()
    added = node.requests(pods, 'ADD')
    taken = time.perf_counter() - start
    failed = sum(answer.status != 202 for answer in added)
    node.requests(pods, 'DEL')
    for pod in pods:
        node.delete_pod(pod)
        node.lab.del_netns(pod.name)
    return taken * 1000, failed


def bursts(outer: Node, repeat: int) -> Section:
    """Measure bursts of concurrent ADDs through kuryr-daemon."""
    count = -(-repeat // BURSTS_SHARE)
    times: dict[str, list[float]] = {way: [] for way in (STOCK, KURYR,
                                                         DIRECT)}
    failures = dict.fromkeys(times, 0)
    holds: dict[str, list[float]] = {way: [] for way in times}
    with kuryr.Node() as node:
        stock = kuryr.stock_environment(os.path.join(node.dir, 'venv'))
        for half in range(0, count, -(-count // 2)):
            for way in times:
                with _daemon(node, way, stock) as held:
                    for number in range(half, min(count,
                                                  half + -(-count // 2))):
                        say('burst %d of %d: %s' % (number + 1, count, way))
                        taken, failed = _burst(
                            node, 'pod-%d-%d' % ([*times].index(way),
                                                 number))
                        times[way].append(taken)
                        failures[way] += failed
                holds[way] += held
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    return Section(
        '%d x %d ADDs at once by kuryr-daemon, median ms of a burst' %
        (count, BURST),
        ['way', 'burst', 'x stock', 'failed', 'lock held, median', '90 %'],
        [[way, '%.0f' % median, '%.2f' % (median / medians[STOCK]),
          '%d of %d' % (failures[way], count * BURST),
          *(('%.2f' % statistics.median(holds[way]),
             '%.2f' % statistics.quantiles(holds[way], n=10)[-1])
            if holds[way] else ('-', '-'))]
         for way, median in medians.items()],
        [at_most('a burst, direct', medians[DIRECT], medians[STOCK], 0.3,
                 'stock'),
         Target('no ADD of the bursts fails, direct',
                '%d' % failures[DIRECT], failures[DIRECT] == 0)],
        {'medians_ms': medians, 'failed': failures, 'held_ms': holds,
         'of': count * BURST})


def single(outer: Node, repeat: int) -> Section:
    """Measure sequential ADDs by the real kuryr-daemon, over HTTP."""
    count = max(-(-repeat // PODS_SHARE), 3)
    adds: Times = {way: {} for way in (STOCK, KURYR, DIRECT)}
    dels: Times = {way: {} for way in adds}
    with kuryr.Node() as node:
        stock = kuryr.stock_environment(os.path.join(node.dir, 'venv'))
        others = Node(node.lab)
        for size in (SIZES[0], SIZES[-1]):
            others.resize(size)
            for way in adds:
                say('ADDs at %d pods: %s' % (size, way))
                # With an agent's heartbeat, ADD and DEL do no housekeeping.
                with others.ledger.heartbeat.keep() as beat:
                    beat()
                    taken = singles(node, way, stock, count)
                adds[way][size] = [add for add, _ in taken]
                dels[way][size] = [end for _, end in taken]
    add, end = _medians(adds), _medians(dels)
    low, _, high = SIZES
    return Section(
        'An ADD / DEL by kuryr-daemon, median ms',
        ['way', *('%d other pods' % size for size in (low, high))],
        [[way, *('%.0f / %.0f' % (add[way][size], end[way][size])
                 for size in (low, high))] for way in add],
        [at_most('an ADD at %d pods, direct' % size, add[DIRECT][size],
                 add[STOCK][size], limit, 'stock there')
         for size, limit in ((low, 0.35), (high, 0.07))],
        {'add_ms': add, 'del_ms': end})


def singles(node: kuryr.Node, way: str, stock: str, count: int
            ) -> list[tuple[float, float]]:
    """Return the durations of ADD and DEL of each of ``count`` pods, in ms.

    :param stock: bin directory of an environment without kuryr-break0
    """
    with _daemon(node, way, stock):
        return [_single(node, 'pod-%d' % number,
                        ATTEMPTS if way == STOCK else 1)
                for number in range(count + 1)][1:]


def _single(node: kuryr.Node, name: str, attempts: int
            ) -> tuple[float, float]:
    """Return the durations of ADD and DEL of one pod, in ms.

    If the ADD fails, the durations are those of the next attempt.
    """
    pod = node.add_pod(name, POD)

    def request(command: str) -> tuple[float, bool]:
        start = time.perf_counter()
        answer = node.request(pod, command)
        duration = (time.perf_counter() - start) * 1000
        return duration, answer.status in (202, 204)

    for _ in range(attempts):
        added, is_fine = request('ADD')
        deleted, is_deleted = request('DEL')
        if not is_deleted:
            raise Broken('The DEL of %s failed' % name)
        if is_fine:
            break
    else:
        raise Broken('The ADD of %s failed %d times' % (name, attempts))
    node.delete_pod(pod)
    node.lab.del_netns(name)
    return added, deleted
