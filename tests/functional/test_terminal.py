# SPDX-License-Identifier: Apache-2.0

"""Output on a terminal: width, colour, counter, names and errors."""

from __future__ import annotations

import os
import pty
import subprocess
from unittest import mock

from kuryr_break0.cli import main
from kuryr_break0.cli import output
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import lab
from tests.support import program

POD6 = 'fd00:30:1234:5678:9abc:def0:1234:71'
RED = '\x1b[31m'


class TestTerminal(CLITestCase):

    def on_terminal(self, *args: str, **environ: str) -> str:
        """Return the output of the command on a terminal."""
        master, slave = pty.openpty()
        with open(master, 'rb', buffering=0) as file:
            with subprocess.Popen([program.BREAK0, *args], stdout=slave,
                                  stderr=slave, env={
                    **os.environ, 'TERM': 'xterm', 'COLUMNS': '80',
                    **environ}):
                os.close(slave)
                seen = b''
                try:
                    while chunk := file.read(4096):
                        seen += chunk
                except OSError:  # the command has closed the terminal
                    pass
        return seen.decode()

    def bind_pod(self) -> None:
        self.lab.add_ipv6()
        netns = self.lab.add_pod('web', POD, POD6)
        mac = self.lab.ip('link', 'show', 'eth0', netns='web')[0]['address']
        self.manager().bind(
            Owner('c0ffee' * 10, 'eth0'), base.addresses(POD, POD6),
            parent=lab.PARENT, mac=mac, netns=netns, pod='shop/web',
            origin=Origin.CNI)

    def test_eighty_columns(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'route', 'del', POD, 'dev', 'break0')
        for args in (('status',), ('probe', '--all', '--count', '1'),
                     ('doctor',), ('check', '--parent', 'eth0')):
            done = self.call(*args, COLUMNS='80')
            for line in done.stdout.splitlines():
                if not line.startswith(' ' * 10):  # not a command to paste
                    self.assertLessEqual(len(line), 80, line)
        for args in (('status', '--wide'), ('probe', '--all', '--wide',
                                            '--count', '1')):
            done = self.call(*args, COLUMNS='40')
            self.assertIn(POD6, done.stdout)

    def test_colour(self) -> None:
        self.bind_pod()
        self.assertNotIn(RED, self.on_terminal('status'))
        self.lab.run('ip', 'route', 'del', POD, 'dev', 'break0')
        self.assertIn(RED, self.on_terminal('status'))
        self.assertIn(RED, self.on_terminal('status', 'none'))
        self.assertNotIn(RED, self.on_terminal('status', NO_COLOR='1'))
        self.assertNotIn(RED, self.call('status').stdout)

    def test_by_name(self) -> None:
        self.bind_pod()
        done = self.call('probe', 'web', '--count', '1')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual(4, done.stdout.count('1 of 1'))
        self.assertEqual(2, self.call('unbind', '--pod', 'x').returncode)
        self.assertEqual(2, self.call('unbind', POD).returncode)
        for args in ('web', '--ifname', 'net1'), ('100.75.30.99',):
            done = self.call('unbind', '--pod', *args)
            self.assertEqual(2, done.returncode, done.stdout)
            self.assertIn('No address of', done.stderr)
        done = self.call('unbind', '--pod', 'shop/web')
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertEqual(set(), self.bound())

    def test_counter(self) -> None:
        """The counter is shown only on a terminal."""
        self.bind_pod()
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='web')
        seen = self.on_terminal('probe', '--all', '--count', '3')
        self.assertRegex(seen, r'probe: \d of 2, \d+ s')
        self.assertRegex(self.on_terminal('doctor'),
                         r'doctor: \d of \d, \d+ s')
        done = self.call('probe', '--all', '--count', '3')
        self.assertNotIn(' s\x1b', done.stdout + done.stderr)
        self.assertEqual('', done.stderr)

    def test_errors_are_one_line(self) -> None:
        for args, text in ((('statsu',), 'did you mean status?'),
                           (('status', '--jsno'), 'did you mean --json?'),
                           (('bind',), 'required'), (('-d',), 'COMMAND'),
                           (('probe', 'x'), 'no container or pod'),
                           (('agent', 'x'), 'agent --help')):
            with self.subTest(args):
                done = self.call(*args)
                self.assertEqual(2, done.returncode)
                self.assertEqual(1, done.stderr.count('\n'), done.stderr)
                self.assertIn(text, done.stderr)
                self.assertNotIn('usage:', done.stderr)

    def test_which_configuration_is_read(self) -> None:
        paths = ['/run/home/.kuryr/kuryr.conf',
                 '/run/home/.kuryr-break0/kuryr-break0.conf']
        for path in paths:
            os.makedirs(os.path.dirname(path))
            with open(path, 'w') as file:
                file.write('[break0]\nresync_interval = 1\n')
        shown = self.call('--help', HOME='/run/home').stdout
        self.assertIn('On this host: %s\nIgnored: %s\n' % tuple(paths), shown)
        agent = subprocess.Popen(
            [program.BREAK0, 'agent'], stderr=subprocess.PIPE, text=True,
            env={**os.environ, 'HOME': '/run/home'})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        assert agent.stderr
        for text in ('Read the configuration from ' + paths[0],
                     '%s is not read, because' % paths[1]):
            while text not in (line := agent.stderr.readline()):
                self.assertTrue(line, 'it has ended')
        os.remove(paths[0])
        self.assertIn('On this host: %s\n' % paths[1],
                      self.call('--help', HOME='/run/home').stdout)

    def test_a_wrong_configuration_ends_the_agent(self) -> None:
        done = self.call('agent', OS_BREAK0__DISCOVER='true')
        self.assertEqual(2, done.returncode)
        self.assertIn('allowed_cidrs', done.stderr)
        self.assertEqual(1, done.stderr.count('\n'), done.stderr)

    def test_not_root(self) -> None:
        for verb in ('status', 'doctor', 'agent', 'sync'):
            with mock.patch.object(os, 'geteuid', return_value=1000):
                with self.subTest(verb), mock.patch.object(
                        output, 'write') as written:
                    self.assertEqual(2, main.main([verb]))
            self.assertEqual(
                'kuryr-break0: Run the command as root: sudo kuryr-break0 '
                + verb,
                written.call_args[0][0])

    def test_on_a_host_of_containers(self) -> None:
        for text, spoken in (
                ('a pod on the node, and its pods.',
                 'a container on the host, and its containers.'),
                ('the next ADD or DEL of an ADD', 'the next start or stop of '
                 'a start'),
                ('/run/netns/pod node/eth0 --pod [kubernetes] node.example',
                 '/run/netns/pod node/eth0 --pod [kubernetes] node.example')):
            self.assertEqual(text, output.speak(text))
            with mock.patch.object(output._Reader, 'has_pods', False):
                self.assertEqual(spoken, output.speak(text))
