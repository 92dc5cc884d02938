# SPDX-License-Identifier: Apache-2.0

"""Run the tests of the cluster that match an argument, by default all.

tools/in-root-lab runs ``python -m tests.cluster [--core] [PATTERN...]``. The
output ends with the number of passed tests.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Any
import unittest

from tools import parallel

_BOTH = ('test_workloads.TestDeployment.test_many_pods_deleted_by_force',
         'test_faults.TestBreak0.test_deleted')
#: The tests that ``--core`` runs; they take three minutes.
CORE = (*_BOTH, 'test_workloads.TestTwoNodes.test_all_reach_all')
#: The tests that ``--releases`` runs, with each release of Kuryr.
RELEASES = (*_BOTH, 'test_workloads.TestDeployment.test_rollout')


class Result(unittest.TextTestResult):
    """Prints the duration of a test, and a failure at once."""

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._began = time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        print('  after %d s' % (time.monotonic() - self._began), flush=True)

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
