# SPDX-License-Identifier: Apache-2.0

"""The cluster of the tests, and their base class.

The first test starts the cluster, which ends with the process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, Callable, Iterator, Optional
import unittest

import requests

from tests.cluster import cluster as clusters
from tests.cluster import kubernetes
from tests.cluster import node as nodes
from tests.support import lab

# The deletion of 30 pods without force takes six minutes.
lab.PATIENCE = max(lab.PATIENCE, 600)

_stack = contextlib.ExitStack()


@functools.lru_cache(maxsize=None)
def running_cluster() -> clusters.Cluster:
    """Return the cluster of this process; the first call starts the cluster.

    If the start fails, the process exits, and no further test runs.
    """
    atexit.register(_stack.close)
    try:
        return _stack.enter_context(clusters.running(2))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.exit('The cluster could not be started.')


class ClusterTestCase(unittest.TestCase):
    """A test that begins with a cluster without pods, and deletes its pods.

    Before the deletion, each pod has to be ready or to have succeeded, no
    container may have been restarted, and no route, neighbour, guard entry,
    record or Neutron port may be without a pod.
    """

    #: whether the test itself restarts containers
    restarts_containers = False

    def setUp(self) -> None:
        self.cluster = running_cluster()
        self.control = self.cluster.control
        self.first, self.second = self.cluster.nodes
        self.addCleanup(self._delete_all)

    def tearDown(self) -> None:
        outcome: Any = self._outcome  # type: ignore[attr-defined]
        if not outcome.success:
            return
        self.until(self._is_settled, lambda: '\n'.join(
            self.cluster.leftovers() + [self.cluster.report()]))
        if not self.restarts_containers:
            self.assertEqual({}, {
                pod['metadata']['name']: clusters.restarts(pod)
                for pod in kubernetes.items('pods')
                if clusters.restarts(pod)}, self.cluster.report())

    def _is_settled(self) -> bool:
        pods = kubernetes.items('pods')
        return not self.cluster.leftovers() and all(
            clusters.is_ready(pod) or pod['status']['phase'] == 'Succeeded'
            for pod in pods)

    def _delete_all(self) -> None:
        for name in kubernetes.names('services'):
            if name != 'kubernetes':
                kubernetes.delete('services', name)
        self.cluster.delete_by_force()

    def until(self, condition: Callable[[], Any],
              log: Optional[Callable[[], str]] = None) -> float:
        """Wait until a condition holds; return the duration in seconds."""
        return lab.until(condition, log or self.cluster.report)

    def node_of(self, pod: dict[str, Any]) -> nodes.Node:
        return next(node for node in self.cluster.nodes
                    if node.name == pod['spec']['nodeName'])

    def netns_of(self, pod: dict[str, Any]) -> str:
        """Return the path of the network namespace of a pod."""
        node = self.node_of(pod)
        for name in node.sandboxes():
            shown = node.machine.run('ip', '-netns', name, 'address', 'show',
                                     check=False).stdout
            if ' %s/' % clusters.address(pod) in shown:
                return node.machine.path('/run/netns/' + name)
        raise AssertionError('no namespace has ' + clusters.address(pod))

    @staticmethod
    def has_tentative(netns: str) -> bool:
        """Return whether a namespace has a tentative IPv6 address."""
        return bool(subprocess.run(
            ['nsenter', '--net=' + netns, 'ip', '-6', '-o', 'address',
             'show', 'tentative'], stdout=subprocess.PIPE, check=True
        ).stdout.strip())

    @staticmethod
    def fetch(address: str, netns: str, port: int = 80) -> Optional[str]:
        """Return the page of a pod as fetched from a namespace, or None.

        :param netns: name or path of a namespace, or '' for the LAN
        """
        answers: list[str] = []
        host = '[%s]' % address if ':' in address else address

        def get() -> None:
            with contextlib.suppress(requests.RequestException):
                answers.append(requests.get('http://%s:%d/' % (host, port),
                                            timeout=10).text.strip())

        lab.Lab.in_netns(get, netns or None)
        return answers[0] if answers else None

    def assert_all_reach(self, pods: list[dict[str, Any]]) -> None:
        """Assert that nodes, LAN and pods can fetch the page of each pod."""
        places = {'lan': '', **{node.name: node.name
                                for node in self.cluster.nodes},
                  **{pod['metadata']['name']: self.netns_of(pod)
                     for pod in pods}}
        # The probes of kubelet use IPv4. A pod can be ready before duplicate
        # address detection has ended for its IPv6 address.
        self.until(lambda: not any(
            self.has_tentative(self.netns_of(pod)) for pod in pods))
        # The LAN can still have the MAC address of an earlier pod with the
        # same address, and would ask again only after some seconds.
        subprocess.run(['ip', 'neighbour', 'flush', 'dev', 'lan'], check=True)
        for pod in pods:
            for address in clusters.addresses(pod):
                for name, netns in places.items():
                    self.assertEqual(pod['metadata']['name'],
                                     self.fetch(address, netns),
                                     'from %s to %s' % (name, address))

    def deploy(self, name: str, replicas: int,
               node: Optional[nodes.Node] = None, **spec: Any
               ) -> list[dict[str, Any]]:
        """Create a Deployment, and return its pods when all are ready."""
        self.cluster.deploy(name, replicas, node, **spec)
        self.cluster.until_ready(name, replicas)
        return self.cluster.pods(name)

    @contextlib.contextmanager
    def watched(self, pods: list[dict[str, Any]]) -> Iterator[None]:
        """Connect to each pod from its node every 0.2 s within the block.

        :raises AssertionError: if a connection failed
        """
        ending = threading.Event()
        failures: list[str] = []

        def connect(pod: dict[str, Any]) -> None:
            where = (clusters.address(pod), 80)
            netns = self.node_of(pod).name

            def again() -> None:
                while not ending.wait(0.2):
                    try:
                        socket.create_connection(where, 3).close()
                    except OSError as err:
                        failures.append('%s %s: %s' % (
                            time.strftime('%X'), where[0], err))

            lab.Lab.in_netns(again, netns)

        threads = [threading.Thread(target=connect, args=(pod,))
                   for pod in pods]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ending.set()
            for thread in threads:
                thread.join()
        self.assertEqual([], failures)
