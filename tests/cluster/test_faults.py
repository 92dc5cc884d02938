# SPDX-License-Identifier: Apache-2.0

"""Faults of break0 and of its guard, a reboot of a node, and adoption."""

from __future__ import annotations

import time

from tests.cluster import base
from tests.cluster import cluster as clusters
from tests.cluster import kubernetes


class TestBreak0(base.ClusterTestCase):
    """Each probe is answered, with a period of one second.

    If a probe's first packet is lost before the repair, TCP retransmits it
    after a second, and the probe succeeds.
    """

    def disturb(self, *commands: str) -> None:
        """Run commands on a node several times while probes run."""
        pods = self.deploy('web', 4, self.first, period=1)
        for _ in range(5):
            for command in commands:
                self.first.machine.run(*command.split())
            time.sleep(3)
        self.assertEqual([], self.cluster.unanswered_probes())
        self.assert_all_reach(pods)

    def test_deleted(self) -> None:
        self.disturb('ip link del break0')

    def test_routes_flushed(self) -> None:
        self.disturb('ip route flush dev break0')

    def test_neighbours_flushed(self) -> None:
        self.disturb('ip neighbour flush dev break0 nud permanent')

    def test_rules_flushed(self) -> None:
        self.disturb('nft flush ruleset')


class TestReboot(base.ClusterTestCase):

    restarts_containers = True

    def test_reboot(self) -> None:
        """All processes end and /run is empty; the pods start again."""
        pods = (self.deploy('first', 4, self.first)
                + self.deploy('second', 2, self.second))
        others = [pod for pod in pods
                  if pod['spec']['nodeName'] == self.second.name]
        with self.watched(others):
            self.first.halt()
            self.first.boot()
            self.assertEqual(set(), self.first.recorded())
            self.first.prepare()
            self.first.start()
            # The API may still report the pods as ready from before the
            # reboot.
            self.until(lambda: len(self.first.routes()) == 8)
            self.until(lambda: len(self.cluster.ready('first')) == 4
                       and not self.cluster.leftovers())
        self.assert_all_reach(self.cluster.pods('first') + others)


class TestAdopt(base.ClusterTestCase):

    def test_pods_before_the_installation(self) -> None:
        """The node reaches these pods after ``kuryr-break0 adopt``."""
        for node in self.cluster.nodes:
            self.addCleanup(node.install_break0)
            node.remove_break0(self.cluster.stock)
        spec = clusters.template('old')['spec']['containers'][0]
        # kubelet would kill unreachable containers that have probes.
        spec = {key: value for key, value in spec.items()
                if not key.endswith('Probe')}
        pods = self.deploy('old', 6, containers=[spec])
        for pod in pods:
            self.assertIsNone(self.fetch(pod['status']['podIP'],
                                         self.node_of(pod).name))
        for node in self.cluster.nodes:
            node.install_break0()
            here = [pod for pod in pods
                    if pod['spec']['nodeName'] == node.name]
            own = set().union(*map(clusters.addresses, here))
            # A dry run exits with 1 if there are pods to adopt.
            dry = node.break0('adopt', '--dry-run', check=False)
            self.assertEqual(len(here), dry.count('adopted'), dry)
            self.assertEqual(set(), node.routes())
            node.break0('adopt')
            self.assertEqual(own, node.routes())
        self.assert_all_reach(pods)
        self.assertEqual(6, len(kubernetes.names('kuryrports')))
