# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import os
import signal
import time
from unittest import mock

from kuryr_break0.doctor import installation
from kuryr_break0.ledger import files
from kuryr_break0.ledger import Ledger
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.support import lab


class TestRecords(DoctorTestCase):

    STATE = '/run/kuryr-break0'

    def record(self, address: str) -> str:
        return '%s/addresses/%s.json' % (self.STATE, address)

    def test_no_agent(self) -> None:
        """The finding's command starts the agent as this host does."""
        self.agent.close()
        finding = self.assert_found('agent-not-running', self.STATE,
                                    severity='warning')
        self.assertEqual(['kuryr-break0 agent'], finding['commands'])
        os.makedirs('/run/systemd/system')  # the unit is not installed
        self.assertEqual(['kuryr-break0 agent'], self.assert_found(
            'agent-not-running')['commands'])
        os.rmdir('/run/systemd/system')
        base.add_unit()
        with mock.patch.object(installation, 'is_for_kuryr',
                               return_value=False):
            finding = self.assert_found('agent-not-running')
        self.assertEqual(['systemctl enable --now kuryr-break0-agent'],
                         finding['commands'])

    def test_the_configuration_in_use_is_named(self) -> None:
        with open('/run/mine.conf', 'w') as file:
            file.write('[break0]\nallowed_cidrs = 10.0.0.0/8\n')
        done = self.call(code=1, config='/run/mine.conf')
        self.assertIn('allowed_cidrs in /run/mine.conf',
                      ' '.join(done.stdout.split()))
        self.agent.close()
        done = self.call(code=1, config='/run/mine.conf')
        self.assertIn('kuryr-break0 --config-file /run/mine.conf agent\n',
                      done.stdout)

    def test_stuck_agent(self) -> None:
        path = self.STATE + '/heartbeat'
        for age, ids in ((100, []), (200, ['agent-stuck'])):
            base.beat_at(path, files.now() - age)
            with self.subTest(age=age):
                self.assertEqual(ids, list(self.findings()))
        self.assert_found('agent-stuck', ' s; the agent is process %d ' %
                          os.getpid(), severity='error')
        self.assertEqual({}, self.findings(resync_interval=100))

    def test_nothing_is_made(self) -> None:
        state = '/run/elsewhere/state'
        found = self.findings(state_dir=state)
        # Pods that this state directory does not record cause no findings.
        self.assertEqual({'agent-not-running', 'ledger-other'}, set(found))
        self.assertFalse(os.path.exists('/run/elsewhere'))

    def test_damaged(self) -> None:
        with open(self.record(POD4), 'w') as file:
            file.write('{"version": 1,')
        for _ in range(2):  # the doctor does not move the file
            found = self.findings()
            self.assertEqual({'ledger-damaged'}, set(found))
            damaged = found['ledger-damaged']
            self.assertIn('Expecting property name', damaged['seen'])
            self.assertEqual([self.record(POD4)], damaged['subjects'])
            self.assertEqual('error', damaged['severity'])

    def test_not_an_address(self) -> None:
        with open(self.record('x'), 'w') as file:
            file.write('{}')
        self.assert_found('ledger-damaged', 'not appear to be an IPv4',
                          self.record('x'))

    def test_quarantined(self) -> None:
        with open(self.record(POD4), 'w') as file:
            file.write('no JSON')
        self.manager().sync()  # quarantines the file, rebuilds the record
        finding = self.assert_found('ledger-quarantined', '',
                                    self.STATE + '/quarantine/%s.json' % POD4,
                                    severity='warning')
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_newer(self) -> None:
        with open(self.record(POD4)) as file:
            fields = json.load(file)
        with open(self.record(POD4), 'w') as file:
            json.dump({**fields, 'version': 3}, file)
        found = self.findings()
        self.assertEqual({'ledger-newer'}, set(found))
        newer = found['ledger-newer']
        self.assertIn('version 3', newer['seen'])
        self.assertEqual([self.record(POD4)], newer['subjects'])
        # The unreadable record may justify the pod's IPv4 neighbours, so a
        # sync keeps these neighbours.
        before = self.lab.ip('neigh', 'show', 'nud', 'permanent', netns='pod')
        self.assertIn(lab.NODE, [each['dst'] for each in before])
        self.manager().sync()
        self.assertEqual(before, self.lab.ip(
            'neigh', 'show', 'nud', 'permanent', netns='pod'))

    def test_sandbox_gone(self) -> None:
        self.lab.del_netns('pod')
        self.follow(self.assert_found(
            'sandbox-gone', '', POD4 + ' (sandbox-1/eth0)',
            POD6 + ' (sandbox-1/eth0)', severity='warning'))
        self.assertEqual({}, self.findings())

    def test_lock_held(self) -> None:
        ready, held = os.pipe()

        def hold() -> None:
            with Ledger(self.STATE, 10).lock():
                os.write(held, b'.')
                time.sleep(1000)

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

    def test_of_others(self) -> None:
        for path in '/run', '/run/netns':
            finding = self.assert_found('state-dir-unusable', path,
                                        state_dir=path)
            self.assertIn('did not create', finding['seen'])
            self.assertNotIn('chmod', str(finding['commands']))

    def test_full(self) -> None:
        self.lab.run('mount', '-t', 'tmpfs', '-o', 'size=64k,mode=700',
                     'tmpfs', '/mnt')
        self.addCleanup(self.lab.run, 'umount', '/mnt')
        self.assertNotIn('state-dir-full', self.findings(state_dir='/mnt'))
        # A file system without a limit reports 0 blocks; btrfs reports 0
        # files.
        self.assertNotIn('state-dir-full', self.findings(state_dir='/sys/x'))
        self.lab.run('sh', '-c', 'yes > /mnt/journal || true')
        found = self.findings(state_dir='/mnt')
        self.assertEqual('error', found['state-dir-full']['severity'])
        self.assertIn('/mnt', found['state-dir-full']['commands'][0])

    def test_persistent(self) -> None:
        for name in ('lower', 'upper', 'work'):
            os.makedirs('/run/disk/' + name)
        self.lab.run('mount', '-t', 'overlay', 'overlay', '-o',
                     'lowerdir=/run/disk/lower,upperdir=/run/disk/upper,'
                     'workdir=/run/disk/work', self.STATE)
        os.chmod(self.STATE, 0o700)
        found = self.findings()
        self.assertIn('state-dir-persistent', found)
        self.assertIn('is on /run/kuryr-break0, which has the persistent '
                      'file system overlay',
                      found['state-dir-persistent']['seen'])
