# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import glob
import os
import re
import socket
import tempfile
from typing import Optional
import unittest
from unittest import mock

from kuryr_break0.break0 import device
from kuryr_break0.cli import output
from kuryr_break0 import cni
from kuryr_break0.doctor import findings
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor import installation
from kuryr_break0.doctor import report
from kuryr_break0.engine import actual
from kuryr_break0.engine import problems

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
        for path in (*glob.glob(os.path.dirname(findings.PATH) + '/*.py'),
                     problems.__file__):
            with open(path) as file:
                text += file.read()
        # The ID of a problem of break0 is "break0-" and the name of a
        # difference.
        differences = ''
        for path in device.__file__, actual.__file__:
            with open(path) as file:
                differences += file.read()
        self.assertEqual(set(), {
            each for each in findings.KINDS if "'%s'" % each not in text
            and not (each.startswith('break0-')
                     and "'%s'" % each[len('break0-'):] in differences)})
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

    def test_a_container_or_pod_is_a_container(self) -> None:
        with mock.patch.object(output._Reader, 'has_pods', False):
            self.assertEqual('no container of that name', output.speak(
                'no container or pod of that name'))


class TestMerged(unittest.TestCase):

    def test_one_of_each_kind(self) -> None:
        missing = findings.KINDS['pod-route-missing']
        one, other = findings.merged([
            missing.finding('first', [1, 2], ['do 1', 'sync']),
            findings.KINDS['pod-down'].finding('down', [3]),
            missing.finding('worse', [2, 4], ['do 2', 'sync'],
                            findings.ERROR)])
        self.assertEqual(('worse', findings.ERROR, ('1', '2', '4'),
                          ('do 1', 'do 2', 'sync')),
                         (one.observed, one.severity, one.subjects,
                          one.commands))
        self.assertEqual(('down', ('3',)), (other.observed, other.subjects))


class TestReport(unittest.TestCase):

    def test_long_lists_are_cut(self) -> None:
        found = findings.KINDS['route-missing'].finding(
            'none', list(range(20)), commands=['do %d' % number
                                               for number in range(20)])
        text = report.as_text([found])
        self.assertIn('0, 1, 2, 3, 4, 5, 6, 7 and 12 more.', text)
        self.assertIn('# and 12 more', text)
        self.assertNotIn('do 8', text)
        self.assertIn('do 19',
                      report.as_json([found])['findings'][0]['commands'])

    def test_subjects_after_the_text(self) -> None:
        for name, seen, subjects, expected in (
                ('container-not-discovered', '1.1.1.1 is not bound: no reason',
                 ['1.1.1.1', '1.1.1.2'],
                 '1.1.1.1 is not bound: no reason. Also: 1.1.1.2. why'),
                ('option-unknown', 'mtv is no option: did you mean mtu?',
                 ['mtx is no option'], 'did you mean mtu? Also: mtx is no '
                 'option. why'),
                ('option-unknown', 'did you mean mtu?', [],
                 'did you mean mtu? why'),
                ('sandbox-gone', 'addresses belong to gone sandboxes', ['x1'],
                 'addresses belong to gone sandboxes: x1. why')):
            text = report.as_text(
                [findings.KINDS[name].finding(seen, subjects)])
            self.assertIn(expected, ' '.join(text.split()))


class TestCounters(unittest.TestCase):

    def saved(self, first: int, second: int) -> dict[firewall.Rule, int]:
        return dict(firewall._parsed(
            '*filter\n:INPUT DROP [%d:84]\n:mine - [0:0]\n'
            '[%d:84] -A mine -i eth+ -j DROP\n'
            '[%d:84] -A mine -i break+ -j REJECT\nCOMMIT\n' % (
                first, second, second), 'iptables-legacy'))

    def test_rules_with_a_risen_counter(self) -> None:
        """Rules for other interfaces are not reported."""
        rules = firewall.risen(self.saved(1, 1), self.saved(2, 2), 'break0')
        self.assertEqual(
            ['the table filter of iptables-legacy, chain INPUT, has: policy '
             '-j DROP', 'the table filter of iptables-legacy, chain mine, '
             'has: -A mine -i break+ -j REJECT'], list(map(str, rules)))
        self.assertTrue(all(rule.drops for rule in rules))
        self.assertEqual([], firewall.risen(self.saved(1, 1),
                                            self.saved(1, 1), 'break0'))

    def test_the_command_of_each_firewall(self) -> None:
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


class TestKuryrsPlugin(unittest.TestCase):
    """Files that can replace Kuryr's CNI plugin."""

    #: The script that pip writes
    PIP = ('#!%s\n# -*- coding: utf-8 -*-\nimport re\nimport sys\n'
           'from kuryr_kubernetes.cmd.cni import run\n')
    #: The beginning of pip's script for a path of Python that is too long for
    #: the kernel
    LONG = "/bin/sh\n'''exec' /long/python \"$0\" \"$@\"\n' '''"
    PYTHON = PIP % '/opt/kuryr/bin/python'

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dir = directory.name
        self.path = os.path.join(self.dir, 'kuryr-cni')
        patched = mock.patch.object(cni, 'PLUGIN_DIRS', (
            self.dir, '/nonexistent'))
        patched.start()
        self.addCleanup(patched.stop)

    def write(self, text: str, name: str = 'kuryr-cni') -> str:
        path = os.path.join(self.dir, name)
        with open(path, 'w') as file:
            file.write(text)
        return path

    def assert_python(self, program: Optional[str] = None) -> None:
        found, = installation.check_plugin()
        self.assertEqual(('plugin-slow', findings.NOTE, (self.path,)),
                         (found.id, found.severity, found.subjects))
        for each in (self.path, program or self.path):
            self.assertIn(each, found.observed)

    def assert_none(self) -> None:
        self.assertEqual([], list(installation.check_plugin()))

    def test_a_script_of_pip(self) -> None:
        for interpreter in ('/opt/kuryr/bin/python3', self.LONG,
                            '/usr/bin/env python3', '/usr/bin/pypy3'):
            self.write(self.PIP % interpreter)
            self.assert_python()

    def test_a_link(self) -> None:
        other = self.write(self.PYTHON, 'kuryr-cni-py')
        os.symlink(other, self.path)
        self.assert_python(other)

    def test_wrappers(self) -> None:
        program = self.write(self.PYTHON, 'program')
        activate = self.write('# Of a venv\nunset PYTHONHOME\n', 'activate')
        inner = self.write('#!/bin/sh\nexec %s\n' % program, 'inner')
        for text, named in (
                ('exec %s "$@"' % program, program),
                ("# a comment\n\nPATH=/bin '%s' \"$@\"" % program, program),
                ('. %s; exec kuryr-cni "$@"' % activate, activate),
                ('exec /opt/kuryr/bin/python -m kuryr', self.path),
                ('exec %s "$@"' % inner, program)):
            self.write('#!/bin/sh\n%s\n' % text)
            self.assert_python(named)

    def test_wrappers_of_another_program(self) -> None:
        # Each of the two wrappers names both wrappers.
        other = os.path.join(self.dir, 'other')
        for name in ('kuryr-cni', 'other'):
            self.write('#!/bin/sh\n  # not the Python one\nexec %s %s\n'
                       % (self.path, other), name)
        self.assert_none()
        self.write('#!/bin/sh\n' + ''.join(
            'exec %s\n' % self.write('#!/bin/sh\n', str(number))
            for number in range(100)))
        self.assert_none()

    def test_a_program_of_the_machine(self) -> None:
        with open(self.path, 'wb') as file:
            file.write(b'\x7fELF\0 python kuryr_kubernetes /usr/bin/python3')
        self.assert_none()

    def test_a_huge_file(self) -> None:
        self.write(self.PYTHON)
        os.truncate(self.path, 2 ** 40)
        self.assert_python()
        with open(self.path, 'wb') as file:
            file.truncate(2 ** 40)
        self.assert_none()

    def test_files_that_are_no_program(self) -> None:
        self.assert_none()  # the file is missing
        for target in ('/nonexistent/kuryr-cni', self.path, '/dev/zero'):
            os.symlink(target, self.path)
            self.assert_none()
            os.unlink(self.path)
        os.mkdir(self.path)
        self.assert_none()
        os.rmdir(self.path)
        os.mkfifo(self.path)
        self.assert_none()
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.path)
            self.assert_none()
        os.unlink(self.path)
        os.mkfifo(os.path.join(self.dir, 'pipe'))
        for data in (b'', b'#!\xff\0/\xff\n/\0/\xfe', os.fsencode(
                '#!/bin/sh\nexec %s/pipe %s\n' % (self.dir, self.dir))):
            with open(self.path, 'wb') as file:
                file.write(data)
            self.assert_none()

    def test_a_file_that_cannot_be_read(self) -> None:
        self.write(self.PYTHON)
        for error in (PermissionError, FileNotFoundError):
            with mock.patch.object(os, 'open', side_effect=error):
                self.assert_none()

    def test_directories_with_one_each(self) -> None:
        self.write(self.PYTHON)
        other = os.path.join(self.dir, 'other')
        os.mkdir(other)
        self.write(self.PYTHON, 'other/kuryr-cni')
        with mock.patch.object(cni, 'PLUGIN_DIRS', (self.dir, other)):
            found, = installation.check_plugin()
        self.assertEqual((self.path, other + '/kuryr-cni'), found.subjects)
