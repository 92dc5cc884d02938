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

import subprocess
import sys
import unittest


class TestBench(unittest.TestCase):

    def test_it_runs_and_each_way_does_what_it_says(self) -> None:
        # What it measures is no test: machines are noisy.
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'tests.bench',
             '--repeat', '1'],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(0, done.returncode, done.stderr)
        for text in ('ours', 'raw netlink socket', 'IPDB per operation',
                     'pod_binding = direct', 'ADDs at once', 'target'):
            self.assertIn(text, done.stdout)
