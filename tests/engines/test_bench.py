# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import unittest

from tests.engines import base

REPOSITORY = pathlib.Path(__file__).parents[2]


@unittest.skipUnless(base.is_root() and shutil.which('go') and pathlib.Path(
    sys.prefix, 'kuryr-sources').is_dir(), 'needs root of the machine, '
    'golang-go and the sources of Kuryr: '
    'tools/kuryr-sources .venv/kuryr-sources')
class TestBench(unittest.TestCase):
    """Test the benchmark's section "sandboxes", which needs root.

    tests.functional.test_bench tests the other sections.
    """

    def test_each_way_has_a_result(self) -> None:
        subprocess.run([str(REPOSITORY / 'tools/kuryr-cni-in-go'),
                        str(REPOSITORY / 'build/kuryr-cni')], check=True)
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'tests.bench', '--repeat',
             '1', 'sandboxes'], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        self.assertEqual(0, done.returncode, done.stderr)
        for text in ('stock Kuryr, plugin in Python', 'break0, plugin in Go',
                     'containerd alone', 'at most 250 ms'):
            self.assertIn(text, done.stdout)
