# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os

from kuryr_break0 import kernel
from tests.functional.test_cli import CLITestCase
from tests import lab


class TestCheck(CLITestCase):

    def check(self, *args: str, code: int = 0,
              **environ: str) -> dict[str, tuple[str, str]]:
        done = self.call('check', '--json', *args, **environ)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return {each['what']: (each['state'], each['text'])
                for each in json.loads(done.stdout)}

    def test_a_node_that_is_fine(self) -> None:
        before = self.lab.state()
        found = self.check('--parent', lab.PARENT)
        lacking = set() if self.has_egress() else {'guard'}
        # In another process namespace it does not show them by their numbers.
        if (kernel.release() >= (7, 0) and os.stat('/proc/self/ns/pid').st_ino
                != 0xeffffffc):  # PROC_PID_INIT_INO
            lacking.add('end of namespaces')
        self.assertEqual(
            lacking,
            {what for what, (state, _) in found.items() if state != 'ok'},
            found)
        self.assertLessEqual(
            {'capabilities', 'kernel', 'parent', 'macvlan', 'device', 'guard',
             'sysctls', 'state directory', 'namespaces', 'protocol number',
             'managers', 'kuryr'}, set(found))
        # It leaves nothing, and says nothing on the wire.
        self.assertEqual(before, self.lab.state())
        with self.lab.capture() as frames:
            self.check('--parent', lab.PARENT)
        self.assertEqual([], [frame for frame in frames
                              if frame.src.startswith('02:00:00')])
        text = self.call('check', '--parent', lab.PARENT).stdout
        self.assertLess(max(map(len, text.splitlines())), 80)

    def assert_found(self, what: str, state: str, text: str, *args: str,
                     **environ: str) -> None:
        found = self.check(*(args or ('--parent', lab.PARENT)), code=int(
            state == 'error'), **environ)
        self.assertEqual(state, found[what][0], found)
        self.assertIn(text, found[what][1])

    def test_what_is_wrong(self) -> None:
        self.assert_found('parent', 'error', 'no interface eth7',
                          '--parent', 'eth7')
        self.assert_found('parent', 'error', 'loopback', '--parent', 'lo')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth', 'peer',
                     'name', 'other')
        self.assert_found('device', 'error', 'break0 is a veth')
        self.assert_found('device', 'ok', 'shim is free',
                          OS_BREAK0__DEVICE='shim')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'route', 'add', '192.0.2.9', 'dev', lab.PARENT,
                     'proto', '176')
        self.assert_found('protocol number', 'error', '192.0.2.9')
        self.lab.run('ip', 'route', 'del', '192.0.2.9')
        open('/run/file', 'w').close()
        self.assert_found('state directory', 'error', 'state_dir',
                          OS_BREAK0__STATE_DIR='/run/file/state')
        self.assert_found('sysctls', 'error', 'sysctl_dir',
                          OS_BREAK0__SYSCTL_DIR='/run')
        os.makedirs('/run/systemd/netif/links')
        self.assert_found('managers', 'warning', 'systemd-networkd')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        self.assert_found('parent', 'warning', 'is down')
        self.lab.del_netns('lan')  # with which the NIC goes
        found = self.check('--parent', lab.PARENT, code=1,
                           OS_BREAK0__PROC_DIRS='/run')
        self.assertEqual('warning', found['namespaces'][0])

    def test_a_kernel_that_guards_nothing_that_leaves(self) -> None:
        # With a program that stands in for nft on such a kernel.
        with open('/run/nft', 'w') as file:
            file.write('#!/bin/sh\n! grep -q egress || exit 1\n')
        os.chmod('/run/nft', 0o755)
        self.assert_found('guard', 'warning', 'needs Linux 5.16',
                          PATH='/run:' + os.environ['PATH'])

    def test_parent_that_is_not_known(self) -> None:
        found = self.check()
        self.assertEqual('warning', found['parent'][0])
        self.assertNotIn('macvlan', found)

    def test_macvlan_that_cannot_be_made(self) -> None:
        # No macvlan can be on the loopback.
        found = self.check('--parent', 'lo', code=1)
        self.assertEqual('error', found['macvlan'][0])
