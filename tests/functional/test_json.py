# SPDX-License-Identifier: Apache-2.0

"""The JSON output of each subcommand matches its documented schema."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import yaml

from kuryr_break0.cli import parser
from kuryr_break0 import ledger
from tests.functional.base import options
from tests.functional.base import OTHER_POD
from tests.functional.base import Owner
from tests.functional.base import POD
from tests.functional import cli_base
from tests.functional.schemas import DOCUMENTED
from tests.functional.schemas import schema_of
from tests.functional.schemas import validator
from tests.support import lab


class JSONTestCase(cli_base.CLITestCase):

    def valid(self, command: str, *args: str, form: str = '--json') -> Any:
        """Run a subcommand and return its document, validated."""
        done = self.call(command, form, *args)
        self.assertIn(done.returncode, (0, 1, 4), done.stderr)
        document = (yaml.safe_load(done.stdout) if form == '-oyaml' else
                    json.loads(done.stdout))
        self.validator = validator(command)
        self.validator.validate(document)
        return document

    def add_pod(self) -> None:
        self.lab.add_ipv6()
        path = self.lab.add_pod('pod', POD, mac='fa:16:3e:00:00:01')
        self.bind(POD, 'fd00:30::71', netns=path,
                  mac_of_pod='fa:16:3e:00:00:01')


class TestEach(JSONTestCase):
    """Every subcommand with --json prints a valid document."""

    #: Arguments by subcommand. None: the subcommand needs Kuryr's API, and
    #: the test skips it.
    ARGUMENTS = {
        'probe': (POD, '--count', '1'), 'adopt': None,
        'sync': ('--dry-run',), 'cleanup': ('--dry-run',),
        'bind': ('100.75.30.99', '--owner', 'web', '--parent', lab.PARENT,
                 '--mac', 'fa:16:3e:00:00:99'),
        'unbind': ('100.75.30.99', POD, '--owner', 'web'),
        'cni-install': ('--bin-dir', '/run')}

    def commands(self) -> list[str]:
        return [command for command in parser.whole().verbs
                if '--json' in self.call(command, '--help').stdout]

    def test_in_sync_and_not(self) -> None:
        self.add_pod()
        for broken in (False, True):
            if broken:
                self.lab.run('ip', 'link', 'set', 'break0', 'down')
            for command in self.commands():
                arguments = self.ARGUMENTS.get(command, ())
                if arguments is not None:
                    with self.subTest(command=command, broken=broken):
                        self.valid(command, *arguments)
                        self.valid(command, *arguments, form='-oyaml')

    def test_each_format_is_the_same_document(self) -> None:
        self.add_pod()
        self.lab.run('ip', 'link', 'set', 'eth0', 'alias', 'Tür\n- [x]')
        document = self.valid('status')
        self.assertEqual(document, self.valid('status', form='-ojson'))
        self.assertEqual(document, self.valid('status', form='-oyaml'))
        self.assertEqual(2, self.call('status', '-o', 'xml').returncode)

    def test_its_schema_is_documented(self) -> None:
        commands = self.commands()
        self.assertIn('status', commands)
        with open(os.path.join(DOCUMENTED, 'json.rst')) as file:
            page = file.read()
        for command in commands:
            self.assertIn('``kuryr-break0 %s --json``' % command
                          if command == 'check' else
                          'literalinclude:: %s\n' % schema_of(command), page)


class TestStatus(JSONTestCase):

    def test_without_break0(self) -> None:
        self.assertIsNone(self.valid('status')['device'])

    def test_in_sync(self) -> None:
        self.add_pod()
        status = self.valid('status')
        self.assertTrue(status['in_sync'])
        self.assertEqual(2, status['totals']['routed'])

    def test_problems(self) -> None:
        self.add_pod()
        self.bind(OTHER_POD, addr=['100.75.30.7'], owner=Owner('2', 'eth0'))
        self.lab.run('ip', 'route', 'del', POD)
        self.lab.run('ip', 'route', 'replace', OTHER_POD, 'dev', 'lo')
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0',
                     'proto', '176')
        status = self.valid('status')
        self.assertEqual(3, status['totals']['out_of_sync'])
        self.assertIsNone(status['addresses'][-2]['container_id'])

    def test_another_interface(self) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth')
        self.assertEqual('veth', self.valid('status')['device']['kind'])

    def test_a_changed_document_is_not_valid(self) -> None:
        # A validator that accepts every document would hide all errors.
        self.add_pod()
        document = self.valid('status')
        for change in (
                lambda some: some.update(more=1),
                lambda some: some.pop('totals'),
                lambda some: some['device'].update(mtu='1500'),
                lambda some: some['addresses'][0].update(more=1),
                lambda some: some['addresses'][0].update(address='x'),
                lambda some: some['totals'].pop('bound')):
            changed = copy.deepcopy(document)
            change(changed)
            self.assertFalse(self.validator.is_valid(changed), changed)


class TestBind(JSONTestCase):

    WEB = ('--owner', 'web')

    def test_bind_and_unbind(self) -> None:
        self.add_pod()
        bound = self.valid('bind', '100.75.30.99', *self.WEB, '--parent',
                           lab.PARENT, '--mac', 'fa:16:3e:00:00:99')
        self.assertEqual({'container_id': 'web', 'ifname': 'eth0',
                          'interface': 'break0',
                          'addresses': ['100.75.30.99']}, bound)
        unbound = self.valid('unbind', '100.75.30.99', OTHER_POD, POD,
                             *self.WEB)
        self.assertEqual(
            [{'address': '100.75.30.99', 'outcome': 'unbound'},
             {'address': OTHER_POD, 'outcome': 'not bound'},
             {'address': POD, 'outcome': 'taken'}], unbound['addresses'])


class TestCleanup(JSONTestCase):

    def test_all_is_removed(self) -> None:
        self.add_pod()
        wanted = self.valid('cleanup', '--dry-run')
        self.assertEqual([], wanted['left'])
        self.assertIn('interface break0', wanted['removed'])
        self.assertEqual(wanted, self.valid('cleanup'))
        self.assertEqual({'removed': [], 'left': []}, self.valid('cleanup'))

    def test_the_remaining_objects(self) -> None:
        self.add_pod()
        with ledger.Ledger(options().state_dir, 1).heartbeat.keep() as beat:
            beat()
            left = self.valid('cleanup')['left']
        self.assertEqual(['agent'], [each['what'] for each in left])


class TestCNIInstall(JSONTestCase):

    def test_script(self) -> None:
        self.assertEqual(
            {'installed': '/run/break0', 'shim': None},
            self.valid('cni-install', '--bin-dir', '/run',
                       '--without-agent'))


class TestSync(JSONTestCase):

    def test_nothing_to_do(self) -> None:
        self.assertEqual([], self.valid('sync')['routes']['set'])

    def test_changes(self) -> None:
        self.add_pod()
        self.bind(OTHER_POD, '100.75.30.73', owner=Owner('2', 'eth0'))
        self.lab.run('ip', 'route', 'replace', OTHER_POD, 'dev', 'lo')
        self.lab.run('ip', 'address', 'add', '100.75.30.73', 'dev', 'lo')
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0',
                     'proto', '176')
        self.lab.run('ip', 'neigh', 'add', '100.75.30.99', 'dev', 'break0',
                     'lladdr', '02:00:00:00:00:09', 'nud', 'permanent',
                     'proto', '176')
        self.lab.run('ip', 'route', 'del', POD)
        self.lab.run('ip', 'neigh', 'del', POD, 'dev', 'break0')
        for args in (('--dry-run', '--delete-unclaimed'),
                     ('--delete-unclaimed',)):
            changes = self.valid('sync', *args)
            self.assertEqual(['100.75.30.73'], [
                each['address'] for each in changes['refused']])
            for kind, names in (('routes', ('set', 'delete', 'foreign')),
                                ('neighbours', ('set', 'delete'))):
                for name in names:
                    self.assertNotEqual([], changes[kind][name], name)

    def test_break0_is_to_be_created(self) -> None:
        self.add_pod()
        self.lab.run('ip', 'link', 'del', 'break0')
        changes = self.valid('sync', '--dry-run')
        self.assertEqual(0, changes['routes']['set'][0]['interface_index'])
        self.assertEqual('break0', changes['routes']['set'][0]['interface'])
        self.assertEqual(lab.NODE, changes['routes']['set'][0]['source'])
