# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sysconfig
from typing import Any
import unittest

from kuryr_break0 import ledger
from tests.support import kuryr
from tests.support import lab
from tests.support import program


class TestDoctor(unittest.TestCase):
    """The doctor examines a real kuryr-daemon and its bound pods."""

    def setUp(self) -> None:
        super().setUp()
        self.node = kuryr.Node()
        self.addCleanup(self.node.__exit__)
        self.node.lab.add_ipv6()

    def findings(self, **environ: str) -> dict[str, Any]:
        done = program.run(
            [program.BREAK0, '--config-file', self.node.conf, '--nodebug',
             '--nouse-journal', 'doctor', '--json'], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **environ})
        self.assertIn(done.returncode, (0, 1, 4), done.stderr)
        found = json.loads(done.stdout)['findings']
        return {each['id']: each for each in found}

    def start_agent(self) -> None:
        agent = program.start(
            [program.BREAK0, '--config-file', self.node.conf, 'agent'],
            stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        heartbeat = ledger.Ledger('/run/kuryr-break0', 10).heartbeat
        lab.until(lambda: heartbeat.age() is not None)

    def test_healthy(self) -> None:
        self.node.start_daemon()
        self.start_agent()
        for name, vif in (
                ('one', kuryr.macvlan_vif(
                    '100.75.30.71', 'fd00:30::71', subnets=[
                        '%s/24' % lab.LAN, '%s/64' % lab.LAN6])),
                ('two', kuryr.macvlan_vif('100.75.30.72'))):
            pod = self.node.add_pod(name, vif=vif)
            answer = self.node.request(pod, 'ADD')
            self.assertEqual(202, answer.status, self.node.errors())
        self.assertEqual({}, self.findings())
        self.node.lab.settle()
        self.assertTrue(self.node.lab.ping('fd00:30::71'))

    def test_daemon_elsewhere(self) -> None:
        """A stock daemon in an environment without the driver is found."""
        bin_dir = kuryr.stock_environment(os.path.join(self.node.dir, 'venv'))
        self.node.start_daemon(bin_dir=bin_dir)
        self.start_agent()
        found = self.findings()
        self.assertEqual(['daemon-elsewhere'], list(found))
        self.assertIn(bin_dir, found['daemon-elsewhere']['seen'])

    def test_daemon_not_restarted(self) -> None:
        """A daemon started before the package's installation is found."""
        self.node.start_daemon()
        self.start_agent()
        self.assertEqual({}, self.findings())
        info, = glob.glob(os.path.join(sysconfig.get_path('purelib'),
                                       'kuryr_break0-*.dist-info'))
        copy = os.path.join('/run/site-packages', os.path.basename(info))
        shutil.copytree(info, copy)
        os.utime(os.path.join(copy, 'RECORD'))  # now
        found = self.findings(PYTHONPATH='/run/site-packages')
        self.assertEqual(['daemon-not-restarted'], list(found))
        self.assertIn('process %d' % self.daemon_pid(),
                      found['daemon-not-restarted']['seen'])
        self.node.kill_daemon()
        self.node.start_daemon()
        self.assertEqual({}, self.findings(PYTHONPATH='/run/site-packages'))

    def daemon_pid(self) -> int:
        assert self.node.daemon is not None
        return self.node.daemon.pid
