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

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from kuryr_break0.ledger import Ledger
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests import lab

PROGRAM = os.path.join(os.path.dirname(sys.executable), 'kuryr-break0')
POD4, POD6 = '100.75.30.71', 'fd00:30::71'
OTHER4, OTHER6 = '100.75.30.72', 'fd00:30::72'
#: In another subnet on the link than the node.
FAR4 = '100.75.40.71'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
MACS = {'pod': '02:00:00:00:00:71', 'other': '02:00:00:00:00:72',
        'far': '02:00:00:00:00:73'}


class DoctorTestCase(base.LabTestCase):
    """A node with two bound pods of both families, and an agent."""

    static_neighbours = True

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.set_up_pods()
        # There, but it must not repair what the test has broken.
        attending = Ledger('/run/kuryr-break0', 10).attend()
        attending.__enter__()
        self.addCleanup(attending.__exit__, None, None, None)

    def set_up_pods(self) -> None:
        for name, owner, addresses in (
                ('pod', base.OWNER, (POD4, POD6)),
                ('other', OTHER_OWNER, (OTHER4, OTHER6))):
            path = self.lab.add_pod(name, *addresses, mac=MACS[name])
            self.bind(*addresses, owner=owner, netns=path,
                      mac_of_pod=MACS[name], subnets=SUBNETS,
                      static_neighbours=self.static_neighbours)

    def call(self, *args: str, code: int = 0,
             **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [PROGRAM, 'doctor', *args], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **environ})
        self.assertNotIn('Traceback', done.stderr)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done

    def findings(self, code: int = 1, **environ: str) -> dict[str, Any]:
        """What the doctor finds, by id."""
        found = json.loads(self.call('--json', code=code,
                                     **environ).stdout)['findings']
        self.assertEqual(len(found), len({each['id'] for each in found}))
        return {each['id']: each for each in found}

    def assert_found(self, expected: str, seen: str = '', *subjects: str,
                     severity: str = '', code: int = 1,
                     **environ: str) -> dict[str, Any]:
        """It finds this, and nothing else."""
        found = self.findings(code, **environ)
        self.assertEqual([expected], list(found), found)
        finding: dict[str, Any] = found[expected]
        self.assertIn(seen, finding['seen'])
        self.assertEqual(list(subjects), finding['subjects'])
        if severity:
            self.assertEqual(severity, finding['severity'])
        return finding

    def follow(self, finding: dict[str, Any]) -> None:
        """Do what it says."""
        for command in finding['commands']:
            if not command.startswith(('ip monitor', 'grep', 'ip rule')):
                self.lab.run('sh', '-c', 'PATH=%s:$PATH; %s' % (
                    os.path.dirname(PROGRAM), command))


class TestHealthy(DoctorTestCase):

    def test_nothing_is_found(self) -> None:
        agent = subprocess.Popen([PROGRAM, 'agent'],
                                 stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.send_signal, signal.SIGTERM)
        done = json.loads(self.call('--json').stdout)
        self.assertEqual([], done['findings'])
        self.assertEqual({'addresses': 4, 'looked_up': 4, 'pods': 2,
                          'entered': 2}, done['looked_at'])
        self.assertIn('Nothing is wrong.', self.call().stdout)
        self.assertTrue(self.lab.ping(POD4))
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))
