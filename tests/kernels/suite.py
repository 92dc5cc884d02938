# SPDX-License-Identifier: Apache-2.0

"""Run modules of tests, and record the result of each test.

Each module runs in a process and a lab of its own. With "own", the lab has a
process namespace of its own. With "first", the lab runs in the first process
namespace, as root of the machine. Each test's result is printed when the test
ends.
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
import tempfile
import time
from typing import Any, Iterable, Iterator, TextIO
import unittest

#: Commands that start a lab: "first" is like a node, "own" like a container.
PLACES = {'first': ('unshare', '--net', '--mount', '--ipc'),
          'own': ('tools/in-lab',)}
#: CI's selection of tests, in parts of two minutes that run in parallel
PARTS = {
    'core-kuryr': ['tests.e2e.test_daemon.' + name for name in (
        'TestPod.test_its_life',
        'TestDirectBursts.test_the_first_thirty_make_one_break0')],
    'core': ['tests.functional.' + name for name in (
        'test_existence.TestSync.test_one_that_is_gone',
        'test_border.TestForgery.test_names_of_others',
        'test_border.TestRedirection.test_forged_neighbours',
        'test_border.TestTheMACAddress.test_without_an_agent',
        'test_border.TestWithoutTheHook.test_there_is_nothing_to_repair',
        'test_discovery.TestFinding.test_before_and_after_the_agent',
        'test_parents.TestTwoParents.test_after_both_were_deleted',
        'test_parent_kinds.TestBond.test_node_and_pods',
        'test_parent_kinds.TestVlan.test_node_and_pods',
        'test_parent_kinds.TestVrf.test_node_and_pods',
        'traffic.test_sources.TestBareParent.'
        'test_addresses_of_services_are_not_known',
        'cni.test_plugin.TestShim.test_both_families_both_ways')]}
#: Excluded tests: they measure or load the CPU, and their results do not
#: depend on the kernel.
UNNEEDED = ('TestBursts.test_the_first_thirty_make_one_break0',
            'test_bursts_lose_none', 'test_changes_its_mac_address',
            'test_hundred_containers_at_rest', 'test_thousand_addresses')
#: Seconds for one module, so that a hanging module does not block the others
LIMIT = 3600


class Result(unittest.TestResult):
    """Prints each test and its duration when it ends."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._begun = 0.0
        self.passed = 0
        self.seconds: dict[str, float] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._begun = time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        name = test.id().partition('tests.')[2]
        self.seconds[name] = round(time.monotonic() - self._begun, 1)
        state = 'passed'
        if any(each.id() == test.id() for each, _ in self.skipped):
            state = 'left out'
        elif any(_name(each.id()) == test.id() for each, _ in (
                *self.failures, *self.errors)):
            state = 'FAILED'
        else:
            self.passed += 1
        print('  %5.0f s  %s: %s' % (self.seconds[name], name, state),
              file=self._stream, flush=True)


def _name(test: str) -> str:
    """Return the name of a test, without the parameters of a subtest."""
    return test.partition(' [')[0].partition(' (')[0]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument('--in', dest='place', choices=PLACES)
    parser.add_argument('--into', type=pathlib.Path, required=True)
    parser.add_argument('modules', nargs='+')
    args = parser.parse_args()
    if args.place is None:
        return _run(args.modules[0], args.into)
    # Tests wait most of the time, so two per CPU keep all CPUs busy.
    with futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as workers:
        return max(workers.map(lambda module: _start(
            module, args.place, args.into), args.modules))


def _each(tests: Iterable[Any]) -> Iterator[unittest.TestCase]:
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from _each(test)
        else:
            yield test


def _start(module: str, place: str, into: pathlib.Path) -> int:
    """Run one module in a process of its own."""
    with tempfile.TemporaryFile('w+', errors='replace') as errors:
        try:
            status = subprocess.run(
                [*PLACES[place], sys.executable, '-W', 'ignore', '-m',
                 'tests.kernels.suite', '--into', str(into), module],
                stderr=errors, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            status = 124
        # The log matters only if the process wrote no results.
        if not (into / (module + '.json')).exists():
            errors.seek(0)
            print('%s ended with %d\n%s' % (module, status, ''.join(
                errors.readlines()[-20:])), flush=True)
    return status


def _run(module: str, into: pathlib.Path) -> int:
    """Run one module in this process."""
    result: Any = Result(sys.stdout)
    begun = time.monotonic()
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        unittest.TestSuite(test for test in _each(
            unittest.defaultTestLoader.loadTestsFromNames(
                PARTS.get(module, (module,))))
            if not test.id().endswith(UNNEEDED)).run(result)
    failed = {str(test): text for test, text in (
        *result.failures, *result.errors)}
    count = len({_name(test.id()) for test, _ in (
        *result.failures, *result.errors)})
    (into / (module + '.json')).write_text(json.dumps({
        'passed': result.passed,
        'failed': failed,
        'lacks': {str(test): reason for test, reason in result.skipped},
        'seconds': result.seconds}))
    print('%s: %d run, %d failed, %d left out, in %d s' % (
        module, result.testsRun, count, len(result.skipped),
        time.monotonic() - begun), flush=True)
    for name, text in failed.items():
        print('%s\n%s' % (name, text[-2000:]), flush=True)
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
