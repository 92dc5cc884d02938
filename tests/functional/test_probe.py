# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import socket
from typing import Any

from tests.functional.base import OTHER_OWNER
from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import lab
from tests.support import program

POD6 = 'fd00:30::71'
#: An address in another subnet than the node's.
FAR_POD = '100.75.40.71'


class TestProbe(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.netns = self.lab.add_pod('pod', POD, POD6)
        self.lab.settle()
        self.mac = self.mac_of('pod')

    def mac_of(self, pod: str) -> str:
        mac: str = self.lab.ip('link', 'show', lab.PARENT,
                               netns=pod)[0]['address']
        return mac

    def bind_pod(self) -> None:
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=self.mac)

    def probe(self, address: str, *args: str, code: int = 0) -> Any:
        done = self.call('probe', address, '--json', *args)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return json.loads(done.stdout)

    def test_both_ways_in_both_families(self) -> None:
        self.bind_pod()
        break0 = self.lab.link('break0') or {}
        for pod, node in ((POD, lab.NODE), (POD6, lab.NODE6)):
            found = self.probe(pod)
            self.assertTrue(found['reached'])
            self.assertEqual('sandbox-1/eth0', found['owner'])
            times = [each.pop('round_trip_ms') for each in found['probes']]
            self.assertEqual([3, 3], [len(each) for each in times])
            for time in sum(times, []):
                self.assertTrue(0 < time < 1000, time)
            self.assertEqual([
                {'direction': 'node to pod', 'to': pod, 'from': node,
                 'interface': 'break0', 'gateway': None,
                 'neighbour': {'mac': self.mac, 'state': 'permanent'},
                 'problem': None},
                {'direction': 'pod to node', 'to': node, 'from': pod,
                 'interface': lab.PARENT, 'gateway': None,
                 'neighbour': {'mac': break0['address'],
                               'state': 'permanent'},
                 'problem': None}], found['probes'])
            self.assertIsNone(found['note'])

    def test_a_table(self) -> None:
        self.bind_pod()
        done = self.call('probe', POD, '--count', '2')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        for text in ('node to pod', 'pod to node', 'break0', lab.NODE,
                     self.mac + ' permanent', '2 of 2', ' ms'):
            self.assertIn(text, done.stdout)
        self.assertRegex(done.stdout, r'\d\.\d{3} / \d+\.\d{3} / \d')

    def test_a_pod_that_is_not_bound(self) -> None:
        found = self.probe(POD, '--count', '1', code=1)
        probe, = found['probes']
        self.assertEqual('its route goes through %s, not break0' % lab.PARENT,
                         probe['problem'])
        self.assertEqual(lab.PARENT, probe['interface'])
        self.assertEqual([None], probe['round_trip_ms'])
        self.assertIn(probe['neighbour']['state'], ('incomplete', 'failed'))
        self.assertIn('no pod on this node has a record', found['note'])

    def test_a_route_of_others_that_is_used(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'route', 'replace', POD, 'via', lab.LAN)
        found = self.probe(POD, '--count', '1', code=1)
        self.assertEqual((lab.LAN, 'its route goes through %s, not break0'
                          % lab.PARENT),
                         (found['probes'][0]['gateway'],
                          found['probes'][0]['problem']))

    def test_a_wrong_neighbour(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'neighbour', 'replace', POD, 'dev', 'break0',
                     'lladdr', '02:00:00:00:00:99', 'nud', 'permanent')
        found = self.probe(POD, '--count', '1', code=1)
        self.assertEqual(
            'its neighbour has the MAC address 02:00:00:00:00:99, but must '
            'have ' + self.mac,
            found['probes'][0]['problem'])

    def test_a_pod_that_is_down(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down', netns='pod')
        found = self.probe(POD, '--count', '2', code=1)
        self.assertEqual(['2 of 2 were not answered',
                          'there is no route to it'],
                         [each['problem'] for each in found['probes']])

    def test_no_route_at_all(self) -> None:
        self.lab.run('ip', 'route', 'add', 'prohibit', POD)
        found = self.probe(POD, '--count', '1', code=1)
        self.assertEqual('there is no route to it',
                         found['probes'][0]['problem'])

    def test_without_its_namespace(self) -> None:
        self.bind(POD, mac_of_pod=self.mac)
        found = self.probe(POD)
        self.assertEqual(['node to pod'], [each['direction']
                                           for each in found['probes']])
        self.assertIn('is not recorded', found['note'])

    def test_a_namespace_that_is_gone(self) -> None:
        self.bind_pod()
        self.lab.del_netns('pod')
        lab.until(lambda: not self.lab.ping(POD))
        found = self.probe(POD, '--count', '1', code=1)
        self.assertEqual(1, len(found['probes']))
        self.assertIn('no pod on this node has a record', found['note'])

    def test_a_pod_in_another_subnet(self) -> None:
        self.lab.add_other_subnet()
        netns = self.lab.add_pod('far', FAR_POD, gateways=(lab.OTHER_LAN,))
        self.bind(FAR_POD, netns=netns, mac_of_pod=self.mac_of('far'))
        # Neither direction passes a gateway.
        self.assertEqual([None, None], [
            each['gateway'] for each in self.probe(FAR_POD)['probes']])

    def test_without_the_capability(self) -> None:
        done = self.lab.run('setpriv', '--bounding-set', '-net_raw',
                            program.BREAK0, 'probe', POD, check=False)
        self.assertEqual(3, done.returncode)
        self.assertIn('it needs CAP_NET_RAW', done.stdout)
        self.assertNotIn('Traceback', done.stdout)

    def test_usage(self) -> None:
        for args, text in ((('x',), 'no container or pod of that name'),
                           ((POD, '--count', '0'), 'from 1 to 1000')):
            done = self.call('probe', *args)
            self.assertEqual(2, done.returncode)
            self.assertIn(text, done.stderr)

    def test_all(self) -> None:
        self.bind_pod()
        self.lab.add_pod('other', '100.75.30.72')
        self.bind('100.75.30.72', netns='/run/netns/other',
                  owner=OTHER_OWNER, mac_of_pod=self.mac_of('other'))
        found = json.loads(self.call('probe', '--all', '--json', '--count',
                                     '1').stdout)
        self.assertEqual([POD, '100.75.30.72', POD6],
                         [each['address'] for each in found])
        self.assertEqual([True] * 3, [each['reached'] for each in found])
        text = self.call('probe', '--all', '--count', '1').stdout
        self.assertEqual(6, text.count('1 of 1'))
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='other')
        done = self.call('probe', '--all', '--count', '1')
        self.assertEqual(1, done.returncode)
        for args in ((), ('--all', POD)):
            done = self.call('probe', *args)
            self.assertEqual(2, done.returncode)
            self.assertIn('--all', done.stderr)

    def test_tcp(self) -> None:
        self.bind_pod()
        # A refused connection is an answer.
        self.assertTrue(self.probe(POD, '--tcp', '81')['reached'])
        with self.lab.socket(socket.AF_INET, netns='pod') as server:
            server.bind((POD, 80))
            server.listen()
            found = self.probe(POD, '--tcp', '80')
        self.assertTrue(found['reached'])
        self.lab.run('nft', 'add table inet t; add chain inet t c { type '
                     'filter hook input priority 0; }; add rule inet t c tcp '
                     'dport 80 drop', netns='pod')
        found = self.probe(POD, '--tcp', '80', '--count', '1', code=1)
        self.assertEqual(['node to pod'], [
            each['direction'] for each in found['probes']
            if each['problem']])
        self.assertTrue(self.probe(POD, '--tcp', '81')['reached'])

    def test_conflict(self) -> None:
        self.bind_pod()
        for address in (POD, POD6):
            self.assertEqual([], self.probe(address, '--conflict',
                                            '--count', '1')['claimants'])
        self.assertIn(POD + ': no other host has answered', self.call(
            'probe', POD, '--conflict', '--count', '1').stdout)
        self.lab.add_pod('thief', POD, POD6)
        for address in (POD, POD6):
            found = self.probe(address, '--conflict', '--count', '1', code=1)
            self.assertEqual([self.mac_of('thief')], found['claimants'])
        self.lab.run('ip', 'link', 'del', lab.PARENT, netns='thief')
        # A host of the LAN claims the address.
        self.lab.run('ip', 'address', 'add', POD + '/32', 'dev', 'nic',
                     netns='lan')
        found = self.probe(POD, '--conflict', '--count', '1', code=1)
        self.assertEqual([self.lab.ip('link', 'show', 'nic', netns='lan')[0][
            'address']], found['claimants'])
        self.assertIn(
            POD + ' is also used by the host with the MAC address ',
            ' '.join(self.call('probe', POD, '--conflict', '--count',
                               '1').stdout.split()))
        self.assertIsNone(self.probe(POD6)['claimants'])

    def traced(self, address: str, *args: str) -> str:
        done = self.call('probe', address, '--trace', '--count', '1', *args)
        self.assertEqual(1, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def test_trace(self) -> None:
        self.bind_pod()
        before = self.lab.run('nft', 'list', 'ruleset').stdout
        self.assertTrue(self.probe(POD, '--trace')['reached'])
        self.assertEqual(before, self.lab.run('nft', 'list',
                                              'ruleset').stdout)
        for netns, address, rules, text in (
                (None, POD, 'add table inet t; add chain inet t c { type '
                 'filter hook output priority 0; }; add rule inet t c ip '
                 'daddr %s drop' % POD,
                 'on the node the table inet t, chain c, drops the packet: '
                 'ip daddr %s drop' % POD),
                (None, POD6, 'add table ip6 t; add chain ip6 t c { type '
                 'filter hook input priority 0; policy drop; }',
                 'on the node the policy of the table ip6 t, chain c'),
                (None, POD, 'add table inet t; add chain inet t c { type '
                 'filter hook prerouting priority -300; }; add rule inet t c '
                 'iifname break0 meta mark set 7 reject',
                 'on the node the table inet t, chain c'),
                (None, POD, 'add table netdev t; add chain netdev t c { type '
                 'filter hook ingress device break0 priority 0; }; add rule '
                 'netdev t c ip saddr %s drop' % POD,
                 'on the node the table netdev t, chain c, drops the packet: '
                 'ip saddr'),
                ('pod', POD, 'add table inet t; add chain inet t c { type '
                 'filter hook input priority 0; policy drop; }',
                 'in the pod the policy of the table inet t, chain c'),
                ('pod', POD6, 'add table ip6 t; add chain ip6 t c { type '
                 'filter hook output priority 0; }; add rule ip6 t c ip6 '
                 'saddr %s drop' % POD6,
                 'in the pod the table ip6 t, chain c')):
            with self.subTest(rules):
                self.lab.run('nft', rules, netns=netns)
                shown = self.traced(address)
                family = 'netdev' if 'netdev' in rules else (
                    'ip6' if 'ip6 t' in rules else 'inet')
                self.lab.run('nft', 'delete', 'table', family, 't',
                             netns=netns)
                self.assertIn(text, shown)
                for where in (None, 'pod'):
                    self.assertNotIn('break0-trace', self.lab.run(
                        'nft', 'list', 'ruleset', netns=where).stdout)

    def test_trace_of_iptables(self) -> None:
        self.bind_pod()
        self.lab.run('iptables-nft', '-A', 'INPUT', '-i', 'break0', '-j',
                     'DROP')
        self.assertIn('on the node the table ip filter, chain INPUT, drops',
                      self.traced(POD))

    def test_trace_of_a_packet_that_no_rule_drops(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'address', 'del', POD + '/24', 'dev', 'eth0',
                     netns='pod')
        shown = self.traced(POD)
        self.assertIn('no rule of nftables dropped the packet', shown)
        self.assertIn('to the pod, on the node (output)', shown)
        self.assertIn('to the pod, in the pod (ingress)', shown)
        self.assertNotIn('from the pod, on the node', shown)

    def test_trace_of_a_packet_to_the_lan(self) -> None:
        self.bind_pod()
        self.lab.run('ip', 'link', 'set', 'eth0', 'type', 'macvlan', 'mode',
                     'private', netns='pod')
        self.assertIn('table netdev kuryr-break0-break0, chain to-the-wire, '
                      'drops the packet', self.traced(POD))
