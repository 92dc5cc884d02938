# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess

from kuryr_break0.break0 import guard
from kuryr_break0 import ledger
from kuryr_break0.ledger import files
from tests.functional import base
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import lab
from tests.support import program


class TestStatus(CLITestCase):

    # Run the program in its own process, as an operator does.
    run_program = staticmethod(subprocess.run)

    def test_tables(self) -> None:
        self.bind(POD, OTHER_POD)
        done = self.call('status')
        self.assertEqual(0, done.returncode, done.stderr)
        for text in ('break0', 'unnumbered', 'up', POD, OTHER_POD,
                     'sandbox-1/eth0'):
            self.assertIn(text, done.stdout)
        self.assertNotIn('macvlan bridge', done.stdout)
        done = self.call('status', '--wide')
        for text in ('macvlan bridge', '1500'):
            self.assertIn(text, done.stdout)

    def test_guard_and_agent(self) -> None:
        self.bind()
        row = (r'\| break0 \| +eth0 +\| unnumbered \| +up +\| +%s +\| '
               r'+%s +\|')
        self.assertRegex(self.call('status').stdout,
                         row % ('loaded', 'stopped'))
        heartbeat = ledger.Ledger('/run/kuryr-break0').heartbeat
        with heartbeat.keep():
            self.lab.run('nft', 'delete', 'table', 'netdev',
                         guard.table_of('break0'))
            self.assertRegex(self.call('status').stdout,
                             row % ('faulty', 'running'))
            with open(heartbeat.path, 'w') as file:
                file.write('%020.3f' % (files.now() - 10 ** 5))
            status = json.loads(self.call('status', '--json').stdout)
        self.assertEqual(('stuck', 'faulty'),
                         (status['agent'], status['device']['guard']))
        self.assertRegex(
            self.call('status', OS_BREAK0__GUARD='off').stdout,
            row % ('off', 'stopped'))
        nft = shutil.which('nft', path='/usr/sbin:/sbin') or ''
        self.lab.run('mount', '--bind', '/dev/null', nft)
        self.addCleanup(self.lab.run, 'umount', nft)
        self.call('sync')
        self.assertRegex(self.call('status').stdout,
                         row % ('unavailable', 'stopped'))
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth')
        status = json.loads(self.call('status', '--json').stdout)
        self.assertIsNone(status['device']['guard'])

    def test_json(self) -> None:
        self.bind(addr=['100.75.30.7'])
        self.lab.run('ip', 'route', 'del', POD)
        done = self.call('status', '--json')
        self.assertEqual(1, done.returncode, done.stderr)
        status = json.loads(done.stdout)
        self.assertFalse(status['in_sync'])
        self.assertEqual(['100.75.30.7'], status['device']['addresses'])
        self.assertEqual(
            [{'address': POD, 'container_id': 'sandbox-1', 'ifname': 'eth0',
              'pod': None, 'origin': None, 'network': None,
              'netns': None, 'parent': 'eth0',
              'device': 'break0', 'routed': False, 'neighbour': None,
              'problem': 'its route is missing', 'in_sync': False}],
            status['addresses'])
        self.assertEqual({'bound': 1, 'routed': 0, 'out_of_sync': 1,
                          'unserved': 0},
                         status['totals'])

    def test_without_break0(self) -> None:
        done = self.call('status', '--json')
        self.assertEqual(0, done.returncode, done.stderr)
        status = json.loads(done.stdout)
        self.assertTrue(status['in_sync'])
        self.assertIsNone(status['device'])
        self.assertEqual([], status['addresses'])
        self.assertIn('break0 does not exist yet', self.call('status').stdout)

    def test_it_changes_nothing(self) -> None:
        self.bind()
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        before = self.lab.link('break0'), self.lab.routes()
        self.assertEqual(1, self.call('status').returncode)
        self.assertEqual(before, (self.lab.link('break0'),
                                  self.lab.routes()))

    def test_it_reads_kuryr_conf(self) -> None:
        self.bind(device='shim')
        with open('/run/kuryr.conf', 'w') as file:
            file.write('[break0]\ndevice = shim\n'
                       '[binding]\nlink_iface = %s\n' % lab.PARENT)
        done = self.call('--config-file', '/run/kuryr.conf', 'status')
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertRegex(done.stdout,
                         r'\| +shim +\| +eth0 +\| unnumbered \| +up +\|')
        self.lab.run('ip', 'link', 'del', 'shim')
        done = self.call('--config-file', '/run/kuryr.conf', 'status')
        self.assertIn('shim is missing on eth0, but 1 addresses are bound',
                      done.stdout)
        self.assertEqual(1, done.returncode)


class TestSync(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD, OTHER_POD)
        self.lab.run('ip', 'route', 'del', POD)

    def test_the_output_lists_the_changes(self) -> None:
        done = self.call('sync')
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertEqual(
            '+ route %s dev break0 proto 176 table 254 src %s\n' %
            (POD, lab.NODE), done.stdout)
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))
        self.assertEqual('', self.call('sync').stdout)

    def test_dry_run(self) -> None:
        done = self.call('sync', '--dry-run', '--json')
        self.assertEqual(1, done.returncode, done.stderr)
        changes = json.loads(done.stdout)
        self.assertEqual([POD], [each['address']
                                 for each in changes['routes']['set']])
        self.assertEqual(([], []), (changes['routes']['delete'],
                                    changes['routes']['foreign']))
        self.assertEqual({'set': [], 'delete': []}, changes['neighbours'])
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))

    def test_a_foreign_route(self) -> None:
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'lo')
        done = self.call('sync')
        self.assertEqual(1, done.returncode)
        self.assertIn('! route %s dev lo proto 3 ' % POD, done.stdout)
        self.assertIn('a route of another program, through lo with protocol 3',
                      self.call('status').stdout)

    def test_an_address_that_is_refused(self) -> None:
        self.lab.run('ip', 'address', 'add', POD, 'dev', 'lo')
        for args in ('--dry-run',), ():
            done = self.call('sync', *args)
            self.assertEqual(1, done.returncode)
            self.assertIn('! address %s: it is an address of the node itself'
                          % POD, done.stdout)
        self.assertEqual(1, self.call('status').returncode)

    def test_no_parent(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        done = self.call('sync')
        self.assertEqual(3, done.returncode)
        self.assertIn('does not exist on this node', done.stderr)


class TestUsage(CLITestCase):

    def test_one_line_and_2(self) -> None:
        for args, environ, text in (
                (('--config-file', '/run/none.conf', 'status'), {},
                 '/run/none.conf'),
                (('status',), {'OS_BREAK0__ADDR': 'x'}, "'x' is not an IPv4"),
                (('status',), {'OS_BREAK0__STATE_DIR': 'x'},
                 'absolute path')):
            with self.subTest(args=args, environ=environ):
                done = self.call(*args, **environ)
                self.assertEqual(2, done.returncode)
                self.assertEqual(1, done.stderr.count('\n'), done.stderr)
                self.assertIn(text, done.stderr)

    def test_not_a_configuration_file(self) -> None:
        with open('/run/kuryr.conf', 'w') as file:
            file.write('this is no section\n')
        done = self.call('--config-file', '/run/kuryr.conf', 'status')
        self.assertEqual(2, done.returncode)
        self.assertIn('/run/kuryr.conf', done.stderr)

    def test_files_that_are_none(self) -> None:
        for content, text in (
                (b'\xff\xfe\0', 'is not valid UTF-8'),
                (b'[break0]\ndevice = $break0.device\n', 'refers to itself'),
                (b'[break0\n', 'Invalid section'),
                (b'[DEFAULT]\ndebug = maybe\n', 'Boolean value: maybe'),
                (b'[break0]\nstate_dir = /run/a\n  b\n', 'absolute path'),
                (b'[break0]\nparent = ${nothing}\n', 'parent')):
            with open('/run/kuryr.conf', 'wb') as file:
                file.write(content)
            for verb in ('status', 'doctor', 'agent', 'cleanup'):
                done = self.call('--config-file', '/run/kuryr.conf', verb)
                self.assertEqual(2, done.returncode, (verb, done.stderr))
                self.assertIn(text, done.stderr + done.stdout)
                self.assertNotIn('Traceback', done.stderr)
        for option, path in (('--log-config-append', '/run/none'),
                             ('--config-dir', '/run/kuryr.conf'),
                             ('--log-file=/run/log', '--use-journal')):
            done = self.call(option, path, 'status')
            self.assertEqual(2, done.returncode, done.stdout)
            self.assertEqual(1, done.stderr.count('\n'), done.stderr)

    def test_interrupted(self) -> None:
        self.bind()
        with base.locked():
            with base.until_opened('/run/kuryr-break0/lock'):
                syncing = subprocess.Popen(
                    [program.BREAK0, 'sync'], stderr=subprocess.PIPE,
                    text=True)
            syncing.send_signal(signal.SIGINT)
            _, stderr = syncing.communicate(timeout=lab.PATIENCE)
        self.assertEqual(130, syncing.returncode, stderr)
        self.assertNotIn('Traceback', stderr)

    def test_interrupted_while_it_starts(self) -> None:
        with open('/run/sitecustomize.py', 'w') as file:
            file.write('import signal, sys\n'
                       'class Finder:\n'
                       '    def find_spec(self, name, *args):\n'
                       '        if name == "kuryr_break0.cli.common":\n'
                       '            signal.raise_signal(signal.SIGINT)\n'
                       'sys.meta_path.insert(0, Finder())\n')
        done = self.call('status', PYTHONPATH='/run')
        self.assertEqual((130, ''), (done.returncode, done.stderr))

    def test_no_command(self) -> None:
        done = self.call()
        self.assertEqual(2, done.returncode)
        self.assertIn('usage: kuryr-break0', done.stdout)

    def test_typos(self) -> None:
        for args, text in (
                (['--foo'], '--foo is not understood (see kuryr-break0 --h'),
                (['-x'], '-x is not understood'),
                (['--foo', 'status'], '--foo is not understood'),
                (['--foo', 'bind'], '--foo is not understood'),
                (['bind', '--foo'], '--foo is not understood'),
                (['--config-flie', '/x', 'status'],
                 '--config-flie is not understood: did you mean --config-fi'),
                (['--config-flie=/x', 'status'],
                 '--config-flie=/x is not understood: did you mean --config-'),
                (['status', '--frobnicate'], '--frobnicate is not under'),
                (['sync', '--dryrun'], 'did you mean --dry-run?'),
                (['--json', 'status'], '--json is not understood: it comes '
                 'after COMMAND'),
                (['--json'], 'it comes after COMMAND'),
                (['--owner', 'bind'], 'it comes after COMMAND'),
                (['status', '--debug'], '--debug is not understood: it comes '
                 'before COMMAND'),
                (['unbind', '--mac', 'x'], '--mac is not understood (see '
                 'kuryr-break0 unbind'),
                (['--debug'], 'arguments are required: COMMAND'),
                (['frobnicate'], 'no command frobnicate (see'),
                (['statsu'], 'no command statsu: did you mean status?'),
                (['--debug', 'statsu'], 'no command statsu: did you mean'),
                (['STATUS'], 'did you mean status?'),
                ([''], "no command ''"),
                (['--debug', ''], "no command ''"),
                (['sta\ntus'], 'no command sta\\ntus: did you mean status?'),
                (['--f\noo'], '--f\\noo is not understood'),
                (['\udcff'], 'no command \\xff'),
                (['--\udcff'], '--\\xff is not understood'),
                (['status', 'a', 'b'], 'b is not understood'),
                (['probe', '--count', '-1'], "'-1' is not a whole number"),
                (['bind', '::'], 'an unspecified address'),
                (['--shell_completion', 'csh'], 'bash, zsh, fish, not csh'),
                (['--log-file', '/none/log', 'status'],
                 'Cannot write /none/log: No such file')):
            with self.subTest(args=args):
                done = self.call(*args)
                self.assertEqual(2, done.returncode)
                self.assertEqual(1, done.stderr.count('\n'), done.stderr)
                self.assertIn(text, done.stderr)

    def test_where_nothing_can_be_printed(self) -> None:
        self.bind()
        for args in ['status'], ['--help'], ['doctor', '--no-probe']:
            with open('/dev/full', 'w') as full:
                done = program.run(
                    [program.BREAK0, *args], stdout=full, text=True,
                    stderr=subprocess.PIPE)
            self.assertEqual((3, 'kuryr-break0: Cannot print: No space left '
                              'on device\n'), (done.returncode, done.stderr))
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        for args, code in ((['status'], 1), (['statsu'], 2), (['--help'], 0),
                           (['doctor', '--no-probe'], 4), (['cni'], 1)):
            for closed in '>&-', '<&- >&-':
                done = self.run_program(
                    ['sh', '-c', 'exec "$0" "$@" ' + closed,
                     program.BREAK0, *args],
                    stderr=subprocess.PIPE, text=True)
                self.assertEqual(code, done.returncode, done.stderr)
                self.assertNotIn('Traceback', done.stderr)

    def test_a_file_that_the_kernel_lacks(self) -> None:
        self.bind()
        done = subprocess.run(
            ['unshare', '--mount', 'sh', '-c', 'mount -t tmpfs none /proc; '
             'exec %s status' % program.BREAK0],
            text=True, capture_output=True)
        self.assertEqual(3, done.returncode)
        self.assertEqual(
            'kuryr-break0: A system call failed: [Errno 2] No such file or '
            "directory: '/proc/thread-self/ns/net'\n", done.stderr)

    def test_help_and_version(self) -> None:
        self.assertIn('status', self.call('--help').stdout)
        self.assertIn('--json', self.call('status', '--help').stdout)
        self.assertEqual(0, self.call('--version').returncode)

    def test_a_state_directory_that_cannot_be_read(self) -> None:
        os.makedirs('/run/state')
        with open('/run/state/addresses', 'w'):
            pass
        done = self.call('status', OS_BREAK0__STATE_DIR='/run/state')
        self.assertEqual(3, done.returncode)
        self.assertIn('/run/state', done.stderr)
        self.assertEqual(1, done.stderr.count('\n'), done.stderr)
