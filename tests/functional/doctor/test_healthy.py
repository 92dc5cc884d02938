# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import signal
import subprocess

from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import POD4
from tests.support import lab
from tests.support import program


class TestHealthy(DoctorTestCase):

    def test_nothing_is_found(self) -> None:
        agent = program.start([program.BREAK0, 'agent'],
                              stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.send_signal, signal.SIGTERM)
        done = json.loads(self.call('--json').stdout)
        self.assertEqual([], done['findings'])
        self.assertEqual({'addresses': 4, 'looked_up': 4, 'pods': 2,
                          'entered': 2, 'pinged': 4, 'answered': 4},
                         done['looked_at'])
        self.assertIn('Nothing is wrong.', self.call().stdout)
        self.assertTrue(self.lab.ping(POD4))
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))
