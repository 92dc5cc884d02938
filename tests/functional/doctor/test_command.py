# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import os
import time

from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OWNER_79
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import SUBNETS


class TestCommand(DoctorTestCase):

    def test_for_people(self) -> None:
        self.lab.run('ip', 'route', 'del', POD4)
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        done = self.call(code=1)
        self.assertEqual('', done.stderr)
        self.assertIn('error: route-missing\n  seen  addresses of pods have '
                      'no route through break0 in table 254:', done.stdout)
        self.assertIn('\n          kuryr-break0 sync\n', done.stdout)
        self.assertIn('Errors: 1, warnings: 1. Looked at pods: 2, entered: '
                      '2; addresses: 4', done.stdout)
        self.assertLess(max(map(len, done.stdout.splitlines())), 80)

    def test_a_state_directory_that_cannot_be_read(self) -> None:
        os.makedirs('/run/state/addresses')
        os.chmod('/run/state', 0o700)
        os.symlink('lock', '/run/state/lock')
        done = self.call(code=3, OS_BREAK0__STATE_DIR='/run/state')
        self.assertIn('/run/state', done.stderr)

    def test_what_is_under_way(self) -> None:
        """Pods that come and go are not taken for faults."""
        stop = '/run/stop'
        path = self.lab.add_pod('coming', '100.75.30.79',
                                mac=MACS['far'])

        def come_and_go() -> None:
            while not os.path.exists(stop):
                self.bind('100.75.30.79', owner=OWNER_79, netns=path,
                          mac_of_pod=MACS['far'], subnets=SUBNETS)
                time.sleep(0.05)  # a pod lives longer
                self.unbind('100.75.30.79', owner=OWNER_79)
                time.sleep(0.05)

        pid = base.in_child(come_and_go)
        try:
            for _ in range(30):
                self.assertEqual({}, self.findings())
        finally:
            with open(stop, 'w'):
                pass
            self.assertEqual(0, base.wait_for(pid))

    def test_many_pods(self) -> None:
        """What costs a request for each pod is done for some of them."""
        for number in range(1, 251):
            self.bind('100.76.0.%d' % number, mac_of_pod=MACS['far'],
                      owner=Owner('many-%d' % number, 'eth0'))
        done = json.loads(self.call('--json').stdout)
        self.assertEqual([], done['findings'])
        self.assertEqual({'addresses': 254, 'looked_up': 128, 'pods': 252,
                          'entered': 2}, done['looked_at'])
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        finding = self.findings()['route-missing']
        self.assertEqual(252, len(finding['subjects']))
        self.assertIn('and 244 more.', ' '.join(
            self.call(code=1).stdout.split()))
