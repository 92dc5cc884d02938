# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
import sys
import unittest


class TestBench(unittest.TestCase):

    def test_each_way_has_a_result(self) -> None:
        # The test ignores the measured times, which vary with the load.
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'tests.bench',
             '--repeat', '1', '--small'],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(0, done.returncode, done.stderr)
        for text in ('ours', 'raw netlink socket', 'IPDB per operation',
                     'pod_binding = auto', 'ADDs at once', 'target'):
            self.assertIn(text, done.stdout)
        # tests.engines.test_bench covers the benchmark of sandboxes.
        self.assertIn('Left out: sandboxes: containerd needs root of the '
                      'machine\n', done.stderr)
