# SPDX-License-Identifier: Apache-2.0

"""The base of tests that run the command ``kuryr-break0``."""

from __future__ import annotations

import os
import subprocess

from tests.functional import base
from tests.support import lab
from tests.support import program


class CLITestCase(base.LabTestCase):

    #: Function that runs the program; subclasses replace the function.
    run_program = staticmethod(program.run)

    def call(self, *args: str,
             **environ: str) -> subprocess.CompletedProcess[str]:
        environ.setdefault('COLUMNS', '500')  # wide enough to wrap no line
        done = self.run_program(
            [program.BREAK0, *args], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **environ})
        self.assertNotIn('Traceback', done.stderr)
        return done


#: Unusable parent interfaces, and the reason for refusal of each.
UNFIT = {'lo': 'it is the loopback', 'port': 'it is a port of bridge. Name',
         'tun': 'it has no MAC addresses'}


def add_unfit(node: lab.Lab) -> None:
    node.run('ip', 'link', 'add', 'bridge', 'type', 'bridge')
    node.run('ip', 'link', 'add', 'port', 'master', 'bridge', 'type', 'veth',
             'peer', 'name', 'far')
    node.run('ip', 'tuntap', 'add', 'dev', 'tun', 'mode', 'tun')
