# SPDX-License-Identifier: Apache-2.0

"""Completion in real shells, from the shipped and the printed scripts."""

from __future__ import annotations

import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

from kuryr_break0.cli import command
from tools import completion

SHIPPED = {shell: pathlib.Path(path)
           for shell, path in command.COMPLETION.items()}
BIN = pathlib.Path(sys.executable).parent
LOADER = '/usr/share/bash-completion/bash_completion'
#: Seconds for the answer of a shell.
PATIENCE = 120


def printed(shell: str) -> str:
    return subprocess.run(
        [str(BIN / 'kuryr-break0'), '--shell_completion', shell], text=True,
        check=True, stdout=subprocess.PIPE).stdout


class Terminal:
    """A shell in a pseudoterminal."""

    def __init__(self, *command: str, **environ: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {
                **os.environ, 'TERM': 'dumb', 'PS1': '> ', **environ})

    def type(self, text: str, until: str) -> str:
        """Type a text, and return the output up to a regular expression."""
        os.write(self._fd, text.encode())
        seen = ''
        while not re.search(until, seen):
            ready, _, _ = select.select([self._fd], [], [], PATIENCE)
            assert ready, '%r has no %r' % (seen, until)
            seen += os.read(self._fd, 4096).decode(errors='replace')
        return seen

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._fd)
        os.waitpid(self.pid, 0)


class TestCompletion(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)

    def start(self, *command: str, **environ: str) -> Terminal:
        terminal = Terminal(*command, HOME=str(self.dir), PATH='%s:%s' % (
            BIN, os.environ['PATH']), **environ)
        self.addCleanup(terminal.close)
        return terminal

    def assert_completes(self, shell: Terminal) -> None:
        shell.type('echo rea""dy\n', 'ready')
        for typed, until in (
                ('kuryr-break0 sta\t', r'status '),
                ('--prob\t', r'--problems '),
                ('--origin disc\t', r'discovered '),
                ('\x15kuryr-break0 sync --dele\t', '--delete-unclaimed '),
                ('\x15kuryr-break0 --config-f\t', '--config-file '),
                ('\x15kuryr-break0 doctor --bundle %s/a-f\t' % self.dir,
                 'a-file')):
            shell.type(typed, until)

    def test_it_is_up_to_date(self) -> None:
        for shell, path in SHIPPED.items():
            self.assertEqual(completion.script(shell), path.read_text(),
                             'run: make completion')
            self.assertEqual(path.read_text(), printed(shell))

    @unittest.skipUnless(os.path.exists(LOADER), 'no bash-completion here')
    def test_bash_finds_the_installed_script(self) -> None:
        """bash-completion finds the script below the prefix of pip or make."""
        (self.dir / 'a-file').touch()
        target = self.dir / 'share/bash-completion/completions'
        target.mkdir(parents=True)
        shutil.copy(SHIPPED['bash'], target)
        rc = self.dir / 'rc'
        rc.write_text('. %s\nbind "set bell-style none"\nPS1="> "\n' % LOADER)
        self.assert_completes(self.start(
            'bash', '--rcfile', str(rc), '-i',
            XDG_DATA_DIRS='%s/share:/usr/share' % self.dir))

    def test_bash_reads_the_printed_script(self) -> None:
        (self.dir / 'a-file').touch()
        rc = self.dir / 'rc'
        rc.write_text('eval "$(kuryr-break0 --shell_completion bash)"\n'
                      'bind "set bell-style none"\nPS1="> "\n')
        self.assert_completes(self.start('bash', '--rcfile', str(rc), '-i'))

    @unittest.skipUnless(shutil.which('fish'), 'no fish here')
    def test_fish(self) -> None:
        (self.dir / 'a-file').touch()
        for typed, expected in (
                ('sta', 'status'), ('status --prob', '--problems'),
                ('status --origin disc', 'discovered'),
                ('sync --dele', '--delete-unclaimed'),
                ('--config-f', '--config-file'),
                ('doctor --bundle %s/a-f' % self.dir,
                 '%s/a-file' % self.dir)):
            shown = subprocess.check_output(
                ['fish', '--no-config', '-c', 'source $argv[1]; complete '
                 '--do-complete "kuryr-break0 $argv[2]"',
                 str(SHIPPED['fish']), typed], text=True,
                env={**os.environ, 'HOME': str(self.dir)})
            self.assertIn(expected, [line.split('\t')[0]
                                     for line in shown.splitlines()], typed)

    @unittest.skipUnless(shutil.which('zsh'), 'no zsh here')
    def test_zsh_in_both_ways(self) -> None:
        (self.dir / 'a-file').touch()
        for lines in ('fpath=(%s $fpath)\nautoload -Uz compinit && compinit '
                      '-u\n' % SHIPPED['zsh'].parent,
                      'autoload -Uz compinit && compinit -u\neval "$('
                      'kuryr-break0 --shell_completion zsh)"\n'):
            with self.subTest(lines):
                (self.dir / '.zshrc').write_text(
                    'bindkey -e\nunsetopt beep\nPS1="> "\n' + lines)
                self.assert_completes(self.start('zsh', '-d', '-i'))
