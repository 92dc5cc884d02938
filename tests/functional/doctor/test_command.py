# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import subprocess
import tarfile
import time
from unittest import mock

from oslo_config import cfg

from kuryr_break0.doctor import examination
from kuryr_break0.doctor import report
from kuryr_break0 import kernel
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OWNER_79
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.functional.doctor.base import SUBNETS
from tests import lab


class TestCommand(DoctorTestCase):

    def test_for_people(self) -> None:
        self.lab.run('ip', 'route', 'del', POD4)
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        done = self.call(code=1)
        self.assertEqual('', done.stderr)
        self.assertIn('error: route-missing\n  seen  addresses of pods have '
                      'no route through break0 in table 254:', done.stdout)
        self.assertIn('\n          kuryr-break0 sync\n', done.stdout)
        self.assertIn('Errors: 1, warnings: 1. Examined: 2 of 2 pods from '
                      'inside', done.stdout)
        self.assertLess(max(map(len, done.stdout.splitlines())), 80)

    def test_a_state_directory_that_cannot_be_read(self) -> None:
        os.makedirs('/run/state/addresses')
        os.chmod('/run/state', 0o700)
        os.symlink('lock', '/run/state/lock')
        done = self.call(code=3, OS_BREAK0__STATE_DIR='/run/state')
        self.assertIn('/run/state', done.stderr)

    def test_severity_and_what_is_ignored(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        found = json.loads(self.call('--json', code=4).stdout)['findings']
        self.assertEqual(['warning'], [each['severity'] for each in found])
        self.call('--ignore', found[0]['id'], code=0)
        self.lab.run('ip', 'route', 'del', POD4)
        self.call('--ignore', found[0]['id'], code=1)
        self.call('--ignore', found[0]['id'], '--ignore', 'route-missing')
        done = self.call('--ignore', 'route-mising', code=2)
        self.assertIn('did you mean route-missing?', done.stderr)

    def test_a_firewalled_node_is_healthy(self) -> None:
        self.lab.run('nft', 'table inet filter { chain in { type filter hook '
                     'input priority 0; policy drop; ct state established '
                     'accept; tcp dport 22 accept; }; }')
        with self.lab.socket(socket.AF_INET) as service:
            service.bind(('', 22))
            service.listen()
            done = self.call(code=0)
            self.assertIn('note: firewall-restricts', done.stdout)
            self.assertIn('Nothing wrong was found.', done.stdout)
            self.assertNotIn('Nothing is wrong.', done.stdout)
            self.lab.run('ip', 'route', 'del', POD4)
            done = self.call(code=1)
            self.assertLess(done.stdout.index('error: route-missing'),
                            done.stdout.index('note: firewall-restricts'))
        # Nothing of the node is reached.
        self.assertIn('error: firewall-drops', self.call(code=1).stdout)

    def unpacked(self, *args: str) -> dict[str, str]:
        """The parts of a bundle, by their names."""
        self.call('--bundle', '/run/bundle.tar.gz', *args)
        self.assertEqual(0o600, os.stat('/run/bundle.tar.gz').st_mode & 0o777)
        with tarfile.open('/run/bundle.tar.gz') as archive:
            found = {}
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.partition('/')[2]] = file.read().decode()
        os.unlink('/run/bundle.tar.gz')
        return found

    def test_bundle(self) -> None:
        with open('/run/kuryr-break0/identity') as file:
            secret = json.load(file)['secret']
        path = self.lab.add_pod('named', '100.75.30.79',
                                mac='02:00:00:00:00:79')
        self.manager().bind(
            OWNER_79, base.addresses('100.75.30.79'), parent='eth0',
            mac='02:00:00:00:00:79', netns=path,
            pod='default/secret-project')
        # Names as they are in names of files, of hosts and in sentences.
        with open('/run/kuryr-break0/secret-project_default.log',
                  'w') as file:
            file.write('Of secret-project.example.org, secret-project. '
                       'Of secret-projects.')
        parts = self.unpacked()
        self.assertIn('kuryr-kubernetes 10.', parts['versions.txt'])
        self.assertIn('secret-project', parts['status.json'])
        self.assertIn('device = break0', parts['options.txt'])
        self.assertTrue(json.loads(parts['status.json'])['in_sync'])
        self.assertEqual([], json.loads(parts['doctor.json'])['findings'])
        self.assertIn(POD4, parts['state/addresses/%s.json' % POD4])
        for command, text in (('ip_-d_link', 'macvlan mode bridge'),
                              ('ip_route_show_table_all', POD4),
                              ('nft_list_ruleset', 'pairs4')):
            self.assertIn(text, parts['commands/%s.txt' % command])
        self.assertNotIn(secret, str(parts))
        redacted = self.unpacked('--redact')
        for text in (POD4, POD6, MACS['pod'], secret, '100.75.30.51',
                     'secret-project', 'sandbox-79'):
            self.assertNotIn(text, str(redacted).replace(
                'secret-projects', ''))
        name, = {each for each in redacted
                 if each.startswith('state/<name-')}
        alias = re.escape(name[len('state/'):name.index('>') + 1])
        self.assertRegex(redacted[name], r'\AOf %s\.example\.org, %s\. '
                         r'Of secret-projects\.\Z' % (alias, alias))
        self.assertNotIn(' %s ' % socket.gethostname(),
                         redacted['versions.txt'])
        # Times are not taken for addresses, nor words for names.
        self.assertIn('\ndefault via <address-', redacted[
            'commands/ip_route_show_table_all.txt'])
        self.assertRegex(redacted['commands/ps_-eo_pid,lstart,args.txt'],
                         r' \d\d:\d\d:\d\d 20')
        # The same is the same, throughout.
        name = re.search(r'<address-\w+>(?=.* dev break0)', redacted[
            'commands/ip_route_show_table_all.txt'])
        assert name
        self.assertIn(name[0], redacted['status.json'])

    def test_redacted_names_and_texts(self) -> None:
        path = self.lab.add_pod('acme-web', '100.75.30.79',
                                mac='02:00:00:00:00:79')
        subprocess.run([b'ip', b'link', b'add', b'acme-lan0', b'type', b'veth',
                        b'peer', b'name', b'acme\xff+'], check=True)
        self.lab.run('ip', 'link', 'set', 'acme-lan0', 'alias',
                     'uplink of ACME')
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'eth0', 'altname',
                     'enx0200acme', 'altname', 'enx020000000077')
        self.lab.run('ip', 'link', 'add', 'br0', 'address',
                     '02:00:0a:00:00:79', 'type', 'bridge')
        self.lab.run('nft', 'add table ip t; add chain ip t c; add rule ip t '
                     'c accept comment "door of ACME"')
        self.lab.run('iptables-nft', '-A', 'INPUT', '-m', 'comment',
                     '--comment', 'ACME', '-j', 'ACCEPT')
        self.manager().bind(
            OWNER_79, base.addresses('100.75.30.79'), parent='eth0',
            mac='02:00:00:00:00:79', netns=path, network='acme-net')
        # Addresses as programs write them: without leading zeros, as one
        # number, in a name.
        forms = '2:0:a:0:0:79', '020000000077'
        plain = str(self.unpacked())
        for text in ('acme-web', 'acme-lan0', 'uplink of ACME', 'acme-net',
                     'door of ACME', 'comment ACME', *forms):
            self.assertIn(text, plain)
        redacted = self.unpacked('--redact')
        # The last where the guard answers solicitations.
        for text in ('acme', *forms,
                     '0x%x' % int(ipaddress.ip_address(lab.NODE6))):
            self.assertNotIn(text, str(redacted).lower())
        links = redacted['commands/ip_-d_link.txt']
        self.assertRegex(links, r'alias <text-\w+>')
        for text in ('eth0', 'break0', 'kuryr-break0 ledger'):
            self.assertIn(text, links)

    def test_nothing_is_redacted_without_a_bundle(self) -> None:
        done = self.call('--redact', code=2)
        self.assertEqual('', done.stdout)
        self.assertIn('give --bundle too', done.stderr)

    def test_bundle_that_cannot_be_written(self) -> None:
        with open('/run/there', 'w') as file:
            file.write('mine')
        for path, text in (('/run/there', 'there: File exists. Name'),
                           ('/run/none/x', 'x: No such file')):
            self.assertIn(text, self.call('--bundle', path, code=2).stderr)
        with open('/run/there') as file:
            self.assertEqual('mine', file.read())

    def test_bundle_is_bounded(self) -> None:
        for number in range(20):
            with open('/run/kuryr-break0/big-%d' % number, 'w') as file:
                file.write('x' * 2 ** 20)
        parts = self.unpacked()
        self.assertLessEqual(sum(map(len, parts.values())), 10 * 2 ** 20)

    def test_what_was_not_examined(self) -> None:
        found = examination.examine(self.conf())
        self.assertEqual([], found.findings)
        self.assertEqual([], found.not_examined)
        with mock.patch.object(kernel, 'find_program', return_value=None):
            found = examination.examine(self.conf())
        self.assertEqual(2, len([each for each in found.not_examined
                                 if each.startswith('the rules of ')]))
        text = report.as_text([], found.not_examined)
        self.assertIn('Not examined: the rules of nftables', text)
        self.assertIn('Nothing wrong was found.', text)
        self.assertIn('Nothing is wrong.', report.as_text([]))

    @staticmethod
    def conf() -> cfg.ConfigOpts:
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        return conf

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
                found = self.findings()
                # Its macvlan stays, and is bound half of the time.
                found.pop('container-not-discovered', None)
                self.assertEqual({}, found)
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
        self.assertEqual({'addresses': 254, 'looked_up': 254, 'pods': 252,
                          'entered': 2, 'pinged': 4, 'answered': 4},
                         done['looked_at'])
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        finding = self.findings()['route-missing']
        self.assertEqual(252, len(finding['subjects']))
        self.assertIn('and 244 more.', ' '.join(
            self.call(code=1).stdout.split()))
