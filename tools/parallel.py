# SPDX-License-Identifier: Apache-2.0

"""Run the classes of the tests in parallel, for tools/run and tools/run-quick.

Each class runs in a forked process, so only the parent imports the tests. When
a process ends, a process for the next class starts. The output ends with the
failures and with the numbers of passed and failed tests. The file of --count
gets these numbers too.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, BinaryIO, Iterator, NamedTuple
import unittest

from tests.support import program

#: The slowest modules. Their classes start first, so that the last classes to
#: start are short.
FIRST = (
    'tests.e2e.test_nothing_lost', 'tests.functional.test_bench',
    'tests.e2e.test_daemon', 'tests.functional.doctor.test_pods',
    'tests.functional.test_probe', 'tests.functional.cni.test_agent',
    'tests.functional.test_storm', 'tests.functional.test_discovery',
    'tests.e2e.test_operator', 'tests.e2e.test_adopt',
    'tests.e2e.test_controller',
    'tests.functional.cni.test_plugin', 'tests.functional.test_doubt')


#: Numbers of the first and last lines of a failure's output that are printed:
#: the first lines show the origin of the failure, and the last lines show the
#: log before the failure. CI keeps only the end of a long output.
FIRST_LINES, LAST_LINES = 20, 20


class Job(NamedTuple):
    """The tests of a class, and the files that its process writes."""

    tests: list[unittest.TestCase]
    results: BinaryIO
    output: BinaryIO


class Result(unittest.TestResult):
    """Prints each test when it ends, and writes its outcome to a file."""

    def __init__(self, shown: int, written: BinaryIO, quiet: bool) -> None:
        super().__init__()
        self._shown = shown
        self._written = written
        self._quiet = quiet
        self._began = time.monotonic()
        self._failed: list[str] = []
        self._skipped = ''

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self._began = time.monotonic()
        self._failed = []
        self._skipped = ''

    def addError(self, test: Any, err: Any) -> None:
        self._failed.append(_trace(*err))
        if not isinstance(test, unittest.TestCase):  # an error of setUpClass
            self._write(test)

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._failed.append('%s\n%s' % (subtest, _trace(*err)))

    def addSkip(self, test: Any, reason: str) -> None:
        self._skipped = 'skipped: ' + reason

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._failed.append('It succeeded, which was not expected.')

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        self._write(test)

    def _write(self, test: Any) -> None:
        outcome = ('FAILED' if self._failed else 'skipped' if self._skipped
                   else 'ok')
        if outcome != 'ok' or not self._quiet:
            os.write(self._shown, ('%s [%.1f s] ... %s\n' % (
                test.id(), time.monotonic() - self._began,
                self._skipped or outcome)).encode())
        self._written.write(json.dumps(
            [test.id(), outcome, self._failed]).encode() + b'\n')
        self._written.flush()


def _trace(kind: Any, err: Any, trace: Any) -> str:
    """Return the traceback of an error without the frames of unittest."""
    while trace and '__unittest' in trace.tb_frame.f_globals:
        trace = trace.tb_next
    return ''.join(traceback.format_exception(kind, err, trace))


def _shortened(text: str) -> str:
    """Return the first and the last lines of a text."""
    lines = [line[:300] for line in text.splitlines()]
    if len(lines) > FIRST_LINES + LAST_LINES:
        lines[FIRST_LINES:-LAST_LINES] = ['[...]']
    return '\n'.join(lines)


def tests(suite: Any) -> Iterator[unittest.TestCase]:
    for each in suite:
        if isinstance(each, unittest.TestCase):
            yield each
        else:
            yield from tests(each)


def _classes(patterns: list[str], skip: str) -> list[list[unittest.TestCase]]:
    """Return the matching tests by class, the slowest classes first."""
    found: dict[str, list[unittest.TestCase]] = {}
    for test in tests(unittest.defaultTestLoader.discover(
            'tests', top_level_dir='.')):
        name = test.id()
        if (any(re.search(each, name) for each in patterns or [''])
                and not (skip and re.search(skip, name))):
            found.setdefault(name.rpartition('.')[0], []).append(test)

    def rank(name: str) -> int:
        return next((number for number, module in enumerate(FIRST)
                     if name.startswith(module)), len(FIRST))

    return [found[name] for name in sorted(found, key=rank)]


def _start(job: Job, quiet: bool) -> int:
    """Start a process that runs a class; return its process ID."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    shown = os.dup(1)
    for number in (1, 2):
        os.dup2(job.output.fileno(), number)
    unittest.TestSuite(job.tests).run(Result(
        shown, job.results, quiet))
    # Python's usual exit would free all imported modules, which takes time.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _finished(job: Job, status: int) -> tuple[int, dict[str, str]]:
    """Return the number of passed tests of a class, and its failures."""
    job.results.seek(0)
    ended = [json.loads(line) for line in job.results]
    failed = {name: '\n'.join(texts) for name, outcome, texts in ended
              if outcome == 'FAILED'}
    if status:
        failed.update({name: 'Its process ended with status %d.' % status
                       for name in {test.id() for test in job.tests}
                       - {name for name, _, _ in ended}})
    if failed:
        job.output.seek(0)
        print(_shortened(job.output.read().decode(errors='replace')))
    return sum(outcome == 'ok' for _, outcome, _ in ended), failed


def main() -> int:
    parser = argparse.ArgumentParser(prog='tools.parallel')
    parser.add_argument('--jobs', type=int, required=True)
    parser.add_argument('--only', default='', help='all must match this')
    parser.add_argument('--skip', default='', help='and none may match this')
    parser.add_argument('--quiet', action='store_true',
                        help='show failures and skipped tests only')
    parser.add_argument('--count', type=argparse.FileType('w'),
                        default='/dev/null',
                        help='write how many passed and failed to this file')
    parser.add_argument('patterns', nargs='*', help='or all, of those')
    args = parser.parse_args()
    # A shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting = [tests for tests in _classes(args.patterns, args.skip)
               if re.search(args.only, tests[0].id())][::-1]
    if any(not each[0].id().startswith('tests.unit') for each in waiting):
        for each in (program.BREAK0, program.DAEMON):
            program.serve(each)
    # Exclude all objects from garbage collection: a collection writes to each
    # object, so the forked processes would copy all pages.
    gc.collect()
    gc.freeze()
    running: dict[int, Job] = {}
    passed, failed = 0, {}  # failed: reasons by test
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = Job(waiting.pop(), tempfile.TemporaryFile(),
                      tempfile.TemporaryFile())
            running[_start(job, args.quiet)] = job
        pid, status = os.wait()
        if pid in running:
            job = running.pop(pid)
            count, texts = _finished(job, status)
            passed += count
            failed.update(texts)
            job.results.close()
            job.output.close()
    for name, text in failed.items():
        print('%s:\n%s' % (name, _shortened(text)))
    for name in failed:
        print('FAILED: ' + name)
    print('%d passed, %d failed' % (passed, len(failed)))
    args.count.write('%d %d\n' % (passed, len(failed)))
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
