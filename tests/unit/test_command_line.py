# SPDX-License-Identifier: Apache-2.0

"""The documentation shows the same command line as ``--help``."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import unittest

EXTENSIONS = os.path.join(os.path.dirname(__file__), '../../doc/source/_ext')
BIN = os.path.dirname(sys.executable)


def setUpModule() -> None:
    sys.path.insert(0, EXTENSIONS)
    unittest.addModuleCleanup(sys.path.remove, EXTENSIONS)


def help_of(*command: str) -> str:
    return subprocess.run([os.path.join(BIN, 'kuryr-break0'), *command,
                           '--help'], check=True, text=True,
                          stdout=subprocess.PIPE,
                          env={**os.environ, 'COLUMNS': '80'}).stdout


class TestHelp(unittest.TestCase):

    def test_all_fits_80_columns(self) -> None:
        page = help_of()
        verbs = re.findall(r'(?m)^  ([a-z-]+)  ', page)
        self.assertGreater(len(verbs), 10)
        for verb in verbs:
            page += help_of(verb)
        self.assertLessEqual(max(map(len, page.splitlines())), 80)

    def test_the_first_page_is_of_verbs(self) -> None:
        page = help_of()
        for text in ('Look:', 'Repair:', 'Set up:', '/etc/kuryr-break0'):
            self.assertIn(text, page)
        self.assertLess(len(page.splitlines()), 40)
        self.assertNotIn('--log', page)
        everything = subprocess.run(
            [os.path.join(BIN, 'kuryr-break0'), '--help-all'], check=True,
            text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'COLUMNS': '80'}).stdout
        self.assertIn('--log-file', everything)
        self.assertLessEqual(max(map(len, everything.splitlines())), 80)


class TestDirective(unittest.TestCase):

    def test_each_subcommand_and_option_is_shown(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for name, text in (
                    ('conf.py', 'import sys\nsys.path.insert(0, %r)\n'
                                'extensions = ["command_line"]\n' %
                                os.path.abspath(EXTENSIONS)),
                    ('index.rst', 'Commands\n========\n\n'
                                  '.. command-line::\n')):
                with open(os.path.join(directory, name), 'w') as file:
                    file.write(text)
            subprocess.run([os.path.join(BIN, 'sphinx-build'), '-qW', '-b',
                            'text', directory, directory + '/out'],
                           check=True)
            with open(directory + '/out/index.txt') as file:
                sections = re.split(r'\n\n(\S+)\n[-=*]+\n', file.read())
        shown = dict(zip(sections[1::2], sections[2::2]))
        self.assertEqual(re.findall(r'(?m)^  ([a-z-]+)  ', help_of()),
                         list(shown))
        for command, text in shown.items():
            options = set(re.findall(r'^  (?:-\w.*, )?(--[\w-]+)',
                                     help_of(command),
                                     re.MULTILINE)) - {'--help'}
            for option in options:
                with self.subTest(command=command, option=option):
                    self.assertRegex(text, r'(?m)^(-\w.*, )?%s\b' % option)


class TestDescribe(unittest.TestCase):

    def describe(self, **parser: object) -> str:
        import command_line  # setUpModule adds its directory to sys.path

        subparsers = argparse.ArgumentParser(prog='p').add_subparsers()
        sub = subparsers.add_parser('walk', aliases=['go'], **parser)
        sub.add_argument('where', metavar='WHERE', help='the *end*')
        sub.add_argument('--speed', '-s', type=int, default=3,
                         help='in km/h, by default %(default)s')
        sub.add_argument('--shoes', choices=['old', 'new'])
        sub.add_argument('--odd', help=argparse.SUPPRESS)
        text = '\n'.join(command_line.describe(subparsers.choices))
        self.assertIn('\\*end\\*', text)
        return text.replace('\\', '')  # backslashes escape markup

    def test_arguments(self) -> None:
        text = self.describe(description='Walk to\n  a %(prog)s.')
        self.assertEqual(1, text.count('~~~~'))
        for part in ('.. option:: WHERE\n\n   the *end*\n',
                     '.. option:: --speed SPEED, -s SPEED\n\n'
                     '   in km/h, by default 3\n',
                     '.. option:: --shoes {old,new}\n',
                     '\nWalk to a p walk.\n'):
            self.assertIn(part, text)
        self.assertNotIn('.. option:: --odd', text)

    def test_laid_out_text_stays_as_it_is(self) -> None:
        text = self.describe(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog='Examples:\n\n  p walk home\n  p walk on\n\nThat is all.')
        self.assertIn('Examples:\n\n.. code-block:: none\n\n     p walk home\n'
                      '     p walk on\n\nThat is all.\n', text)
