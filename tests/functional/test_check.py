# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil

from kuryr_break0 import kernel
from tests.functional.cli_base import add_unfit
from tests.functional.cli_base import CLITestCase
from tests.functional.cli_base import UNFIT
from tests.functional.cni import base as cni_base
from tests.support import lab
from tests.support import program


class TestCheck(CLITestCase):

    def check(self, *args: str, code: int = 0,
              **environ: str) -> dict[str, tuple[str, str]]:
        done = self.call('check', '--json', *args, **environ)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return {each['id']: (each['severity'], each['seen'])
                for each in json.loads(done.stdout)['findings']}

    def lacking(self) -> set[str]:
        """Return the warnings that this kernel causes on every node.

        Linux before 5.16 has no egress hook. Linux 7.0 and later opens
        namespaces by their cookies only in the initial process namespace.
        """
        lacking = set() if self.has_egress() else {'egress-unguarded'}
        if self.is_blind():
            lacking.add('sandbox-unknown')
        return lacking

    def assert_fine(self, **environ: str) -> None:
        lacking = self.lacking()
        found = self.check('--parent', lab.PARENT, code=4 if lacking else 0,
                           **environ)
        self.assertEqual(lacking, set(found), found)

    def test_a_node_that_is_fine(self) -> None:
        before = self.lab.state()
        self.assert_fine()
        # A check must change no state and send no frame.
        self.assertEqual(before, self.lab.state())
        with self.lab.capture() as frames:
            self.assert_fine()
        self.assertEqual([], [frame for frame in frames
                              if frame.src.startswith('02:00:00')])
        text = self.call('check', '--parent', lab.PARENT, COLUMNS='79').stdout
        self.assertIn('Examined: capabilities, kernel, the parent, macvlans '
                      'on it', ' '.join(text.split()))
        self.assertEqual(not self.lacking(), 'Nothing is wrong.' in text,
                         text)
        self.assertLess(max(map(len, text.splitlines())), 80)

    def assert_found(self, expected: str, severity: str, text: str,
                     *args: str, **environ: str) -> None:
        found = self.check(*(args or ('--parent', lab.PARENT)), code={
            'error': 1, 'warning': 4, 'note': 4 if self.lacking() else 0,
        }[severity], **environ)
        self.assertEqual(severity, found[expected][0], found)
        self.assertIn(text, found[expected][1])

    def test_each_wrong_precondition(self) -> None:
        self.assert_found('parent-missing', 'error', 'no interface eth7',
                          '--parent', 'eth7')
        add_unfit(self.lab)
        for parent, text in UNFIT.items():
            self.assert_found('macvlan-impossible', 'error', text,
                              '--parent', parent)
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth', 'peer',
                     'name', 'other')
        self.assert_found('break0-foreign', 'error', 'break0 is a veth')
        self.assert_fine(OS_BREAK0__DEVICE='shim')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'route', 'add', '192.0.2.9', 'dev', lab.PARENT,
                     'proto', '176')
        self.assert_found('protocol-taken', 'error', '1 routes of other')
        self.lab.run('ip', 'route', 'del', '192.0.2.9')
        open('/run/file', 'w').close()
        self.assert_found('state-dir-unusable', 'error', '/run/file',
                          OS_BREAK0__STATE_DIR='/run/file/state')
        self.assert_found('sysctls-read-only', 'error', '/run/net',
                          OS_BREAK0__SYSCTL_DIR='/run')
        os.makedirs('/run/systemd/netif/links')
        self.assert_found('drop-in-missing', 'note', 'systemd-networkd')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        self.assert_found('parent-down', 'error', 'is down')
        self.lab.del_netns('lan')  # deletes eth0's veth peer too
        found = self.check('--parent', lab.PARENT, code=1,
                           OS_BREAK0__PROC_DIRS='/run')
        self.assertEqual('warning', found['namespaces-unseen'][0])

    def test_the_slow_plugin_of_kuryr(self) -> None:
        self.lab.run('mount', '-t', 'tmpfs', 'plugins', cni_base.PLUGINS)
        self.addCleanup(self.lab.run, 'umount', cni_base.PLUGINS)
        path = os.path.join(cni_base.PLUGINS, 'kuryr-cni')
        os.symlink(os.path.join(program.BIN, 'kuryr-cni'), path)
        self.assert_found('plugin-slow', 'note', path)
        os.unlink(path)
        shutil.copy('/bin/true', path)
        self.assert_fine()

    def test_a_kernel_that_guards_nothing_that_leaves(self) -> None:
        # The script prints the error of nft on Linux 5.10.
        with open('/run/nft', 'w') as file:
            file.write('#!/bin/sh\n! grep -q egress || { echo \''
                       '/dev/stdin:3:9-54: Error: Chain of type "filter" is '
                       'not supported, perhaps kernel support is missing?\n'
                       'type filter hook egress device "lo"\n^^^\n\' >&2; '
                       'exit 1; }\n')
        os.chmod('/run/nft', 0o755)
        found = self.check('--parent', lab.PARENT, code=4,
                           PATH='/run:' + os.environ['PATH'])
        self.assertEqual(
            ('warning', 'nft says: Chain of type "filter" is not supported, '
             'perhaps kernel support is missing?'), found['egress-unguarded'])

    def test_no_nft(self) -> None:
        nft = kernel.find_program('nft') or ''
        self.lab.run('mount', '--bind', '/dev/null', nft)
        self.addCleanup(self.lab.run, 'umount', nft)
        for guard, severity, code in ('auto', 'warning', 4), ('on', 'error',
                                                              1):
            found = self.check('--parent', lab.PARENT, code=code,
                               OS_BREAK0__GUARD=guard)
            self.assertEqual((severity, 'there is no program nft'),
                             found['guard-unavailable'])

    def test_parent_that_is_not_known(self) -> None:
        done = self.call('check', '--json')
        self.assertEqual(['the interface of the containers: name it by '
                          '--parent NAME'],
                         json.loads(done.stdout)['not_examined'])
        text = ' '.join(self.call('check').stdout.split())
        self.assertIn('Examined: capabilities, kernel, names', text)

    def test_options_that_are_invalid(self) -> None:
        self.assertIn('options-invalid', self.check(
            code=2, OS_BREAK0__ROUTE_TABLE='x'))
