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
import os
import signal
import time

from kuryr_break0.ledger import Ledger
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.functional.doctor.base import SUBNETS


class TestRecords(DoctorTestCase):

    STATE = '/run/kuryr-break0'

    def entry(self, address: str) -> str:
        return '%s/addresses/%s.json' % (self.STATE, address)

    def test_no_agent(self) -> None:
        self.agent.close()
        self.assert_found('agent-not-running', self.STATE,
                          severity='warning')

    def test_stuck_agent(self) -> None:
        path = self.STATE + '/attended'
        for silent, ids in ((180, []), (200, ['agent-stuck'])):
            os.utime(path, times=(0, time.time() - silent))
            with self.subTest(silent=silent):
                self.assertEqual(ids, list(self.findings()))
        self.assert_found('agent-stuck', ' s; it is process %d ' %
                          os.getpid(), severity='error')
        self.assertEqual({}, self.findings(resync_interval=100))

    def test_nothing_is_made(self) -> None:
        state = '/run/elsewhere/state'
        found = self.findings(state_dir=state)
        # Nobody claims what this state directory does not know.
        self.assertEqual({'agent-not-running', 'route-stale'}, set(found))
        self.assertFalse(os.path.exists('/run/elsewhere'))

    def test_damaged(self) -> None:
        with open(self.entry(POD4), 'w') as file:
            file.write('{"version": 1,')
        self.assert_found('ledger-damaged', 'Expecting property name',
                          self.entry(POD4), severity='error')
        # It is still there.
        self.assert_found('ledger-damaged', '', self.entry(POD4))

    def test_not_an_address(self) -> None:
        with open(self.entry('x'), 'w') as file:
            file.write('{}')
        self.assert_found('ledger-damaged', 'not appear to be an IPv4',
                          self.entry('x'))

    def test_set_aside(self) -> None:
        with open(self.entry(POD4), 'w') as file:
            file.write('no JSON')
        self.status()
        finding = self.assert_found('ledger-aside', '',
                                    self.STATE + '/damaged/%s.json' % POD4,
                                    severity='warning')
        self.bind(POD4, POD6, netns='/run/netns/pod', subnets=SUBNETS,
                  mac_of_pod=MACS['pod'])
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_newer(self) -> None:
        with open(self.entry(POD4)) as file:
            fields = json.load(file)
        with open(self.entry(POD4), 'w') as file:
            json.dump({**fields, 'version': 2}, file)
        self.assert_found('ledger-newer', 'version 2', self.entry(POD4))

    def test_sandbox_gone(self) -> None:
        self.lab.run('ip', 'netns', 'del', 'pod')
        self.follow(self.assert_found(
            'sandbox-gone', '', POD4 + ' (sandbox-1/eth0)',
            POD6 + ' (sandbox-1/eth0)', severity='warning'))
        self.assertEqual({}, self.findings())

    def test_lock_held(self) -> None:
        ready, held = os.pipe()

        def hold() -> None:
            with Ledger(self.STATE, 10).lock():
                os.write(held, b'.')
                time.sleep(60)

        pid = base.in_child(hold)
        try:
            os.read(ready, 1)
            self.assert_found('lock-held', 'process %d ' % pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)
        self.assertEqual({}, self.findings())

    def test_mode(self) -> None:
        os.chmod(self.STATE, 0o770)
        self.follow(self.assert_found('state-dir-mode', 'mode 0770'))
        self.assertEqual({}, self.findings())

    def test_read_only(self) -> None:
        self.lab.run('mount', '--bind', self.STATE, self.STATE)
        self.lab.run('mount', '-o', 'remount,bind,ro', self.STATE)
        self.assert_found('state-dir-unusable', 'cannot write',
                          severity='error')

    def test_not_a_directory(self) -> None:
        with open('/run/file', 'w'):
            pass
        self.assert_found('state-dir-unusable', '/run/file is not a dir',
                          state_dir='/run/file/state')

    def test_persistent(self) -> None:
        for name in ('lower', 'upper', 'work'):
            os.makedirs('/run/disk/' + name)
        self.lab.run('mount', '-t', 'overlay', 'overlay', '-o',
                     'lowerdir=/run/disk/lower,upperdir=/run/disk/upper,'
                     'workdir=/run/disk/work', self.STATE)
        os.chmod(self.STATE, 0o700)
        found = self.findings()
        self.assertIn('state-dir-persistent', found)
        self.assertIn('is on /run/kuryr-break0, which is overlay',
                      found['state-dir-persistent']['seen'])
