# SPDX-License-Identifier: Apache-2.0

"""The plugin of kubectl prints one table for all nodes.

The kubectl of these tests has two nodes. On the first node, kubectl runs the
real command. The second node does not answer.
"""

from __future__ import annotations

import os
import subprocess
import tarfile

from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import overlay
from tests.support import program

PLUGIN = os.path.join(overlay.ROOT, 'etc/kubernetes/kubectl-break0')
KUBECTL = """#!/bin/sh
echo "$*" >>/run/kubectl.log
case "$*" in
    *' get pods '*)
        printf 'kuryr-cni-ds-1   node-1   kuryr-cni\\n'
        [ ! -e /run/two ] || printf 'break0-x   node-2   break0\\n' ;;
    *' exec kuryr-cni-ds-1 --container kuryr-cni -- '*)
        while [ "$1" != -- ]; do shift; done; shift; exec "$@" ;;
    *) exit 1 ;;
esac
"""


class TestPlugin(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        os.makedirs('/run/bin')
        os.makedirs('/run/tmp')
        with open('/run/bin/kubectl', 'w') as file:
            file.write(KUBECTL)
        os.chmod('/run/bin/kubectl', 0o755)
        self.bind(POD, OTHER_POD)

    def plugin(self, *args: str, code: int = 0) -> list[str]:
        """Return the lines of the plugin's output, with single spaces."""
        done = subprocess.run(
            [PLUGIN, *args], text=True, stdout=subprocess.PIPE, env={
                **os.environ, 'TMPDIR': '/run/tmp',
                'PATH': '/run/bin:%s:%s' % (
                    program.BIN, os.environ['PATH'])})
        self.assertEqual(code, done.returncode, done.stdout)
        self.assertEqual([], os.listdir('/run/tmp'))
        return [' '.join(line.split()) for line in done.stdout.splitlines()]

    def test_status(self) -> None:
        head = 'NODE SYNC BOUND ROUTED OUT UNSERVED FIRST-PROBLEM'
        self.assertEqual([head, 'node-1 yes 2 2 0 0'], self.plugin('status'))
        self.lab.run('ip', 'route', 'del', POD)
        self.assertEqual(
            [head, 'node-1 no 2 1 1 0 "its route is missing"'],
            self.plugin('status', code=1))
        self.lab.run('ip', 'link', 'del', 'break0')
        self.assertIn('"break0 is missing on eth0', self.plugin(
            'status', code=1)[1])
        open('/run/two', 'w').close()
        self.assertEqual('node-2 unknown', self.plugin('status', code=1)[2])

    def test_doctor(self) -> None:
        head, line = self.plugin('doctor', code=1)
        self.assertRegex(line, r'\Anode-1 \d+ \d+ .*agent-not-running')
        self.assertEqual('NODE ERRORS WARNINGS FINDINGS', head)

    def test_bundle(self) -> None:
        self.assertEqual(['NODE ARCHIVE', 'node-1 /run/node-1.tar.gz'],
                         self.plugin('bundle', '/run'))
        with tarfile.open('/run/node-1.tar.gz') as archive:
            self.assertTrue(any(name.endswith('/status.json')
                                for name in archive.getnames()))

    def test_usage(self) -> None:
        self.assertEqual([], self.plugin(code=2))
        self.assertFalse(os.path.exists('/run/kubectl.log'))
