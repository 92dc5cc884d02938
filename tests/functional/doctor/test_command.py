# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import ipaddress
import json
import os
import platform
import re
import socket
import subprocess
import tarfile
import time
from typing import Optional
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
from tests.support import lab


class TestCommand(DoctorTestCase):

    def test_for_people(self) -> None:
        self.lab.run('ip', 'route', 'del', POD4)
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        done = self.call(code=1)
        self.assertEqual('', done.stderr)
        self.assertIn('error: route-missing\n  seen  its route is missing: '
                      'no route through break0 in table 254.', done.stdout)
        self.assertIn('\n          kuryr-break0 sync\n', done.stdout)
        self.assertIn('Errors: 1, warnings: 1. Examined: the namespaces of '
                      '2 of 2 pods', done.stdout)
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 80)

    def test_a_state_directory_that_cannot_be_read(self) -> None:
        os.makedirs('/run/state/addresses')
        os.chmod('/run/state', 0o700)
        os.symlink('lock', '/run/state/lock')
        done = self.call(code=3, OS_BREAK0__STATE_DIR='/run/state')
        self.assertIn('/run/state', done.stderr)

    def test_severity_and_ignored_findings(self) -> None:
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
        # If no service of the node is reachable, the policy is an error.
        self.assertIn('error: firewall-drops', self.call(code=1).stdout)

    def unpacked(self, *args: str, code: Optional[int] = 0,
                 **environ: str) -> dict[str, str]:
        """Create a bundle, and return its files' texts by name."""
        self.call('--bundle', '/run/bundle.tar.gz', *args, code=code,
                  **environ)
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
        # The pod's name in a file name, in a host name and in sentences.
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
            self.assertNotIn(text, str(redacted))
        name, = {each for each in redacted
                 if each.startswith('state/<name-')}
        alias = re.escape(name[len('state/'):name.index('>') + 1])
        self.assertRegex(redacted[name], r'\AOf %s\.example\.org, %s\. '
                         r'Of <name-\w+>\.\Z' % (alias, alias))
        self.assertNotIn(' %s ' % socket.gethostname(),
                         redacted['versions.txt'])
        # Redaction mistakes no time for an address, and no word for a name.
        self.assertIn('\ndefault via <address-', redacted[
            'commands/ip_route_show_table_all.txt'])
        self.assertRegex(redacted['commands/ps_-eo_pid,lstart,args.txt'],
                         r' \d\d:\d\d:\d\d 20')
        # A redacted address has one placeholder in all files.
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
        # Some programs print a MAC address without leading zeros, others
        # without separators.
        forms = '2:0:a:0:0:79', '020000000077'
        plain = str(self.unpacked())
        for text in ('acme-web', 'acme-lan0', 'uplink of ACME', 'acme-net',
                     'door of ACME', 'comment ACME', *forms):
            self.assertIn(text, plain)
        redacted = self.unpacked('--redact')
        # The guard's answers to solicitations contain the node's IPv6 address
        # as one number.
        for text in ('acme', *forms,
                     '0x%x' % int(ipaddress.ip_address(lab.NODE6))):
            self.assertNotIn(text, str(redacted).lower())
        links = redacted['commands/ip_-d_link.txt']
        self.assertRegex(links, r'alias <text-\w+>')
        for text in ('eth0', 'break0', 'kuryr-break0 ledger'):
            self.assertIn(text, links)

    def make_rules(self) -> None:
        """Load firewall rules with a customer's name in every object."""
        self.lab.run('nft', """
            table inet zanzibar-table {
              comment "zanzibar table"
              counter zanzibar_counter { }
              quota zanzibar_quota { over 10 mbytes }
              set zanzibar_set {
                type ifname; comment "zanzibar set"
                elements = { "zanzibar1" comment "zanzibar element" }
              }
              map zanzibar_map { type mark : verdict; }
              chain zanzibar-chain {
                type filter hook input priority 0;
                iifname "zanzibar*" counter name zanzibar_counter
                oifname @zanzibar_set quota name zanzibar_quota
                meta mark 1 jump zanzibar-other
                meta mark vmap @zanzibar_map
                log prefix "ZANZIBAR drop: " counter drop comment "Zanzibar"
                log prefix "node of pod: " accept comment "allow the node"
                @nh,96,32 0x644b1e33 accept
              }
              chain zanzibar-other { }
            }""")
        for rule in (
                '-N ZANZIBAR', '-A INPUT -j ZANZIBAR',
                '-A FORWARD -i zanz+ -o zanzibar0 -j ACCEPT',
                '-A INPUT -m comment --comment zanzibar -j ACCEPT',
                '-A INPUT -m comment --comment "a \\"zanzibar\\" zanzi"',
                '-A INPUT -m comment --comment "allow the node"',
                '-A INPUT -j LOG --log-prefix "zanzibar: "',
                '-A INPUT -j LOG --log-prefix zanzibar',
                '-A INPUT -j NFLOG --nflog-prefix "zanzibar: "',
                '-A INPUT -m recent --set --name zanzibar',
                '-A INPUT -m string --string zanzibar --algo bm',
                '-A INPUT -m hashlimit --hashlimit-above 5/sec '
                '--hashlimit-name zanzibar'):
            # Not every kernel has all of these extensions.
            for program in 'iptables-nft', 'ip6tables-nft':
                self.lab.run('sh', '-c', '%s %s' % (program, rule),
                             check=False)

    def make_log(self, program: str, *lines: str) -> None:
        """Install a program that prints lines."""
        os.makedirs('/run/bin', exist_ok=True)
        with open('/run/bin/' + program, 'w') as file:
            file.write('#!/bin/sh\ncat <<EOF\n%s\nEOF\n' % '\n'.join(lines))
        os.chmod('/run/bin/' + program, 0o755)

    def test_redacted_names_of_any_source(self) -> None:
        """No redacted file has a name, whether break0 knows it or not."""
        self.make_rules()
        for name in 'zanzibar.7', 'zanzibar_8':
            self.lab.run('ip', 'link', 'add', name, 'type', 'bridge')
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'eth0', 'altname',
                     'zanzibar-alt')
        self.lab.run('ip', 'link', 'set', 'eth0', 'alias', 'pod of node')
        self.lab.run('ip', 'rule', 'add', 'iif', 'zanzibar3', 'lookup', '7')
        self.lab.add_netns('zanzibar')
        self.lab.add_macvlan('zanzibar', 'zanzibar4')
        self.lab.run('ip', 'address', 'add', '100.75.30.80/24', 'dev',
                     'zanzibar4', netns='zanzibar')
        state = '/run/zanzibar-state'
        os.rename('/run/kuryr-break0', state)
        for name, text in (
                ('addresses/100.75.30.90.json', '{"pod": "zanzibar/teashop"'),
                ('quarantine/zanzibar.json', 'zanzibar'),
                ('notes', 'von Zanzib\u00e4r f\u00fcr zanzibar_x')):
            os.makedirs(os.path.dirname('%s/%s' % (state, name)),
                        exist_ok=True)
            with open('%s/%s' % (state, name), 'w') as file:
                file.write(text)
        self.make_log(
            'dmesg', '[    1.000000] ZANZIBAR drop: IN=zanzibar1 OUT= '
            'MAC=02:00:00:00:00:79 SRC=10.0.0.7 DST=10.0.0.8 LEN=40',
            '[    2.000000] node of pod: IN= OUT=eth0 SRC=10.0.0.7 LEN=40',
            '[    3.000000] zanzibar1: renamed from veth7',
            '[    4.000000] oom-kill:task=zanzibar,pid=7,uid=0',
            '[    5.000000] eth0: entered promiscuous mode')
        self.make_log(
            'journalctl', 'Dec 01 10:00:00 kuryr-break0[1]: INFO Set the '
            'route of 10.0.0.7 on break0 for zanzibar/teashop-5d4f8',
            'Dec 01 10:00:01 kuryr-daemon[2]: DEBUG KuryrPort '
            "{'metadata': {'name': 'teashop-zanzibar', 'labels': "
            "{'app.zanzibar.com/a': 'b', 'zanzibar': 'true'}}}",
            'Dec 01 10:00:02 systemd[1]: Started zanzibar.service.')
        with subprocess.Popen(['sh', '-c', 'read line', '--tenant=zanzibar',
                               '/srv/zanzibar/x'], stdin=subprocess.PIPE):
            path = '/run/bin:' + os.environ['PATH']
            options = {'PATH': path, 'OS_BREAK0__STATE_DIR': state}
            plain = str(self.unpacked(code=None, **options)).lower()
            redacted = self.unpacked('--redact', code=None, **options)
        for text in ('zanzibar drop: ', 'zanzibar-chain', 'zanzibar_set',
                     'zanzibar.7', 'zanzibar/7', 'zanzibar_8', 'zanzibar-alt',
                     'zanzibar3', 'zanzibar4', 'zanzibar-state', 'von zanz',
                     'comment zanzibar', '--name zanzibar', 'zanz+',
                     '--string "zanzibar', 'log-prefix "zanzibar',
                     'log-prefix zanzibar', 'nflog-prefix',
                     'quarantine/zanzibar',
                     '--tenant=zanzibar', 'teashop-5d4f8', 'task=zanzibar',
                     'zanzibar.service', 'app.zanzibar.com'):
            self.assertIn(text, plain)
        for name, text in redacted.items():
            for secret in ('zanz', 'teashop', '5d4f8', '0x644b1e33',
                           'allow the node', 'node of pod', 'pod of node'):
                self.assertNotIn(secret, (name + text).lower(), name)
        # All other text is unchanged.
        for name, text in (
                ('nft_list', 'hook input priority filter'),
                ('dmesg', 'eth0: entered promiscuous mode'),
                ('ip_rule', '\n0:\tfrom all lookup local'),
                ('iptables-save', ' -m string --string "<name-'),
                ('sysctl', '\nnet.ipv4.conf.eth0.rp_filter = '),
                ('journalctl', 'INFO Set the route of <address-')):
            part, *_ = (text for part, text in redacted.items()
                        if part.startswith('commands/' + name))
            self.assertIn(text, part)

    def test_a_redacted_bundle_can_be_read(self) -> None:
        """Redaction replaces only names, and no other words of the output."""
        # The real ps lists other processes of the machine.
        self.make_log('ps', '')
        self.make_log('dmesg', '')
        redacted = self.unpacked('--redact', PATH='/run/bin:'
                                 + os.environ['PATH'])
        plain = self.unpacked(PATH='/run/bin:' + os.environ['PATH'])
        names = {'lan', 'pod', 'other', 'nic', socket.gethostname(),
                 'sandbox-1', 'sandbox-2', platform.release()}
        for name in plain.keys() & redacted.keys():
            if not name.startswith('state/'):
                words = (re.split(r'[\s/]', each[name])
                         for each in (plain, redacted))
                replaced = {before.strip('",') for before, after in zip(*words)
                            if '<name-' in after}
                self.assertEqual(set(), replaced - names, name)

    def test_nothing_is_redacted_without_a_bundle(self) -> None:
        done = self.call('--redact', code=2)
        self.assertEqual('', done.stdout)
        self.assertIn('Give --bundle too', done.stderr)

    def test_bundle_that_cannot_be_written(self) -> None:
        with open('/run/there', 'w') as file:
            file.write('mine')
        for path, text in (('/run/there', 'there: File exists. Give a path'),
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

    def test_the_report_names_unexamined_rules(self) -> None:
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

    def test_starting_and_ending_pods_are_no_faults(self) -> None:
        """Pods that start or end during an examination are no faults."""
        stop = '/run/stop'
        path = self.lab.add_pod('coming', '100.75.30.79',
                                mac=MACS['far'])

        def come_and_go() -> None:
            while not os.path.exists(stop):
                self.bind('100.75.30.79', owner=OWNER_79, netns=path,
                          mac_of_pod=MACS['far'], subnets=SUBNETS)
                time.sleep(0.05)  # real pods live longer
                self.unbind('100.75.30.79', owner=OWNER_79)
                time.sleep(0.05)

        pid = base.in_child(come_and_go)
        try:
            for _ in range(30):
                found = self.findings()
                # The pod's macvlan always exists, and is bound half of the
                # time.
                found.pop('container-not-discovered', None)
                self.assertEqual({}, found)
        finally:
            with open(stop, 'w'):
                pass
            self.assertEqual(0, base.wait_for(pid))

    def test_many_pods(self) -> None:
        """With many pods, checks with a request per pod examine a sample."""
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
