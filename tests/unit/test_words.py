# SPDX-License-Identifier: Apache-2.0

"""Texts of the project have few unclear phrases; see CONTRIBUTING.rst."""

from __future__ import annotations

import pathlib
import unittest

from tests.support import words

ROOT = pathlib.Path(__file__).parents[2]
#: Largest allowed numbers of hidden nouns and odd beginnings per 1,000 words,
#: by folders. tests/support/words.py defines both terms.
BOUNDS: dict[tuple[str, ...], tuple[float, float]] = {
    ('kuryr_break0',): (0.6, 0.2),
    ('README.rst', 'CONTRIBUTING.rst', 'HACKING.rst', 'doc/source'):
        (0.4, 0.2),
    ('tests', 'tools'): (0.8, 0.2),
}


class TestBounds(unittest.TestCase):

    def test_each_folder_is_within_its_bounds(self) -> None:
        for names, bounds in BOUNDS.items():
            counted = words.count_all([ROOT / name for name in names])
            with self.subTest(names):
                self.assertGreater(counted.words, 10000)
                for actual, bound in zip(counted.per_thousand(), bounds):
                    self.assertLessEqual(
                        actual, bound, 'Run python -m tests.support.words %s, '
                        'and reword these sentences' % ' '.join(names))


class TestCount(unittest.TestCase):

    def test_comments_and_strings_of_python(self) -> None:
        source = ('"""Return what is left."""\n# Of two routes,\n'
                  '# the later.\n\nx = "what"  # A route. But not now.\n\n'
                  'def test_what_is_left():\n    pass\n')
        self.assertEqual(
            ['Return what is left.', 'Of two routes,\nthe later.',
             'test what is left', 'A route. But not now.'],
            list(words.python_texts(source)))
        self.assertEqual(words.Count(18, 2, 2), sum(
            map(words.count, words.python_texts(source)), words.Count()))

    def test_prose_without_literals(self) -> None:
        source = ('Title\n=====\n\nRun ``who`` so::\n\n    what is it\n\n'
                  '.. code-block:: sh\n\n   what\n\n.. list-table::\n'
                  '   :header-rows: 1\n\n   * - First cell\n'
                  '     - Those that\n       remain\n\n- An item\n')
        self.assertEqual(
            ['Title', 'Run literal so:', 'First cell', 'Those that\n'
             '       remain', 'An item'], list(words.prose_texts(source)))
        self.assertEqual(words.Count(1 + 3 + 2 + 3 + 2, 1, 1), sum(
            map(words.count, words.prose_texts(source)), words.Count()))
