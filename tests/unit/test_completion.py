# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from typing import Any
import unittest

from oslo_config import cfg
from oslo_log import log as logging

from kuryr_break0.cli import main as cli
from tests import overlay

COMPLETION = os.path.join(overlay.ROOT, 'etc', 'bash-completion',
                          'kuryr-break0')
PROGRAM = os.path.join(os.path.dirname(sys.executable), 'kuryr-break0')


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """What the program itself parses, by name of the command."""
    subparsers: Any = argparse.ArgumentParser().add_subparsers()
    cli.add_parsers(subparsers)
    return dict(subparsers.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


class TestCompletion(unittest.TestCase):

    def complete(self, *words: str) -> set[str]:
        """What bash offers for the last of these words."""
        words = (PROGRAM, *words)
        done = subprocess.run(
            ['bash', '-u', '-c', '. %s\nCOMP_WORDS=(%s)\nCOMP_CWORD=%d\n'
             '_kuryr_break0 "$0" "$1" "$2"\nprintf "%%s\\n" '
             '"${COMPREPLY[@]}"' % (COMPLETION, shlex.join(words),
                                    len(words) - 1),
             words[0], words[-1], words[-2]],
            capture_output=True, text=True)
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        offered = done.stdout.split()
        self.assertEqual(len(set(offered)), len(offered), offered)
        return set(offered)

    def test_commands(self) -> None:
        self.assertEqual(set(subcommands()), self.complete(''))
        self.assertEqual({'status'}, self.complete('stat'))
        self.assertEqual(set(subcommands()),
                         self.complete('--config-file', '/etc/k.conf', ''))

    def test_options_of_each_command(self) -> None:
        for name, parser in subcommands().items():
            with self.subTest(name):
                self.assertEqual(options(parser), self.complete(name, '-'))

    def test_options_before_the_command(self) -> None:
        conf = cfg.ConfigOpts()
        logging.register_options(conf)
        conf([], version='1')
        # Of the same libraries, so there is nothing left out or made up.
        self.assertEqual(options(conf._oparser), self.complete('-'))

    def test_begun(self) -> None:
        self.assertEqual({'--json'}, self.complete('status', '--j'))
        self.assertEqual({'--config-file', '--config-dir'},
                         self.complete('--conf'))

    def test_files(self) -> None:
        # Then there is nothing of ours, and bash does it.
        for option in ('--config-file', '--config-dir', '--log-file',
                       '--log-dir', '--log-config-append'):
            self.assertEqual(set(), self.complete(option, ''))

    def test_is_for_the_command(self) -> None:
        with open(COMPLETION) as file:
            self.assertEqual(
                'complete -o default -F _kuryr_break0 kuryr-break0',
                file.read().splitlines()[-1])
