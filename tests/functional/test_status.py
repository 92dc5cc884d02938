# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.cli_base import CLITestCase
from tests.support import lab
from tests.support import program

LONG = 'a-namespace-with-a-rather-long-name/a-pod-whose-name-is-longer-still'
ID = 'c0ffee' * 10


class TestStatus(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        for number, (container_id, pod, origin) in enumerate((
                (ID, LONG, Origin.KURYR), ('beef' * 16, 'shop/web',
                                           Origin.CNI),
                ('discovered-77', None, Origin.DISCOVERED))):
            self.manager().bind(
                Owner(container_id, 'eth0'),
                base.addresses('100.75.30.%d' % (71 + number),
                               'fd00:30:1234:5678:9abc:def0:1234:%x' % number),
                parent=lab.PARENT, mac='fa:16:3e:00:00:0%d' % number,
                pod=pod, origin=origin)

    def text(self, *args: str, code: int = 0) -> str:
        done = self.call('status', *args)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def rows(self, *args: str, code: int = 0) -> list[str]:
        """Return the printed addresses in their order."""
        return re.findall(r'(?m)^\| +((?:1|fd)[0-9a-f.:]+) ',
                          self.text(*args, code=code))

    def test_width_and_names(self) -> None:
        self.lab.run('ip', 'route', 'del', '100.75.30.71', 'dev', 'break0')
        for width in (80, 100):
            done = self.call('status', COLUMNS=str(width))
            self.assertLessEqual(max(map(len, done.stdout.splitlines())),
                                 width, done.stdout)
        text = self.text(code=1)
        self.assertIn('shop/web/eth0', text)
        self.assertIn('discovered-77/eth0', text)
        self.assertNotIn(ID, text)
        piped = self.call('status', COLUMNS='').stdout
        self.assertEqual(text.splitlines()[-1], piped.splitlines()[-1])
        self.assertGreater(len(piped.splitlines()[-1]), 100)
        wide = self.call('status', '--wide', COLUMNS='80').stdout
        self.assertIn('%s/eth0 (%s)' % (ID, LONG), wide)

    def test_wait(self) -> None:
        self.text('--wait')  # everything is in sync
        self.lab.run('ip', 'route', 'del', '100.75.30.72', 'dev', 'break0')
        began = time.monotonic()
        self.assertIn('its route is missing',
                      self.text('--wait', '1', code=1))
        self.assertGreater(time.monotonic() - began, 1)
        waiting = subprocess.Popen([program.BREAK0, 'status', '--wait', '170'],
                                   stdout=subprocess.DEVNULL)
        self.addCleanup(waiting.wait)
        self.addCleanup(waiting.kill)
        time.sleep(1)  # the result does not depend on this pause
        self.manager().sync()
        self.assertEqual(0, waiting.wait())

    def test_a_parent_that_is_down(self) -> None:
        """One line reports the parent. No line reports a missing route."""
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        text = self.text(code=1)
        self.assertEqual(1, text.count('Out of sync: eth0, the parent'), text)
        self.assertNotIn('its route is', text)

    def test_problems_first(self) -> None:
        self.lab.run('ip', 'route', 'del', '100.75.30.72', 'dev', 'break0')
        rows = self.rows(code=1)
        self.assertEqual('100.75.30.72', rows[0])
        self.assertEqual(6, len(rows))
        self.assertEqual(['100.75.30.72'], self.rows('--problems', code=1))
        # The totals still count all addresses.
        self.assertIn('6 bound, 5 routed, 1 out of sync',
                      self.text('--problems', code=1))

    def test_filters(self) -> None:
        for args, last in ((('--pod', 'web'), '72'),
                           (('--owner', 'c0ffee'), '71'),
                           (('--origin', 'discovered'), '73'),
                           (('--origin', 'cni', '--owner', 'beef'), '72')):
            self.assertEqual('100.75.30.' + last, self.rows(*args)[0])
            self.assertEqual(2, len(self.rows(*args)))
        self.assertEqual([], self.rows('--pod', 'nobody'))
        found = json.loads(self.text('--json', '--pod', 'web'))
        self.assertEqual(
            [('shop/web', 'cni')] * 2,
            [(each['pod'], each['origin']) for each in found['addresses']])

    def test_one_by_its_name(self) -> None:
        for name, last in (('shop/web', '72'), ('web', '72'), (LONG, '71'),
                           (ID[:12], '71'), ('discovered-77', '73')):
            self.assertEqual('100.75.30.' + last, self.rows(name)[0])
            self.assertEqual(2, len(self.rows(name)), name)
        self.assertEqual(['100.75.30.72'], self.rows('100.75.30.72'))
        done = self.call('status', 'wep')
        self.assertEqual(2, done.returncode)
        self.assertTrue(self.call('status', 'shop/wep').stderr.endswith(
            ': did you mean shop/web?\n'))
        self.assertEqual(1, done.stderr.count('\n'))

    def test_an_empty_name(self) -> None:
        """An empty name, as of an unset variable, matches no container."""
        for args in (['status', ''], ['probe', ''], ['unbind', '--pod', '']):
            done = self.call(*args)
            self.assertEqual(2, done.returncode, args)
            self.assertIn("'' is not an IPv4 or IPv6 address, and no cont",
                          done.stderr)
        self.assertEqual(6, len(self.bound()))

    def test_thousand_begin_with_a_summary(self) -> None:
        self.bind(*('10.1.%d.%d' % divmod(number, 256)
                    for number in range(1, 500)))
        lines = self.text().splitlines()
        summary = next(number for number, line in enumerate(lines)
                       if '505 bound' in line)
        self.assertLess(summary, 10)

    def test_an_address_that_another_table_or_rule_leads_astray(self) -> None:
        pod, pod6 = '100.75.30.72', 'fd00:30:1234:5678:9abc:def0:1234:1'
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN,
                     'table', '100')
        for what, where, text in (
                (('route',), ('local', pod, 'dev', 'lo', 'table', 'local'),
                 'it is a local address of the node'),
                (('-6', 'route'), ('local', pod6 + '/127', 'dev', 'lo',
                                   'table', 'local'),
                 'it is a local address of the node'),
                (('-6', 'route'), (pod6, 'from', lab.NODE6, 'dev', 'lo'),
                 'by table 254'),
                (('rule',), ('to', pod, 'table', '100'),
                 'through eth0, by table 100'),
                (('rule',), ('from', lab.NODE, 'to', pod, 'table', '100'),
                 'ip route get %s from %s' % (pod, lab.NODE))):
            with self.subTest(where=where):
                self.lab.run('ip', *what, 'add', *where)
                found = self.call('status')
                doctor = self.call('doctor', '--json').stdout
                self.lab.run('ip', *what, 'del', *where)
                self.assertEqual(1, found.returncode, found.stdout)
                self.assertIn('packets to it do not leave through break0: ',
                              found.stdout)
                self.assertIn(text, found.stdout)
                self.assertIn(text, doctor)
                self.text()

    def test_routes_are_looked_up_only_with_rules(self) -> None:
        """Routes are looked up only if a rule is not a default rule."""
        with mock.patch.object(kernel.Netlink, 'lookup', autospec=True,
                               return_value=None) as lookup:
            self.assertEqual([], self.problems())
            lookup.assert_not_called()
            self.lab.run('ip', 'rule', 'add', 'to', '192.0.2.1', 'table',
                         '100')
            self.assertEqual(6, len(self.problems()))
            self.assertEqual(6, lookup.call_count)
            self.manager().sync()
            self.assertEqual(6, lookup.call_count)

    def watch(self, *options: str) -> subprocess.Popen[str]:
        watching = subprocess.Popen(
            [program.BREAK0, 'status', '--watch', *options],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(watching.communicate)
        self.addCleanup(watching.kill)
        return watching

    def test_watch_as_json(self) -> None:
        watching = self.watch('--json')
        assert watching.stdout
        for is_in_sync in (True, False):
            document = watching.stdout.readline()
            while not document.endswith('\n}\n'):
                document += watching.stdout.readline()
            self.assertEqual(is_in_sync, json.loads(document)['in_sync'])
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')

    def test_watch(self) -> None:
        watching = self.watch()
        assert watching.stdout
        while 'discovered-77' not in watching.stdout.readline():
            pass
        self.lab.run('ip', 'route', 'del', '100.75.30.72', 'dev', 'break0')
        while '+ 100.75.30.72: its route is missing' not in (
                watching.stdout.readline()):
            pass
        self.call('sync')
        self.unbind('100.75.30.73', owner=Owner('discovered-77', 'eth0'))
        seen = ''
        while ('- 100.75.30.72: its route is missing' not in seen
               or '- 100.75.30.73: bound for discovered-77' not in seen):
            seen += watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        output, _ = watching.communicate(timeout=lab.PATIENCE)
        self.assertNotIn('Traceback', output)
        self.assertEqual(0, watching.returncode)
