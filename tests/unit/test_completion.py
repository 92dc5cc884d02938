# SPDX-License-Identifier: Apache-2.0

"""The completion that is shipped is that of the command."""

from __future__ import annotations

import os
import shlex
import subprocess
import unittest

from tests import completion
from tests import overlay

SHIPPED = os.path.join(overlay.ROOT, 'etc', 'bash-completion',
                       'kuryr-break0')


class TestCompletion(unittest.TestCase):

    def complete(self, *words: str) -> set[str]:
        """What bash offers for the last of these words."""
        done = subprocess.run(
            ['bash', '-c', '. %s\nCOMP_WORDS=(%s)\nCOMP_CWORD=%d\n'
             '_shtab_kuryr_break0 kuryr-break0\nprintf "%%s\\n" '
             '"${COMPREPLY[@]}"' % (
                 SHIPPED, shlex.join(('kuryr-break0', *words)), len(words))],
            capture_output=True, text=True)
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        return set(done.stdout.split())

    def test_it_is_up_to_date(self) -> None:
        with open(SHIPPED) as file:
            self.assertEqual(completion.script() + '\n', file.read(),
                             'run: make completion')

    def test_verbs_and_their_options(self) -> None:
        self.assertEqual({'status'}, self.complete('stat'))
        self.assertEqual({'--json'}, self.complete('status', '--j'))
        self.assertLessEqual({'--dry-run', '--claim', '--delete-unclaimed'},
                             self.complete('sync', '--'))
        self.assertLessEqual({'--config-file', '--config-dir'},
                             self.complete('--conf'))
