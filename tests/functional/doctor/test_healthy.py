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
import signal
import subprocess

from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import PROGRAM
from tests import lab


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
