# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import glob
import os
import re
import unittest
from unittest import mock

from kuryr_break0.cli import output
from kuryr_break0.doctor import findings
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor import report

PAGE = os.path.join(os.path.dirname(__file__),
                    '../../doc/source/admin/doctor.rst')


class TestKinds(unittest.TestCase):

    def test_all_are_documented_once(self) -> None:
        ids = list(findings.KINDS)
        documented = []
        with open(PAGE) as page:
            for first, last in re.findall(r'^\.\. findings:: (\S+) (\S+)$',
                                          page.read(), re.MULTILINE):
                documented += ids[ids.index(first):ids.index(last) + 1]
        self.assertEqual(ids, documented)

    def test_all_are_read_once(self) -> None:
        with open(findings.PATH) as file:
            heads = re.findall(r'^(\S+): (?:error|warning|note)$',
                               file.read(), re.MULTILINE)
        self.assertEqual(heads, list(findings.KINDS))
        for each in heads:
            self.assertRegex(each, r'\A[a-z0-9]+(-[a-z0-9]+)+\Z|\Adisabled\Z')

    def test_each_is_found_by_a_check(self) -> None:
        text = ''
        for path in glob.glob(os.path.dirname(findings.PATH) + '/*.py'):
            with open(path) as file:
                text += file.read()
        self.assertEqual(set(), {each for each in findings.KINDS
                                 if "'%s'" % each not in text})
        self.assertEqual(set(), {*re.findall(r"KINDS\['([^']+)'", text)}
                         - {*findings.KINDS})

    def test_they_are_sentences(self) -> None:
        for kind in findings.KINDS.values():
            for text in (kind.when, kind.why, kind.remedy):
                self.assertRegex(text, r'\A[^ a-z%].*[^.]\.\Z'
                                 r'|\A(kuryr|systemd)-.*[^.]\.\Z'
                                 r'|\A(\[break0\]|\w+_\w+,?|break0) '
                                 r'.*[^.]\.\Z',
                                 kind.id)

    def test_they_speak_of_containers(self) -> None:
        with mock.patch.object(output._Reader, 'has_pods', False):
            for kind in findings.KINDS.values():
                for text in (kind.why, kind.remedy):
                    self.assertNotRegex(output.speak(text),
                                        r'\b([Pp]od|[Nn]ode)s?\b|ADD|DEL')


class TestMerged(unittest.TestCase):

    def test_one_of_each_kind(self) -> None:
        missing = findings.KINDS['pod-route-missing']
        one, other = findings.merged([
            missing.found('first', [1, 2], ['do 1', 'sync']),
            findings.KINDS['pod-down'].found('down', [3]),
            missing.found('worse', [2, 4], ['do 2', 'sync'],
                          findings.ERROR)])
        self.assertEqual(('worse', findings.ERROR, ('1', '2', '4'),
                          ('do 1', 'do 2', 'sync')),
                         (one.seen, one.severity, one.subjects, one.commands))
        self.assertEqual(('down', ('3',)), (other.seen, other.subjects))


class TestReport(unittest.TestCase):

    def test_long_lists_are_cut(self) -> None:
        found = findings.KINDS['route-missing'].found(
            'none', list(range(20)), commands=['do %d' % number
                                               for number in range(20)])
        text = report.as_text([found])
        self.assertIn('0, 1, 2, 3, 4, 5, 6, 7 and 12 more.', text)
        self.assertIn('# and 12 more', text)
        self.assertNotIn('do 8', text)
        self.assertIn('do 19', report.as_json([found]))


class TestCounters(unittest.TestCase):

    def saved(self, first: int, second: int) -> dict[firewall.Rule, int]:
        return dict(firewall._parsed(
            '*filter\n:INPUT DROP [%d:84]\n:mine - [0:0]\n'
            '[%d:84] -A mine -i eth+ -j DROP\n'
            '[%d:84] -A mine -i break+ -j REJECT\nCOMMIT\n' % (
                first, second, second), 'iptables-legacy'))

    def test_what_has_risen(self) -> None:
        """Of rules for other interfaces nothing is said."""
        rules = firewall.risen(self.saved(1, 1), self.saved(2, 2), 'break0')
        self.assertEqual(
            ['the table filter of iptables-legacy, chain INPUT, has: policy '
             '-j DROP', 'the table filter of iptables-legacy, chain mine, '
             'has: -A mine -i break+ -j REJECT'], list(map(str, rules)))
        self.assertTrue(all(rule.drops for rule in rules))
        self.assertEqual([], firewall.risen(self.saved(1, 1),
                                            self.saved(1, 1), 'break0'))

    def test_what_lets_pass(self) -> None:
        for table, chain, command in (
                ('ip filter', 'INPUT',
                 'iptables -t filter -I INPUT -i break0 -j ACCEPT'),
                ('inet firewalld', 'filter_IN_public', 'firewall-cmd '
                 '--permanent --zone=trusted --add-interface=break0 && '
                 'firewall-cmd --reload'),
                ('ip filter', 'ufw-user-input', 'ufw allow in on break0'),
                ('inet mine', 'in',
                 'nft insert rule inet mine in iifname break0 accept')):
            self.assertEqual(command, firewall.accept(table, chain, 'break0',
                                                      True))
