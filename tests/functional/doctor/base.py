# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any, Optional
import unittest.mock

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0.doctor import examination
from kuryr_break0.doctor import report
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.support import program

POD4, POD6 = '100.75.30.71', 'fd00:30::71'
OTHER4, OTHER6 = '100.75.30.72', 'fd00:30::72'
OWNER_79 = Owner('sandbox-79', 'eth0')
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
MACS = {'pod': '02:00:00:00:00:71', 'other': '02:00:00:00:00:72',
        'far': '02:00:00:00:00:73'}


class DoctorTestCase(base.LabTestCase):
    """A node with two bound pods of both families, and an agent."""

    maxDiff = None

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.set_up_pods()
        # Keep only a heartbeat: an agent would repair the tests' faults.
        self.agent = contextlib.ExitStack()
        self.agent.enter_context(
            Ledger('/run/kuryr-break0', 10).heartbeat.keep())
        self.addCleanup(self.agent.close)

    def set_up_pods(self) -> None:
        for name, owner, addresses in (
                ('pod', base.OWNER, (POD4, POD6)),
                ('other', OTHER_OWNER, (OTHER4, OTHER6))):
            path = self.lab.add_pod(name, *addresses, mac=MACS[name])
            self.bind(*addresses, owner=owner, netns=path,
                      mac_of_pod=MACS[name], subnets=SUBNETS)

    def call(self, *args: str, code: Optional[int] = 0, config: str = '',
             **environ: str) -> subprocess.CompletedProcess[str]:
        options = ['--config-file', config] if config else []
        done = program.run(
            [program.BREAK0, *options, 'doctor', *args], text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **environ})
        self.assertNotIn('Traceback', done.stderr)
        if code is not None:
            self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done

    def examine(self, probe: bool = True, **overrides: Any
                ) -> examination.Examination:
        """Return the doctor's examination with these options."""
        conf = cfg.ConfigOpts()
        config.register(conf)
        conf([], default_config_files=[])
        for name, value in overrides.items():
            conf.set_override(name, value, group=config.GROUP)
        # The current directory is not in the real command's sys.path. A build
        # leaves another distribution in this directory.
        path = [each for each in sys.path if each not in ('', os.getcwd())]
        with unittest.mock.patch.object(sys, 'path', path):
            return examination.examine(conf, probe)

    def findings(self, probe: bool = True, **overrides: Any
                 ) -> dict[str, Any]:
        """Return the doctor's findings with these options, by id."""
        done = self.examine(probe, **overrides)
        self.assertIsNone(done.unreadable)
        found = {each.id: each for each in done.findings}
        self.assertEqual(len(done.findings), len(found), done.findings)
        return {name: report.as_json([each])['findings'][0]
                for name, each in found.items()}

    def assert_found(self, expected: str, seen: str = '', *subjects: str,
                     severity: str = '', **overrides: Any) -> dict[str, Any]:
        """Assert that the doctor has exactly one finding, and return it."""
        found = self.findings(**overrides)
        self.assertEqual([expected], list(found), found)
        finding: dict[str, Any] = found[expected]
        self.assertIn(seen, finding['seen'])
        self.assertEqual(list(subjects), finding['subjects'])
        if severity:
            self.assertEqual(severity, finding['severity'])
        return finding

    def sysctl(self, name: str, value: int) -> None:
        self.lab.run('sysctl', '-w', 'net.%s=%d' % (name, value))

    def follow(self, finding: dict[str, Any]) -> None:
        """Run the commands of a finding, except diagnostic ones."""
        for command in finding['commands']:
            if not command.startswith(('ip monitor', 'grep', 'ip rule')):
                self.lab.run('sh', '-c', 'PATH=%s:$PATH; %s' % (
                    program.BIN, command))
