# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import os
import re
from typing import Optional
import unittest

from kuryr_break0.doctor import findings
from kuryr_break0.doctor import iptables
from kuryr_break0.doctor import nftables
from kuryr_break0.doctor import packet_filter
from kuryr_break0.doctor import report

PAGE = os.path.join(os.path.dirname(__file__),
                    '../../doc/source/admin/doctor.rst')
POD = ipaddress.ip_address('100.75.30.71')
NODE = ipaddress.ip_address('100.75.30.51')


class TestKinds(unittest.TestCase):

    def test_all_are_documented_once(self) -> None:
        ids = [kind.id for kind in findings.KINDS]
        documented = []
        with open(PAGE) as page:
            for first, last in re.findall(r'^\.\. findings:: (\S+) (\S+)$',
                                          page.read(), re.MULTILINE):
                documented += ids[ids.index(first):ids.index(last) + 1]
        self.assertEqual(ids, documented)

    def test_they_are_different(self) -> None:
        ids = [kind.id for kind in findings.KINDS]
        self.assertEqual(len(ids), len(set(ids)))
        for each in ids:
            self.assertRegex(each, r'\A[a-z0-9]+(-[a-z0-9]+)+\Z|\Adisabled\Z')

    def test_they_are_sentences(self) -> None:
        for kind in findings.KINDS:
            for text in (kind.when, kind.why, kind.remedy):
                self.assertRegex(text, r'\A[^ a-z%].*[^.]\.\Z'
                                 r'|\A(kuryr|systemd)-.*[^.]\.\Z'
                                 r'|\A(\[break0\]|\w+_\w+,?|break0) '
                                 r'.*[^.]\.\Z',
                                 kind.id)


class TestReport(unittest.TestCase):

    def test_long_lists_are_cut(self) -> None:
        found = findings.ROUTE_MISSING.found(
            'none', list(range(20)), commands=['do %d' % number
                                               for number in range(20)])
        text = report.as_text([found])
        self.assertIn('0, 1, 2, 3, 4, 5, 6, 7 and 12 more.', text)
        self.assertIn('# and 12 more', text)
        self.assertNotIn('do 8', text)
        self.assertIn('do 19', report.as_json([found]))


class TestPacketFilter(unittest.TestCase):

    def outcome(self, *rules: str, policy: str = 'ACCEPT',
                chains: str = '') -> Optional[bool]:
        """Whether all is dropped of what comes in; None if nothing is."""
        tables = iptables.parse('\n'.join((
            '# a comment', '*filter', ':INPUT %s [0:0]' % policy,
            ':OUTPUT ACCEPT [0:0]', chains, *rules, 'COMMIT')), 4)
        packet = packet_filter.Packet('input', 'break0', '', POD, NODE, 4)
        found = [each for table in tables
                 for each in packet_filter.obstacles(table, [packet])]
        self.assertLess(len(found), 2)
        return found[0].all if found else None

    def test_what_decides(self) -> None:
        for rules, policy, expected in (
                ((), 'ACCEPT', None),
                ((), 'DROP', True),
                (('-A INPUT -i break0 -j DROP',), 'ACCEPT', True),
                (('-A INPUT ! -i break0 -j DROP',), 'ACCEPT', None),
                (('-A INPUT -i eth+ -j DROP',), 'ACCEPT', None),
                (('-A INPUT -s 100.75.30.64/26 -j REJECT --reject-with '
                  'icmp-port-unreachable',), 'ACCEPT', True),
                (('-A INPUT ! -s 100.75.30.64/26 -j DROP',), 'ACCEPT', None),
                (('-A INPUT -d 100.75.30.51/32 -j DROP',), 'ACCEPT', True),
                (('-A INPUT -i break0 -j ACCEPT', '-A INPUT -j DROP'),
                 'DROP', None),
                (('-A INPUT -i break0 -p tcp -m tcp --dport 22 -j DROP',),
                 'ACCEPT', False),
                (('-A INPUT -p tcp -m tcp --dport 22 -j DROP',),
                 'ACCEPT', None),
                (('-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT',),
                 'DROP', False),
                (('-A INPUT -m mark --mark 0x4 -j ACCEPT',), 'DROP', None),
                (('-A INPUT -m mark --mark 0x4 -j DROP',), 'ACCEPT', None),
                (('-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j '
                  'ACCEPT',), 'DROP', True),
                (('-A INPUT -m conntrack --ctstate NEW -j DROP',), 'ACCEPT',
                 True),
                (('-A INPUT -m conntrack --ctstate INVALID -j DROP',),
                 'ACCEPT', None),
                (('-A INPUT -m comment --comment "all -j DROP" -j LOG '
                  '--log-prefix "-j DROP"',), 'ACCEPT', None),
                (('-A INPUT -m set ! --match-set pods src -j DROP',),
                 'ACCEPT', None)):
            with self.subTest(rules=rules, policy=policy):
                self.assertIs(expected, self.outcome(*rules, policy=policy))

    def test_chains(self) -> None:
        for rules, expected in (
                (('-A INPUT -j PODS', '-A PODS -j DROP'), True),
                (('-A INPUT -j PODS', '-A PODS -i break0 -j RETURN',
                  '-A PODS -j DROP'), None),
                (('-A INPUT -i break0 -j PODS',
                  '-A PODS -p tcp -j DROP'), False),
                (('-A INPUT -g PODS', '-A INPUT -j DROP'), None),
                (('-A INPUT -j PODS', '-A INPUT -j DROP'), True),
                (('-A INPUT -j PODS', '-A PODS -j PODS'), None)):
            with self.subTest(rules=rules):
                self.assertIs(expected, self.outcome(*rules,
                                                     chains=':PODS - [0:0]'))

    def test_what_is_no_ruleset(self) -> None:
        for text in ('', '[]', '{}', '{"nftables": 1}', '{"nftables": [1]}',
                     '{"nftables": [{"chain": {}}]}',
                     '{"nftables": [{"rule": {"family": "ip", "table": "t", '
                     '"chain": "c"}}]}'):
            with self.subTest(text), self.assertRaises(ValueError):
                nftables.parse(text)
        for text in ('-A INPUT -j DROP', '*filter\n:INPUT',
                     '*filter\n:INPUT DROP\n-A INPUT -j',
                     '*filter\n:INPUT DROP\n-A INPUT -s x -j DROP',
                     '*filter\n:INPUT DROP\n-A INPUT -m comment --comment "'):
            with self.subTest(text), self.assertRaises(ValueError):
                iptables.parse(text, 4)

    def test_a_rule_of_an_unknown_form(self) -> None:
        for statement in ('1', '{"match": 1}', '{"match": {"op": "=="}}',
                          '{"vmap": {"key": {"meta": {}}, "data": [1]}}',
                          '{"match": {"op": "==", "left": {"payload": {'
                          '"protocol": "ip", "field": "saddr"}}, "right": '
                          '"example.org"}}'):
            table, = nftables.parse(
                '{"nftables": [{"chain": {"family": "ip", "table": "t", '
                '"name": "c", "hook": "input", "policy": "drop"}}, {"rule": '
                '{"family": "ip", "table": "t", "chain": "c", "expr": [%s, '
                '{"drop": null}]}}]}' % statement)
            packet = packet_filter.Packet('input', 'break0', '', POD, NODE, 4)
            with self.subTest(statement):
                self.assertEqual([], list(
                    packet_filter.obstacles(table, [packet])))
