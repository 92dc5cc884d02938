# SPDX-License-Identifier: Apache-2.0

"""Run the tests of the cluster, or those whose names match an argument.

tests/in-root-lab runs ``python -m tests.cluster [--core] [PATTERN...]``, which
ends with how many passed.
"""

from __future__ import annotations

import argparse
import re
import sys
import unittest

from tests import parallel

#: The tests of CI, which take three minutes.
CORE = (
    'test_workloads.TestDeployment.test_many_pods_of_one_node_at_once',
    'test_workloads.TestTwoNodes', 'test_faults.TestBreak0.test_deleted',
    'test_restarts.TestRestarts.test_kuryr_daemon',
    'test_faults.TestReboot')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--core', action='store_true',
                        help='run the tests that CI runs')
    parser.add_argument('patterns', nargs='*', metavar='PATTERN')
    args = parser.parse_args()
    patterns = [*args.patterns, *(CORE if args.core else ())]
    suite = unittest.TestSuite(
        test for test in parallel.tests(unittest.defaultTestLoader.discover(
            'tests/cluster', top_level_dir='.'))
        if any(re.search(each, test.id()) for each in patterns or ['']))
    result = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2).run(suite)
    failed = len(result.failures) + len(result.errors)
    print('%d passed, %d failed' % (
        result.testsRun - failed - len(result.skipped), failed))
    return 1 if failed or not result.testsRun else 0


if __name__ == '__main__':
    sys.exit(main())
