# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
import unittest

from tools import parallel


class Sample:
    """Test classes to run, nested so that unittest does not collect them."""

    class Outcomes(unittest.TestCase):

        def test_fails(self) -> None:
            print('printed before')
            self.fail('for this reason')

        def test_passes(self) -> None:
            pass

        def test_raises(self) -> None:
            raise OSError('an error')

        def test_skips(self) -> None:
            self.skipTest('lacks something')

        def test_subtests(self) -> None:
            for number in range(3):
                with self.subTest(number=number):
                    self.assertNotEqual(1, number)

    class Unprepared(unittest.TestCase):

        @classmethod
        def setUpClass(cls) -> None:
            raise OSError('not prepared')

        def test_passes(self) -> None:
            pass

    class Killed(unittest.TestCase):

        def test_before(self) -> None:
            pass

        def test_itself(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)


class TestParallel(unittest.TestCase):

    def run_class(self, kind: type[unittest.TestCase]
                  ) -> tuple[int, dict[str, str], str]:
        """Return the number of passes, the failures, and the output."""
        with tempfile.TemporaryFile() as results, \
                tempfile.TemporaryFile() as output:
            job = parallel.Job(list(parallel.tests(
                unittest.defaultTestLoader.loadTestsFromTestCase(kind))),
                results, output)
            status = os.waitpid(parallel._start(job, True), 0)[1]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                passed, failed = parallel._finished(job, status)
        return passed, {name.rpartition('.')[2]: text
                        for name, text in failed.items()}, printed.getvalue()

    def test_each_outcome(self) -> None:
        passed, failed, printed = self.run_class(Sample.Outcomes)
        self.assertEqual(1, passed)
        self.assertEqual(['test_fails', 'test_raises', 'test_subtests'],
                         sorted(failed))
        self.assertIn('for this reason', failed['test_fails'])
        self.assertIn('in test_fails\n', failed['test_fails'].split('File')[1])
        self.assertIn('an error', failed['test_raises'])
        self.assertIn('number=1', failed['test_subtests'])
        self.assertIn('printed before', printed)

    def test_long_text(self) -> None:
        lines = ['where', *map(str, range(1000)), 'x' * 1000]
        found = parallel._shortened('\n'.join(lines)).splitlines()
        self.assertEqual((lines[:20], '[...]', lines[-20:-1]),
                         (found[:20], found[20], found[21:-1]))
        self.assertEqual('x' * 300, found[-1])
        self.assertEqual('a\nb', parallel._shortened('a\nb'))

    def test_a_class_that_cannot_be_prepared(self) -> None:
        passed, failed, _ = self.run_class(Sample.Unprepared)
        self.assertEqual(0, passed)
        self.assertIn('not prepared', ''.join(failed.values()))

    def test_a_process_that_is_killed(self) -> None:
        passed, failed, _ = self.run_class(Sample.Killed)
        self.assertEqual((1, ['test_itself']), (passed, list(failed)))
