# SPDX-License-Identifier: Apache-2.0

"""The comparison tells whether direct binding knows the installed Kuryr."""

from __future__ import annotations

from typing import Iterator
import unittest
from unittest import mock

from kuryr_break0.kuryr import comparison


class TestComparison(unittest.TestCase):

    def setUp(self) -> None:
        comparison.compare.cache_clear()
        self.addCleanup(comparison.compare.cache_clear)

    def changed(self, old: str, new: str) -> comparison.Comparison:
        """Compare the installed Kuryr after a replacement in its code."""
        read = comparison._read
        texts = {path: read(path) for path in comparison.FUNCTIONS}
        self.assertTrue(any(old in text for text in texts.values()), old)
        with mock.patch.object(comparison, '_read', lambda path: texts[
                path].replace(old, new)):
            return comparison.compare()

    def test_the_installed_release(self) -> None:
        found = comparison.compare()
        self.assertTrue(found.is_known, found)
        self.assertRegex(found.text, r'Kuryr \d+\.0\.0')

    def changes(self) -> Iterator[tuple[str, str]]:
        yield 'iface.up()', 'iface.down()'
        yield "dst='default'", "dst='10.0.0.0/8'"
        yield "f'Using interface {name}", "f'Taking interface {name}"

    def test_a_function_that_was_changed(self) -> None:
        for old, new in self.changes():
            with self.subTest(old=old):
                comparison.compare.cache_clear()
                found = self.changed(old, new)
                self.assertFalse(found.is_known)
                self.assertIn('it differs from Kuryr', found.text)

    def test_code_that_is_not_replaced_does_not_count(self) -> None:
        self.assertTrue(self.changed("VLAN_KIND = 'vlan'",
                                     "VLAN_KIND = 'other'").is_known)

    def test_a_source_that_cannot_be_read(self) -> None:
        for old, new in (('def connect', 'def def connect'), ('', '\0')):
            comparison.compare.cache_clear()
            found = self.changed(old, new)
            self.assertFalse(found.is_known)
            self.assertIn('is not readable: ', found.text)
        comparison.compare.cache_clear()
        with mock.patch.object(comparison, '_read', side_effect=OSError(
                'there is no module')):
            self.assertEqual((False, 'its source is not readable: there is no '
                              'module'), comparison.compare())
