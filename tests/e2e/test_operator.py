# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

from tests.e2e.base import AdoptTestCase
from tests.e2e.base import POD
from tests.e2e.base import POD6
from tests.e2e.base import SUBNETS
from tests.support import kuryr
from tests.support import lab
from tests.support import program

FAR = '100.75.40.71'


class TestOperator(AdoptTestCase):
    """An operator installs kuryr-break0 on a node of Kuryr and removes it."""

    def setUp(self) -> None:
        super().setUp()
        self.stock = kuryr.stock_environment(
            os.path.join(self.node.dir, 'venv'))

    def status(self, code: int = 0) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(
            self.call('status', '--json', code=code))
        return status

    def problems(self) -> dict[str, str]:
        return {each['address']: each['problem']
                for each in self.status(code=1)['addresses']
                if each['problem']}

    def findings(self, code: int = 4) -> list[str]:
        """Return the doctor's findings, except agent-not-running."""
        found = json.loads(self.call('doctor', '--json',
                                     code=code))['findings']
        ids = [each['id'] for each in found]
        ids.remove('agent-not-running')
        return ids

    def assert_reachable_all_ways(self, expected: bool = True) -> None:
        ways: list[tuple[str, ...]] = [
            (POD,), (lab.NODE, 'pod'), (POD6,), (lab.NODE6, 'pod')]
        if expected:
            # Not tested without break0: the router of the LAN may then connect
            # the node and the far pod.
            ways += [(FAR,), (lab.NODE, 'far')]
        for way in ways:
            self.assertEqual(expected, self.node.lab.ping(*way), way)

    def in_sync(self) -> bool:
        return program.run(
            [program.BREAK0, '--config-file', self.node.conf, 'status'],
            stdout=subprocess.DEVNULL).returncode == 0

    def test_the_whole_way(self) -> None:
        self.node.lab.add_ipv6()
        self.node.lab.add_other_subnet()
        # Foreign entries on the node.
        self.node.lab.run('ip', 'route', 'add', '192.0.2.0/24', 'via',
                          lab.LAN)
        self.node.lab.run('ip', 'rule', 'add', 'to', FAR, 'table', '1000')
        self.node.lab.run('ip', 'neighbour', 'add', '100.75.30.99', 'lladdr',
                          '02:00:00:00:00:99', 'dev', lab.PARENT)

        # A node runs Kuryr alone, with pods.
        self.node.start_daemon(bin_dir=self.stock)
        pods = [
            self.node.add_pod('pod', vif=kuryr.macvlan_vif(
                POD, POD6, subnets=SUBNETS)),
            self.node.add_pod('far', vif=kuryr.macvlan_vif(
                FAR, subnets=[lab.OTHER_LAN + '/24']))]
        for pod in pods:
            self.add(pod)
        self.node.lab.settle()
        self.assert_reachable_all_ways(False)
        before = self.node.lab.state()

        # The operator installs the package, and restarts the daemon.
        self.node.kill_daemon()
        self.node.start_daemon()
        self.assertEqual({'adopted'}, set(self.outcomes().values()))
        self.assertEqual(3, self.status()['totals']['routed'])
        self.assertEqual([], self.findings())
        self.assert_reachable_all_ways()
        for address in (POD, POD6, FAR):
            self.call('probe', address, '--count', '1')

        # The operator sees a fault, and repairs it.
        self.node.lab.run('ip', 'route', 'del', POD)
        self.assertEqual({POD: 'its route is missing'}, self.problems())
        self.assertEqual(['route-missing'], self.findings(code=1))
        self.call('probe', POD, '--count', '1', code=1)
        self.assertIn('+ route ' + POD, self.call('sync'))
        self.status()
        self.assert_reachable_all_ways()

        # The agent repairs a fault.
        agent = program.start(
            [program.BREAK0, '--config-file', self.node.conf, 'agent'],
            stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.node.lab.run('ip', 'link', 'del', 'break0')
        lab.until(self.in_sync)
        self.assertIn('Nothing is wrong.', self.call('doctor'))
        self.assert_reachable_all_ways()
        agent.send_signal(signal.SIGSTOP)
        self.node.lab.run('ip', 'link', 'del', 'break0')
        self.assertEqual({POD, POD6, FAR}, set(self.problems()))
        agent.send_signal(signal.SIGCONT)
        lab.until(self.in_sync)
        self.assert_reachable_all_ways()

        # The operator removes break0, and Kuryr continues alone.
        agent.terminate()
        self.assertEqual(0, agent.wait())
        self.node.kill_daemon()
        self.node.start_daemon(bin_dir=self.stock)
        planned = self.call('cleanup', '--dry-run', code=1)
        self.assertEqual(planned, self.call('cleanup'))
        after = self.node.lab.state()
        self.assertEqual(before.keys(), after.keys())
        for name, found in before.items():
            self.assertEqual(found, after[name], name)
        self.assertFalse(os.path.exists('/run/kuryr-break0'))
        self.assert_reachable_all_ways(False)
        for pod in pods:
            self.delete(pod)
