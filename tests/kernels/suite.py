# SPDX-License-Identifier: Apache-2.0

"""Runs modules of tests, and writes down what came of each test.

What is named is run a module at a time by a process of its own, in a lab: of
namespaces of its own ("own"), or in the first process namespace, as root of
the machine ("first").
"""

from __future__ import annotations

import argparse
from concurrent import futures
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any
import unittest

#: As on a node, and as in a container of it.
PLACES = {'first': ('unshare', '--net', '--mount', '--ipc'),
          'own': ('tests/in-lab',)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument('--in', dest='place', choices=PLACES)
    parser.add_argument('--into', type=pathlib.Path, required=True)
    parser.add_argument('modules', nargs='+')
    args = parser.parse_args()
    if args.place is None:
        return _run(args.modules[0], args.into)
    with futures.ThreadPoolExecutor(2) as workers:
        # What is logged on the way is of no interest here.
        return max(workers.map(lambda module: subprocess.run(
            [*PLACES[args.place], sys.executable, '-W', 'ignore', '-m',
             'tests.kernels.suite', '--into', str(args.into), module],
            stderr=subprocess.DEVNULL).returncode, args.modules))


def _run(module: str, into: pathlib.Path) -> int:
    """Run one module in this process."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        result: Any = unittest.TextTestRunner(stream=nowhere).run(
            unittest.defaultTestLoader.loadTestsFromName(module))
    failed = {str(test): text for test, text in (
        *result.failures, *result.errors)}
    # Subtests of one test count once.
    count = len({each.split(' [')[0].split(' (')[0] for each in failed})
    (into / (module + '.json')).write_text(json.dumps({
        'passed': result.testsRun - count - len(result.skipped),
        'failed': failed,
        'lacks': {str(test): reason for test, reason in result.skipped}}))
    print('%s: %d run, %d failed, %d left out' % (
        module, result.testsRun, count, len(result.skipped)), flush=True)
    for name, text in failed.items():
        print('%s\n%s' % (name, text[-2000:]), flush=True)
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
