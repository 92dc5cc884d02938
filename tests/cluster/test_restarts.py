# SPDX-License-Identifier: Apache-2.0

"""Each program of the cluster restarts while pods start and end."""

from __future__ import annotations

import signal
import time
from typing import Callable

from tests.cluster import base
from tests.cluster import kubernetes


class TestRestarts(base.ClusterTestCase):

    def disturb(self, restart: Callable[[], None], coming: int = 4) -> None:
        """Restart a program while pods start and others are deleted.

        The remaining pods stay reachable from their nodes meanwhile.
        """
        steady = self.deploy('steady', 4)
        self.deploy('going', 4)
        with self.watched(steady):
            self.cluster.deploy('coming', coming)
            kubernetes.delete('deployments', 'going')
            restart()
            self.until(lambda: not self.cluster.pods('going'))
            self.cluster.until_ready('coming', coming)
        self.assert_all_reach(steady + self.cluster.pods('coming')[:2])

    def restart(self, name: str) -> None:
        for node in self.cluster.nodes:
            node.machine.program(name).restart()

    def test_etcd(self) -> None:
        self.disturb(self.cluster.plane.etcd.restart)

    def test_api_server(self) -> None:
        self.disturb(lambda: self.cluster.plane.server.restart(away=30))

    def test_kuryr_controller(self) -> None:
        self.disturb(self.cluster.controller.program.restart)

    def test_neutron(self) -> None:
        self.disturb(self.cluster.neutron.server.restart)

    def test_database_of_neutron(self) -> None:
        self.disturb(self.cluster.neutron.database.restart)

    def test_kuryr_daemon(self) -> None:
        """kuryr-daemon is killed three times during a burst of 30 pods."""
        def kill() -> None:
            for _ in range(3):
                time.sleep(3)
                self.restart('kuryr-daemon')

        self.disturb(kill, 30)

    def test_kubelet(self) -> None:
        self.disturb(lambda: self.restart('kubelet'))

    def test_containerd(self) -> None:
        self.disturb(lambda: self.restart('containerd'))

    def test_agent(self) -> None:
        self.disturb(lambda: self.restart('agent'))

    def test_agent_away_while_pods_go(self) -> None:
        """The next agent removes items of pods that ended without an agent."""
        def swap() -> None:
            for node in self.cluster.nodes:
                node.agent.kill(signal.SIGTERM)
            time.sleep(10)
            for node in self.cluster.nodes:
                node.agent.start()

        self.disturb(swap)
