# SPDX-License-Identifier: Apache-2.0

"""Commands import only the modules they need: imports delay a start."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import unittest

#: Packages that take long to import. Each --help works without them.
SLOW = {'pyroute2', 'waitress', 'prometheus_client', 'kuryr_kubernetes',
        'os_vif', 'requests'}
#: The modules of each verb that has several modules, or a module with another
#: name than the verb.
VERBS = {'unbind': {'bind'}, 'cni-install': {'cni'},
         'sync': {'sync', 'status'}, 'doctor': {'doctor', 'status'},
         'check': {'doctor', 'status'}}
#: The modules that all verbs share.
SHARED = {'main', 'command', 'common', 'output', 'parser', 'verbs'}
PROGRAM = """\
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)),
                              file=sys.stderr))
from kuryr_break0.__main__ import main
sys.argv = ['kuryr-break0', *sys.argv[1:]]
sys.exit(main())
"""


def imported(*arguments: str, **environ: str) -> set[str]:
    """Return the names of the modules that a command imports."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, *arguments], text=True, input='{}',
        env={**os.environ, **environ}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    return set(found)


class TestImports(unittest.TestCase):

    def test_verbs(self) -> None:
        for verb in ('status', 'check', 'doctor', 'sync', 'agent', 'adopt',
                     'bind', 'unbind', 'cleanup', 'cni', 'cni-install',
                     'probe'):
            with self.subTest(verb=verb):
                found = imported(verb, '--help')
                self.assertEqual(set(), SLOW & found)
                # Each verb imports only its own modules and the shared
                # modules.
                own = VERBS.get(verb, {verb})
                self.assertEqual(SHARED | own, {
                    name.rpartition('.')[2] for name in found
                    if name.startswith('kuryr_break0.cli.')} - {'names'})

    def test_arguments_without_a_verb(self) -> None:
        for arguments in ((), ('--help',), ('--version',), ('statsu',)):
            with self.subTest(arguments):
                found = imported(*arguments)
                self.assertEqual(
                    {'common', 'main', 'output', 'verbs'},
                    {name.rpartition('.')[2] for name in found
                     if name.startswith('kuryr_break0.cli.')})
                self.assertEqual(set(), {
                    'oslo_config', 'oslo_log', 'prettytable'} & found)

    def test_cni_plugin_in_one_process(self) -> None:
        found = imported('cni', CNI_COMMAND='VERSION')
        self.assertIn('kuryr_break0.cni.plugin', found)
        self.assertEqual(set(), {*SLOW, 'kuryr_break0.doctor'} & found)


class TestTests(unittest.TestCase):

    def test_no_test_module_imports_another_test_module(self) -> None:
        """An imported test case would run again with its importer."""
        tests = pathlib.Path(__file__).parents[1]
        modules = list(tests.rglob('*.py'))
        self.assertGreater(len(modules), 100)
        self.assertEqual({}, {
            str(path.relative_to(tests)): imports for path in modules
            if (imports := re.findall(
                r'^(?:from|import) +tests\b.*\btest_\w+.*',
                path.read_text(), re.MULTILINE))})
