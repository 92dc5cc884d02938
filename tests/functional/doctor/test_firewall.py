# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import logging
import os

from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import POD4
from tests import lab


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
        found = self.findings()
        # What is said of SMTP is said of break0 by name.
        self.assertEqual(['firewall-restricts'], list(found))
        self.assertIn('tcp dport 25', found['firewall-restricts']['seen'])
        self.nft('delete rule inet filter pods handle %d' % self.handle(
            'pods', 'reject'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertTrue(self.lab.ping(POD4))

    def handle(self, chain: str, statement: str) -> int:
        rules = json.loads(self.lab.run(
            'nft', '--json', 'list', 'chain', 'inet', 'filter',
            chain).stdout)['nftables']
        return int(next(each['rule']['handle'] for each in rules
                        if 'rule' in each and any(
                            statement in one for one in each['rule']['expr'])))

    def test_a_rule_for_break0(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname "break0" counter drop; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.follow(self.assert_found(
            'firewall-drops', 'iifname break0 drop', 'inet filter in',
            severity='error'))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertEqual({}, self.findings())

    def test_a_rule_for_pods(self) -> None:
        self.nft('table ip filter { chain out { type filter hook output '
                 'priority 0; ip daddr 100.75.30.64-100.75.30.95 reject; }; '
                 '}')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found('firewall-drops', 'reject',
                                      'ip filter out'))
        self.assertTrue(self.lab.ping(POD4))

    def test_policy(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; iifname "lo" accept; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.follow(self.assert_found('firewall-drops', 'policy drop',
                                      'inet filter in'))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_only_some_ports(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; tcp dport { 22, 10250 } accept; ip6 nexthdr icmpv6 '
                 'accept; }; }')
        self.assert_found('firewall-restricts', 'policy drop',
                          'inet filter in', severity='note')

    def test_a_zone(self) -> None:
        """As firewalld does it."""
        self.nft('''
            table inet firewalld {
              chain public { tcp dport 22 accept; }
              chain zones {
                iifname "eth1" goto public
                goto public
              }
              chain filter_INPUT {
                type filter hook input priority 10; policy accept;
                ct state { established, related } accept
                iifname "lo" accept
                jump zones
                reject with icmpx admin-prohibited
              }
            }''')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.assert_found('firewall-restricts', 'reject',
                          'inet firewalld filter_INPUT')

    def test_source_rewritten(self) -> None:
        catch_all = ('table ip ours { chain out { type nat hook postrouting '
                     'priority 100; ip daddr 100.75.30.0/24 masquerade; }; }')
        self.nft(catch_all)
        finding = self.assert_found('source-rewritten', 'masquerade',
                                    'ip ours out', severity='warning')
        self.follow(finding)
        self.assertEqual({}, self.findings())
        self.nft('delete table ip ours')
        self.nft(catch_all.replace('masquerade', 'snat to 203.0.113.9'))
        self.assert_found('source-rewritten', 'snat', 'ip ours out')

    def test_source_rewritten_by_iptables(self) -> None:
        self.lab.run('iptables', '-t', 'nat', '-A', 'POSTROUTING', '-j',
                     'MASQUERADE')
        self.follow(self.assert_found('source-rewritten', '',
                                      'ip nat POSTROUTING'))
        self.assertEqual({}, self.findings())

    def test_the_source_of_others_is_rewritten(self) -> None:
        """As by Docker, and by kube-proxy of what it has marked."""
        for rule in (('-s', '172.17.0.0/16', '!', '-o', 'docker0', '-j',
                      'MASQUERADE'),
                     ('-o', lab.PARENT, '-j', 'MASQUERADE'),
                     ('-j', 'KUBE')):
            self.lab.run('iptables', '-t', 'nat', '-N', 'KUBE', check=False)
            self.lab.run('iptables', '-t', 'nat', '-A', 'POSTROUTING', *rule)
        for rule in (('-m', 'mark', '!', '--mark', '0x4000/0x4000', '-j',
                      'RETURN'), ('-j', 'MARK', '--set-xmark', '0x4000/0x0'),
                     ('-j', 'MASQUERADE', '--random-fully')):
            self.lab.run('iptables', '-t', 'nat', '-A', 'KUBE', *rule)
        self.nft('table ip kube-proxy { chain masquerading { meta mark & '
                 '0x4000 == 0 return; meta mark set meta mark ^ 0x4000; '
                 'masquerade fully-random; }; chain nat-postrouting { type '
                 'nat hook postrouting priority 100; jump masquerading; }; }')
        self.assertEqual({}, self.findings())

    def test_before_and_after_routing(self) -> None:
        for hook, match in (('prerouting', 'iifname'),
                            ('postrouting', 'oifname')):
            with self.subTest(hook):
                self.nft('table inet raw { chain c { type filter hook %s '
                         'priority -300; %s "break0" drop; }; }' % (hook,
                                                                    match))
                self.follow(self.assert_found('firewall-drops', hook,
                                              'inet raw c'))
                self.assertEqual({}, self.findings())
                self.nft('delete table inet raw')

    def test_forwarding(self) -> None:
        self.nft('table ip filter { chain FORWARD { type filter hook forward '
                 'priority 0; policy drop; }; }')
        self.assertEqual({}, self.findings())
        self.sysctl('ipv4.ip_forward', 1)
        self.follow(self.assert_found('firewall-restricts', 'hook forward',
                                      'ip filter FORWARD'))
        self.assertEqual({}, self.findings())

    def test_other_interfaces(self) -> None:
        self.nft('table netdev t { chain c { type filter hook ingress device '
                 '"eth0" priority 0; policy accept; ip saddr 10.0.0.0/8 '
                 'drop; }; }')
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname != "break0" drop; iif "eth0" drop; '
                 'tcp dport 25 drop; meta mark 7 drop; }; }')
        self.assertEqual({}, self.findings())

    def test_rules_of_all_kinds(self) -> None:
        """They are all understood, or given the benefit of the doubt."""
        self.nft('\n'.join((
            'table inet filter {',
            '  set known { type ipv4_addr; flags dynamic, timeout; }',
            '  map services {',
            '    type ipv4_addr . inet_proto . inet_service : verdict',
            '    elements = { 10.0.0.1 . tcp . 443 : goto service } }',
            '  counter seen { packets 0 bytes 0; }',
            '  chain service { drop; }',
            '  chain in { type filter hook input priority 0; policy accept;',
            '    counter name seen',
            '    ip daddr . meta l4proto . th dport vmap @services',
            '    meta mark & 0x4000 == 0x4000 drop',
            '    fib daddr type broadcast drop',
            '    numgen random mod 2 vmap { 0 : jump service }',
            '    limit rate over 10/second drop',
            '    tcp flags & (fin|syn) == (fin|syn) drop',
            '    th dport 1-1024 ip protocol udp drop',
            '    ip6 saddr fe80::/10 drop',
            '    ip saddr != { 100.75.0.0/16, 10.1.0.1-10.1.0.9 } drop',
            '    icmpv6 type { echo-request, nd-neighbor-solicit } accept',
            '    ether saddr 02:00:00:00:00:99 drop',
            '    iifgroup 7 drop',
            '    meta l4proto { tcp, udp } th sport 53 drop',
            '    ct status dnat drop',
            '    ct mark 5 drop',
            '    ip saddr @known drop',
            '    rt type 0 drop',
            '    socket transparent 1 drop',
            '    jump service_of_nobody',
            '  }',
            '  chain service_of_nobody { log prefix "none"; return; }',
            '}')))
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            logging.getLogger('kuryr_break0').warning('a line')
            self.assertEqual({}, self.findings(probe=False))
        self.assertEqual(1, len(logs.output))
        self.nft('insert rule inet filter in iifname "break0" ct mark 5 drop')
        self.assertEqual(['firewall-restricts'], list(self.findings()))
        self.nft('add element inet filter known { %s timeout 1h }' % POD4)
        self.assertEqual(['firewall-drops'], list(self.findings()))

    def test_iptables(self) -> None:
        for program, ping in (('iptables', lab.NODE), ('ip6tables',
                                                       lab.NODE6)):
            for flavour in ('nft', 'legacy'):
                with self.subTest(program=program, flavour=flavour):
                    self.lab.run('%s-%s' % (program, flavour), '-A', 'INPUT',
                                 '-i', 'break+', '-m', 'comment',
                                 '--comment', 'a -j ACCEPT', '-j', 'REJECT')
                    self.assertFalse(self.lab.ping(ping, 'pod'))
                    finding = self.assert_found(
                        'firewall-drops', 'REJECT',
                        finding_chain(program, flavour))
                    self.lab.run('sh', '-c', finding['commands'][0].replace(
                        program, '%s-%s' % (program, flavour), 1))
                    self.assertTrue(self.lab.ping(ping, 'pod'))
                    self.assertEqual({}, self.findings())

    def hide(self, name: str) -> None:
        """Be on a node where there is no such program."""
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
        self.follow(self.assert_found('firewall-drops', 'policy drop',
                                      'iptables filter OUTPUT'))
        self.assertTrue(self.lab.ping(POD4))
        self.assertEqual({}, self.findings())

    def test_where_there_is_neither(self) -> None:
        self.lab.run('iptables', '-P', 'OUTPUT', 'DROP')
        for name in ('nft', 'iptables-save', 'ip6tables-save'):
            self.hide(name)
        self.assertEqual({}, self.findings(probe=False))
        self.assertEqual(['probe-unanswered'], list(self.findings()))


def finding_chain(program: str, flavour: str) -> str:
    if flavour == 'legacy':
        return program + ' filter INPUT'
    return ('ip' if program == 'iptables' else 'ip6') + ' filter INPUT'
