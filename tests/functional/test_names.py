# SPDX-License-Identifier: Apache-2.0

"""Names of interfaces are arbitrary bytes, chosen by their creator."""

from __future__ import annotations

import os
import subprocess

from tests.functional.base import POD
from tests.functional import cli_base
from tests.support import lab

#: Clears a line, reverses the following text, and is invalid UTF-8.
HOSTILE = b'n\xc2\x9b2K\xe2\x80\xae'
NO_TEXT = b'nic\xff0'


class TestNames(cli_base.CLITestCase):

    def rename(self, name: bytes) -> str:
        subprocess.run([b'ip', b'link', b'set', lab.PARENT.encode(), b'down'],
                       check=True)
        for rest in ([b'name', name], ):
            subprocess.run([b'ip', b'link', b'set', lab.PARENT.encode(),
                            *rest], check=True)
        subprocess.run([b'ip', b'link', b'set', name, b'up'], check=True)
        return os.fsdecode(name)

    def assert_in_sync(self) -> None:
        done = self.call('sync', '--dry-run')
        self.assertEqual((0, ''), (done.returncode, done.stdout),
                         done.stderr)
        done = self.call('status')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)

    def test_one_that_is_not_utf8(self) -> None:
        self.bind(POD, parent=self.rename(NO_TEXT))
        self.assert_in_sync()
        self.assertIn('nic\\xff0', self.call('status').stdout)
        self.lab.run('ip', 'route', 'del', POD, 'dev', 'break0')
        self.assertEqual(0, self.call('sync').returncode)
        self.assert_in_sync()

    def test_nothing_acts_on_a_terminal(self) -> None:
        self.bind(POD, parent=self.rename(HOSTILE))
        self.assert_in_sync()
        self.lab.run('ip', 'address', 'flush', 'scope', 'global')
        for args in (('status',), ('status', '--wide'), ('sync',),
                     ('probe', POD, '--count', '1'), ('doctor',),
                     ('check', '--parent', os.fsdecode(HOSTILE)),
                     ('-d', 'status', '--problems'), ('cleanup',)):
            with self.subTest(args):
                done = self.call(*args)
                for line in (done.stdout + done.stderr).split('\n'):
                    self.assertTrue(line.isprintable(), ascii(line))
