# SPDX-License-Identifier: Apache-2.0

"""The doctor reports a kuryr-daemon whose options differ from its file."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from kuryr_break0 import ledger
from kuryr_break0.ledger import readers
from tests.e2e.base import DaemonTestCase
from tests.e2e.base import POD
from tests.support import program

WRONG, RIGHT = ('allowed_cidrs = %s' % each for each in (
    '100.99.0.0/24', '100.75.30.0/24'))


class TestStaleOptions(DaemonTestCase):

    def call(self, *args: str) -> str:
        done = program.run(
            [program.BREAK0, '--config-file', self.node.conf, '--log-file',
             '/run/command.log', *args], text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'COLUMNS': '500'})
        return str(done.stdout)

    def findings(self) -> dict[str, Any]:
        return {each['id']: each for each in json.loads(self.call(
            'doctor', '--no-probe', '--json'))['findings']}

    def test_a_corrected_file_without_a_restart(self) -> None:
        self.node.start_daemon(WRONG)
        pod = self.node.add_pod('pod', POD)
        self.add(pod)  # Kuryr alone binds it
        self.assertNotIn('options-stale', self.findings())
        self.node.write_conf('# a comment\n' + WRONG)
        self.assertNotIn('options-stale', self.findings())
        self.node.write_conf(RIGHT)
        finding = self.findings()['options-stale']
        self.assertIn('kuryr-daemon has read the options at ',
                      finding['seen'])
        self.assertEqual(['systemctl restart kuryr-daemon'],
                         finding['commands'])
        self.assertIn('Differs: kuryr-daemon has read', self.call('status'))
        self.node.kill_daemon()
        self.node.start_daemon(RIGHT)  # no new pod is needed
        self.assertNotIn('options-stale', self.findings())

    def test_another_version(self) -> None:
        self.node.start_daemon(RIGHT)
        self.add(self.node.add_pod('pod', POD))
        self.assertNotIn('version-differs', self.findings())
        used = ledger.Ledger('/run/kuryr-break0')
        key = 'read_by_daemon'
        facts = used.cache.get(key)
        assert facts is not None
        used.cache.put(key, ['0.9', *facts[1:]])
        self.assertIn('kuryr-daemon runs version 0.9, but version %s is'
                      % readers.installed_version(),
                      self.findings()['version-differs']['seen'])
