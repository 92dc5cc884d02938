# SPDX-License-Identifier: Apache-2.0

"""Run the tests of the cluster that match an argument, by default all.

tools/in-root-lab runs ``python -m tests.cluster [--core] [PATTERN...]``. The
output ends with the number of passed tests.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any
import unittest

from tools import parallel

#: The tests that ``--core`` runs.
CORE = (
    'test_workloads.TestDeployment.test_many_pods_deleted_by_force',
    'test_workloads.TestTwoNodes', 'test_faults.TestBreak0.test_deleted',
    'test_restarts.TestRestarts.test_kuryr_daemon',
    'test_faults.TestReboot')

#: The tests that ``--releases`` runs, with each release of Kuryr.
RELEASES = (
    'test_workloads.TestDeployment', 'test_faults.TestBreak0.test_deleted',
    'test_restarts.TestRestarts.test_kuryr_daemon')


class Result(unittest.TextTestResult):
    """Prints a failure at once, because the tests take minutes."""

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        print(self.failures[-1][1], flush=True)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        print(self.errors[-1][1], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--core', action='store_true',
                        help='run a few tests of each kind')
    parser.add_argument('--releases', action='store_true',
                        help='run the tests of each release of Kuryr')
    parser.add_argument('patterns', nargs='*', metavar='PATTERN')
    args = parser.parse_args()
    patterns = [*args.patterns, *(CORE if args.core else ()),
                *(RELEASES if args.releases else ())]
    suite = unittest.TestSuite(
        test for test in parallel.tests(unittest.defaultTestLoader.discover(
            'tests/cluster', top_level_dir='.'))
        if any(re.search(each, test.id()) for each in patterns or ['']))
    result = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2, resultclass=Result).run(suite)
    failed = len(result.failures) + len(result.errors)
    print('%d passed, %d failed' % (
        result.testsRun - failed - len(result.skipped), failed))
    return 1 if failed or not result.testsRun else 0


if __name__ == '__main__':
    sys.exit(main())
