# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys
import unittest

from tests.support import lab


class TestOutput(unittest.TestCase):

    def written(self, first: str) -> str:
        """Return the output of a process that runs this code before IPDB."""
        done = subprocess.run(
            [sys.executable, '-c', 'import logging\nimport pyroute2\n%s\n'
             'logging.basicConfig()\n'
             'with pyroute2.IPDB() as ipdb:\n'
             '    with ipdb.interfaces["eth0"] as eth0:\n'
             '        eth0.add_ip("192.0.2.1/24")\n' % first],
            env={**os.environ, 'PYTHONWARNINGS': 'ignore'}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def test_ipdb_is_silent_in_tests(self) -> None:
        lab.Lab()
        written = self.written('')
        for text in ('Deprecation warning', 'fail <class'):
            self.assertIn(text, written)
        lab.Lab()
        self.assertEqual('', self.written('import tests'))
