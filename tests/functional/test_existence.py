# SPDX-License-Identifier: Apache-2.0

"""A living sandbox is never judged gone, however limited the view is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from typing import Any
from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0.kernel import existence
from kuryr_break0.kernel import namespaces
from kuryr_break0.model import NamespaceId
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional import metrics_base
from tests.support import lab

OWN = '/proc/thread-self/ns/net'
#: Runs a command with the capabilities of a restricted container or unit.
FEW_RIGHTS = ('setpriv', '--bounding-set=-all,+net_admin,+net_raw')
#: Runs a command with an empty mount over /run/netns.
HIDDEN = ('unshare', '--mount', 'sh', '-c',
          'mount -t tmpfs hidden /run/netns && exec "$@"', 'hidden')


class TestJudge(base.LabTestCase):
    """A namespace is gone only if its directory shows another namespace."""

    def setUp(self) -> None:
        super().setUp()
        # The kernel reuses inodes: if "another" were created after the end of
        # "judged", both could have the same inode.
        self.another = self.lab.add_netns('another')
        self.path = self.lab.add_netns('judged')
        self.directory = os.path.dirname(self.path)
        known = kernel.identify(self.path)
        assert known is not None
        self.known = known

    def judge(self, path: Any = '', **change: Any) -> kernel.State:
        return kernel.judge_state(self.path if path == '' else path,
                                  self.known._replace(**change))

    def show(self, namespace: str, name: str) -> None:
        self.lab.run('touch', self.directory + '/' + name)
        self.lab.run('mount', '--bind', namespace,
                     self.directory + '/' + name)

    def hide(self) -> None:
        """Mount an empty directory over the namespaces' directory.

        The namespace "another" stays available at /run/another.
        """
        with open('/run/another', 'w'):
            pass
        self.lab.run('mount', '--bind', self.another, '/run/another')
        self.lab.run('mount', '-t', 'tmpfs', 'names', self.directory)
        self.addCleanup(self.lab.run, 'umount', '-l', self.directory)

    def test_living(self) -> None:
        self.assertIs(kernel.State.LIVING, self.judge())
        self.assertIs(kernel.State.LIVING, self.judge(cookie=None))
        with mock.patch.object(namespaces, 'open_by_cookie',
                               side_effect=OSError(errno.ESTALE, '')):
            self.assertIs(kernel.State.LIVING, self.judge())

    def test_gone(self) -> None:
        self.lab.del_netns('judged')
        self.assertIs(kernel.State.GONE, self.judge())
        self.assertIs(kernel.State.GONE, self.judge(cookie=None))

    def test_without_all_processes(self) -> None:
        """The judge lists the path's directory instead of all processes.

        A container can have thousands of processes.
        """
        if self.known.cookie is None or self.is_blind():
            self.skipTest('without a cookie, the judge must list processes')
        for name in 'abc':
            self.lab.add_netns(name)
        self.lab.del_netns('judged')
        with mock.patch.object(
                existence, '_list_namespaces_at',
                side_effect=existence._list_namespaces_at) as looked:
            self.assertIs(kernel.State.GONE, self.judge())
        looked.assert_called_once_with(self.directory)

    def test_a_path_that_is_another_ones(self) -> None:
        self.lab.del_netns('judged')
        self.show(self.another, 'judged')
        for change in ({}, {'cookie': None, 'inode': 1}):
            with self.subTest(change=change):
                self.assertIs(kernel.State.GONE, self.judge(**change))

    def test_an_inode_that_is_used_again(self) -> None:
        own = kernel.identify(self.path)
        assert own is not None
        if own.cookie is None:
            return  # without a cookie, the judge cannot detect the reuse
        self.assertIs(kernel.State.GONE, kernel.judge_state(
            self.path, own._replace(cookie=2 ** 63)))

    def test_its_own_is_no_presence(self) -> None:
        self.lab.del_netns('judged')
        self.hide()
        self.show(OWN, 'own')
        self.assertIs(kernel.State.UNKNOWN, self.judge(cookie=None))
        os.symlink('/proc/self/ns/uts', self.directory + '/another-kind')
        self.assertIs(kernel.State.UNKNOWN, self.judge(cookie=None))
        self.show('/run/another', 'another')
        self.assertIs(kernel.State.GONE, self.judge(cookie=None))

    def test_a_path_that_shows_no_namespace(self) -> None:
        self.lab.del_netns('judged')
        self.hide()
        self.show('/run/another', 'another')
        for command in ('touch', 'mkdir', 'mkfifo', 'ln -s /dev/zero',
                        'ln -s /dev/tty', 'ln -s judged', 'ln -s /nowhere'):
            with self.subTest(command=command):
                self.lab.run(*command.split(), self.path)
                self.assertIsNone(kernel.identify(self.path))
                self.assertIs(kernel.State.UNKNOWN, self.judge(cookie=None))
                self.lab.run('rm', '-r', self.path)

    def process_in(self, name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ['ip', 'netns', 'exec', name, 'sh', '-c', 'echo; exec cat'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        process.stdout.read(1)
        return process

    def test_a_process_is_still_in_it(self) -> None:
        process = self.process_in('judged')
        self.process_in('another')
        self.lab.run('umount', '-l', self.path)
        self.lab.run('rm', self.path)
        self.assertIs(kernel.State.LIVING, self.judge())
        self.assertIs(kernel.State.LIVING, self.judge(cookie=None))
        # A process with an unreadable namespace proves nothing, and neither
        # does a process in another namespace.
        identify = namespaces.identify_or_fail
        with mock.patch.object(namespaces, 'identify_or_fail', side_effect=(
                lambda path: self.fault() if path.startswith('/proc/')
                and identify(path).is_same(self.known) else identify(path))):
            self.assertIs(kernel.State.UNKNOWN, self.judge(cookie=None))
        # The process's path in /proc gives the same result.
        path = '/proc/%d/ns/net' % process.pid
        self.assertIs(kernel.State.LIVING, self.judge(path, cookie=None))
        process.kill()
        process.wait()
        lab.until(lambda: self.judge() is not kernel.State.LIVING)
        for each in (self.path, path):
            self.assertIs(kernel.State.GONE, self.judge(each))
            self.assertIs(kernel.State.GONE, self.judge(each, cookie=None))

    @staticmethod
    def fault() -> NamespaceId:
        raise OSError(errno.EMFILE, 'Too many open files')

    def test_where_no_other_is_left(self) -> None:
        """If no other namespace is left, a full view of processes suffices.

        No other namespace is left when a host's last container has ended.
        """
        if kernel.Judge().blindness():
            return
        for name in ('another', 'judged'):
            self.lab.del_netns(name)
        self.assertIs(kernel.State.GONE, self.judge(None))

    def test_without_an_identity_nothing_is_known(self) -> None:
        self.assertIs(kernel.State.UNKNOWN,
                      kernel.judge_state(self.path, None))
        self.assertIs(kernel.State.UNKNOWN, kernel.judge_state(None, None))
        self.assertIs(kernel.State.UNKNOWN, self.judge('a\0b', cookie=None))
        self.assertIs(kernel.State.UNKNOWN, kernel.judge_state(
            '/proc/self/ns/uts', NamespaceId(1, 2, None)))


class TestSync(base.LabTestCase):
    """A sync with a limited view keeps the addresses of both pods."""

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_pod('pod', POD)
        other = self.lab.add_pod('other', OTHER_POD)
        self.bind(POD, netns=self.netns)
        self.bind(OTHER_POD, owner=OTHER_OWNER, netns=other)

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)

    def assert_untouched(self) -> None:
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))
        for address in (POD, OTHER_POD):
            self.assertTrue(self.lab.ping(address), address)

    def test_with_few_rights(self) -> None:
        done = self.call(*FEW_RIGHTS, 'kuryr-break0', 'sync')
        self.assertEqual((0, ''), (done.returncode, done.stdout), done.stderr)
        self.assert_untouched()

    def test_the_output_names_objects_that_few_rights_hide(self) -> None:
        self.lab.add_pod('unbound', '100.75.30.99')
        for verb in 'doctor', 'status':
            for rights, expected in (FEW_RIGHTS, True), ((), False):
                done = self.call(*rights, 'kuryr-break0', verb)
                self.assertEqual(expected, 'Not examined: containers that are '
                                 'not bound' in ' '.join(done.stdout.split()),
                                 done.stdout)

    def test_with_few_rights_and_a_view_that_hides_them(self) -> None:
        command = (*HIDDEN, *FEW_RIGHTS, 'kuryr-break0')
        for options in (('--dry-run',), ()):
            done = self.call(*command, 'sync', *options)
            self.assertEqual(1, done.returncode, done.stderr)
            for address, owner in ((POD, OWNER), (OTHER_POD, OTHER_OWNER)):
                self.assertIn('! record %s owner %s: it is not known '
                              'whether its sandbox exists: /run/netns/'
                              % (address, owner), done.stdout)
            self.assertNotIn('\n- ', '\n' + done.stdout)
            self.assert_untouched()
        if self.snapshot().live[base.addresses(POD)[0]].namespace.cookie:
            self.assertIn('lacks CAP_SYS_ADMIN', done.stdout)
        self.assertEqual(1, done.stderr.count('cannot find out'), done.stderr)
        again = self.call(*command, 'sync')
        self.assertNotIn('cannot find out', again.stderr)
        found = json.loads(self.call(*command, 'sync', '--json').stdout)
        self.assertEqual([], found['gone'])
        self.assertEqual([POD, OTHER_POD],
                         [each['address'] for each in found['unjudged']])
        status = self.call(*command, 'status')
        self.assertEqual(1, status.returncode)
        self.assertIn('cannot find out whether the sandboxes of 2 addresses',
                      status.stdout)
        doctor = self.call(*command, 'doctor', '--no-probe', '--json')
        self.assertIn('sandbox-unknown', [
            each['id'] for each in json.loads(doctor.stdout)['findings']])
        checked = self.call(*command, 'check', '--parent', lab.PARENT)
        if 'number namespaces' not in checked.stdout:
            self.assertIn('lacks CAP_SYS_ADMIN', checked.stdout)

    def test_a_view_that_hides_them(self) -> None:
        self.call(*HIDDEN, 'kuryr-break0', 'sync')
        self.assert_untouched()

    def test_one_that_is_gone(self) -> None:
        self.lab.del_netns('other')
        self.call(*FEW_RIGHTS, 'kuryr-break0', 'sync')
        self.assertIn(POD, self.bound())
        self.assertEqual(0, self.call('kuryr-break0', 'sync').returncode)
        self.assertEqual({POD}, self.bound())
        self.assertEqual({POD}, set(self.lab.routes()))

    def test_both_are_gone(self) -> None:
        for name in ('pod', 'other'):
            self.lab.del_netns(name)
        self.call(*HIDDEN, *FEW_RIGHTS, 'kuryr-break0', 'sync')
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.call('kuryr-break0', 'sync')
        self.assertEqual(set(), self.bound())
        self.assertEqual({}, self.lab.routes())


class TestAgent(metrics_base.MetricsTestCase):
    """The agent keeps and reports addresses of sandboxes in doubt."""

    prefix = (*HIDDEN, *FEW_RIGHTS)

    def test_it_says_so_once(self) -> None:
        self.bind(POD, netns=self.lab.add_pod('pod', POD))
        self.start('resync_interval = 1')
        self.wait_for(lambda: (self.value('sync_seconds_count') or 0) > 3)
        # Another number of unjudged addresses must not repeat the log line.
        self.bind(OTHER_POD, owner=OTHER_OWNER,
                  netns=self.lab.add_pod('other', OTHER_POD))
        self.wait_for(lambda: self.value('addresses_unjudged') == 2)
        self.unbind(OTHER_POD, owner=OTHER_OWNER)
        self.wait_for(lambda: self.value('addresses_unjudged') == 1)
        self.assertEqual({POD}, self.bound())
        self.assertTrue(self.lab.ping(POD))
        self.assertEqual(1, self.value('addresses_unjudged'))
        self.assertEqual(1, self.log().count('cannot find out'), self.log())
