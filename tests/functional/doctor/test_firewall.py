# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import os

from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.support import firewalls
from tests.support import lab
from tests.support import program


class TestFirewall(DoctorTestCase):

    def nft(self, text: str) -> None:
        self.lab.run('nft', text)

    def test_accepting(self) -> None:
        self.nft('''
            table inet filter {
              set nodes { type ipv4_addr; flags interval;
                          elements = { 100.75.30.0/24 } }
              chain input {
                type filter hook input priority 0; policy drop;
                ct state vmap { established : accept, related : accept,
                                invalid : drop }
                iifname "lo" accept
                iifname "eth0" tcp dport 22 accept
                iifname { "break0", "tun0" } jump pods
              }
              chain pods {
                ip saddr 10.0.0.0/8 drop
                tcp dport 25 reject
                accept
              }
              chain output {
                type filter hook output priority 0; policy accept;
                oifname "eth0" drop
              }
              chain forward {
                type filter hook forward priority 0; policy drop;
                meta mark 0x4000 accept
              }
            }''')
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertTrue(self.lab.ping(POD4))

    def assert_drops(self, text: str) -> None:
        """Assert that the doctor finds the rule, and its commands fix it."""
        finding = self.findings()['firewall-drops']
        self.assertEqual('error', finding['severity'])
        self.assertIn(text, finding['seen'])
        self.assertNotIn('FORWARD', str(finding))
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_a_rule_for_break0(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname "break0" counter drop; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.assert_drops('on the node the table inet filter, chain in, '
                          'drops the packet: iifname "break0" drop')
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_the_result_of_pings_comes_first(self) -> None:
        """The report begins with the pings and the rule that drops them."""
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname "break0" drop; }; }')
        done = self.call(code=1)
        self.assertTrue(done.stdout.startswith(
            'Pings, both ways: 0 of 4 addresses answered.\n\nerror: '
            'firewall-drops'), done.stdout)
        self.assertIn('warning: break0-mtu', done.stdout)

    def test_a_rule_for_pods(self) -> None:
        self.nft('table ip filter { chain out { type filter hook output '
                 'priority 0; ip daddr 100.75.30.64-100.75.30.95 reject; }; '
                 '}')
        self.assertFalse(self.lab.ping(POD4))
        self.assert_drops('the table ip filter, chain out, drops the packet')
        self.assertTrue(self.lab.ping(POD4))

    def test_policy(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; iifname "lo" accept; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.assert_drops('the policy of the table inet filter, chain in, '
                          'drops the packet')
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_only_pings_and_some_ports(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; tcp dport { 22, 10250 } accept; meta l4proto { '
                 'icmp, icmpv6 } accept; }; }')
        self.follow(self.assert_found('firewall-restricts', 'policy',
                                      severity='note'))
        self.assertEqual({}, self.findings())

    def test_a_pod_that_drops_all_but_pings(self) -> None:
        self.lab.run('nft', 'table inet t { chain c { type filter hook input '
                     'priority 0; meta l4proto tcp drop; }; }', netns='pod')
        finding = self.assert_found(
            'firewall-restricts', 'in the pod the table inet t, chain c, '
            'drops the packet', severity='note')
        self.assertEqual([], finding['commands'])

    def test_an_unchanged_source_address(self) -> None:
        self.nft('table ip ours { chain out { type nat hook postrouting '
                 'priority 100; ip daddr 100.75.30.0/24 snat to '
                 '100.75.30.51; }; }')
        self.assertEqual({}, self.findings())

    def test_masquerade_to_an_address_without_a_way_back(self) -> None:
        """Answers to a source address of another interface get lost."""
        self.lab.run('ip', 'link', 'add', 'docker0', 'type', 'bridge')
        self.lab.run('ip', 'address', 'add', '172.17.0.1/16', 'dev',
                     'docker0')
        self.lab.run('ip', 'link', 'set', 'docker0', 'up')
        self.nft('table ip ours { chain out { type nat hook postrouting '
                 'priority 100; oifname != "lo" snat to 172.17.0.1; }; }')
        self.assertFalse(self.lab.ping(POD4))
        finding = self.assert_found(
            'source-rewritten', 'has: oifname != "lo" snat to 172.17.0.1. The '
            'pod has no route to that', POD4, OTHER4, severity='error')
        self.follow(finding)
        self.assertTrue(self.lab.ping(POD4))
        self.assertEqual({}, self.findings())

    def test_masquerade_that_pods_answer(self) -> None:
        for flavour in ('nft', 'legacy'):
            with self.subTest(flavour):
                self.lab.run('ip', 'address', 'replace', '100.75.30.9/32',
                             'dev', lab.PARENT)
                self.lab.run('iptables-' + flavour, '-t', 'nat', '-A',
                             'POSTROUTING', '-d', '100.75.30.0/24', '-j',
                             'SNAT', '--to-source', '100.75.30.9')
                self.manager().sync()  # also sets the address in the pods
                finding = self.assert_found(
                    'source-rewritten', 'sees the node as 100.75.30.9, not '
                    'as 100.75.30.51', severity='warning')
                self.assertIn('POSTROUTING -o break0 -j ACCEPT',
                              finding['commands'][0])
                self.follow(finding)
                self.assertEqual({}, self.findings())
                self.lab.run('iptables-' + flavour, '-t', 'nat', '-F')

    def test_a_healthy_host_of_docker(self) -> None:
        """Rules of Docker and kube-proxy's masquerading are no findings."""
        self.sysctl('ipv4.ip_forward', 1)
        self.lab.run('iptables', '-P', 'FORWARD', 'DROP')
        self.lab.run('ip', 'link', 'add', 'docker0', 'type', 'bridge')
        self.lab.run('ip', 'address', 'add', '172.17.0.1/16', 'dev',
                     'docker0')
        self.lab.run('ip', 'link', 'set', 'docker0', 'up')
        self.lab.run('iptables', '-N', 'DOCKER')
        for rule in (('FORWARD', '-o', 'docker0', '-m', 'conntrack',
                      '--ctstate', 'RELATED,ESTABLISHED', '-j', 'ACCEPT'),
                     ('FORWARD', '-o', 'docker0', '-j', 'DOCKER'),
                     ('FORWARD', '-i', 'docker0', '-j', 'ACCEPT')):
            self.lab.run('iptables', '-A', *rule)
        self.lab.run('iptables', '-t', 'nat', '-N', 'KUBE')
        for rule in (('POSTROUTING', '-s', '172.17.0.0/16', '!', '-o',
                      'docker0', '-j', 'MASQUERADE'),
                     ('POSTROUTING', '-j', 'KUBE'),
                     ('KUBE', '-m', 'mark', '!', '--mark', '0x4000/0x4000',
                      '-j', 'RETURN'),
                     ('KUBE', '-j', 'MARK', '--set-xmark', '0x4000/0x0'),
                     ('KUBE', '-j', 'MASQUERADE', '--random-fully')):
            self.lab.run('iptables', '-t', 'nat', '-A', *rule)
        self.nft('table ip kube-proxy { chain masquerading { meta mark & '
                 '0x4000 == 0 return; meta mark set meta mark ^ 0x4000; '
                 'masquerade fully-random; }; chain nat-postrouting { type '
                 'nat hook postrouting priority 100; jump masquerading; }; }')
        self.assertEqual({}, self.findings())
        self.assertIn('4 of 4 addresses answered', self.call().stdout)
        # The doctor also finds a firewall in the pod.
        self.lab.run('nft', 'table inet t { chain c { type filter hook input '
                     'priority 0; policy drop; }; }', netns='pod')
        self.assert_found('packet-dropped', 'in the pod', POD4, POD6,
                          severity='error')

    def test_ufw(self) -> None:
        """ufw's default rules pass pings, and drop services until allowed."""
        firewalls.set_up_ufw()
        self.lab.run('ufw', '--force', 'enable')
        finding = self.assert_found(
            'firewall-restricts', 'the policy of the table ip filter, chain '
            'INPUT, drops the packet', severity='note')
        self.assertEqual(['ufw allow in on break0'], finding['commands'])
        self.assertIn('Nothing wrong was found.', self.call(code=0).stdout)
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_firewalld(self) -> None:
        firewalls.start_firewalld(self)
        finding = self.assert_found(
            'firewall-restricts', 'the table inet firewalld, chain '
            'filter_IN_public, drops the packet', severity='note')
        self.assertIn('Nothing wrong was found.', self.call(code=0).stdout)
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_forwarded_packets_keep_their_source(self) -> None:
        """The doctor finds packets that are forwarded without masquerading.

        The VPN's masquerading rule names the NIC, not break0. The pod answers
        the VPN client through its gateway, which has no route to the client.
        """
        vpn = self.lab.add_netns('vpn')
        self.lab.run('ip', 'link', 'add', 'tun0', 'type', 'veth', 'peer',
                     'name', 'tun0', 'netns', os.path.basename(vpn))
        for address, netns in (('10.8.0.1/24', None), ('10.8.0.2/24', 'vpn')):
            self.lab.run('ip', 'address', 'add', address, 'dev', 'tun0',
                         netns=netns)
            self.lab.run('ip', 'link', 'set', 'tun0', 'up', netns=netns)
        self.lab.run('ip', 'route', 'add', 'default', 'via', '10.8.0.1',
                     netns='vpn')
        legacy, native = ('-t', 'nat', '-A', 'POSTROUTING', '-s',
                          '10.8.0.0/24', '-o', lab.PARENT, '-j',
                          'MASQUERADE'), (
            'table ip vpn { chain out { type nat hook postrouting priority '
            '100; ip saddr 10.8.0.0/24 oifname "eth0" counter masquerade; }; '
            '}')
        for command, *rule in (('nft', native), ('iptables-nft', *legacy),
                               ('iptables-legacy', *legacy)):
            with self.subTest(command):
                self.sysctl('ipv4.ip_forward', 0)
                self.lab.run(command, *rule)
                self.assertEqual({}, self.findings())
                self.sysctl('ipv4.ip_forward', 1)
                self.assertFalse(self.lab.ping(POD4, 'vpn'))
                finding = self.assert_found('source-kept', '10.8.0.0/24',
                                            severity='note')
                self.follow(finding)
                self.assertTrue(self.lab.ping(POD4, 'vpn'))
                self.assertEqual({}, self.findings())
                if command == 'nft':
                    self.nft('delete table ip vpn')
                else:
                    self.lab.run(command, '-t', 'nat', '-F')

    def test_other_interfaces(self) -> None:
        self.nft('table netdev t { chain c { type filter hook ingress device '
                 '"eth0" priority 0; policy accept; ip saddr 10.0.0.0/8 '
                 'drop; }; }')
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname != "break0" drop; iif "eth0" drop; '
                 'tcp dport 25 drop; meta mark 7 drop; }; }')
        self.assertEqual({}, self.findings())

    def test_before_and_after_routing(self) -> None:
        for hook, match in (('prerouting', 'iifname'),
                            ('postrouting', 'oifname')):
            with self.subTest(hook):
                self.nft('table inet raw { chain c { type filter hook %s '
                         'priority -300; %s "break0" drop; }; }' % (hook,
                                                                    match))
                self.assert_drops('inet raw')
                self.nft('delete table inet raw')

    def test_iptables(self) -> None:
        for command, ping in (('iptables', lab.NODE), ('ip6tables',
                                                       lab.NODE6)):
            for flavour in ('nft', 'legacy'):
                with self.subTest(command=command, flavour=flavour):
                    self.lab.run('%s-%s' % (command, flavour), '-A', 'INPUT',
                                 '-i', 'break+', '-m', 'comment',
                                 '--comment', 'a -j ACCEPT', '-j', 'REJECT')
                    self.assertFalse(self.lab.ping(ping, 'pod'))
                    finding = self.findings()['firewall-drops']
                    self.assertEqual(
                        ['%s -t filter -I INPUT -i break0 -j ACCEPT' % (
                            command + ('-legacy' if flavour == 'legacy'
                                       else ''))], finding['commands'])
                    self.follow(finding)
                    self.assertTrue(self.lab.ping(ping, 'pod'))
                    self.assertEqual({}, self.findings())

    def test_a_policy_of_iptables_legacy(self) -> None:
        self.lab.run('iptables-legacy', '-P', 'INPUT', 'DROP')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.assert_drops('the table filter of iptables-legacy, chain INPUT, '
                          'has: policy -j DROP')

    def test_a_trace_names_a_rule_of_iptables_legacy(self) -> None:
        self.lab.run('iptables-legacy', '-A', 'OUTPUT', '-d', POD4, '-j',
                     'DROP')
        done = self.lab.run(program.BREAK0, 'probe', POD4, '--trace',
                            check=False)
        self.assertIn('on the node the table filter of iptables-legacy, chain '
                      'OUTPUT, has: -A OUTPUT -d %s/32 -j DROP' % POD4,
                      ' '.join(done.stdout.split()))

    def hide(self, name: str) -> None:
        """Hide a program of the machine until the test ends."""
        for directory in ('/usr/sbin', '/sbin', '/usr/bin', '/bin'):
            path = os.path.join(directory, name)
            if os.path.exists(path) and os.access(path, os.X_OK):
                self.lab.run('mount', '--bind', '/dev/null', path)
                self.addCleanup(self.lab.run, 'umount', path)

    def test_iptables_where_there_is_no_nft(self) -> None:
        self.hide('nft')
        self.lab.run('iptables', '-P', 'OUTPUT', 'DROP')
        self.lab.run('iptables', '-A', 'OUTPUT', '-m', 'conntrack',
                     '--ctstate', 'RELATED,ESTABLISHED', '-j', 'ACCEPT')
        self.lab.run('iptables', '-A', 'OUTPUT', '!', '-o', 'break0', '-j',
                     'ACCEPT')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.findings()['firewall-drops'])
        self.assertTrue(self.lab.ping(POD4))

    def test_where_there_is_neither(self) -> None:
        self.lab.run('iptables', '-P', 'OUTPUT', 'DROP')
        for name in ('nft', 'iptables-save', 'ip6tables-save'):
            self.hide(name)
        self.assertEqual({}, self.findings(probe=False))
        self.assertEqual(['probe-unanswered'], list(self.findings()))
