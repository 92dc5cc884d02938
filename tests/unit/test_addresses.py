# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import pickle
import unittest

from kuryr_break0 import model


class TestAddresses(unittest.TestCase):

    def test_like_the_standard_library(self) -> None:
        for text in '10.1.2.3', 'fd00::1', '::', 'fe80::1%eth0':
            with self.subTest(text):
                own = model.address_from_text(text)
                other = ipaddress.ip_address(text)
                self.assertEqual(other, own)
                self.assertEqual(hash(other), hash(own))
                self.assertEqual((text, repr(other)), (str(own), repr(own)))
                self.assertEqual(1, {other: 1}[own])
                self.assertEqual(1, {own: 1}[other])
                # Python 3.11.2 loses the zone of a pickled address.
                self.assertEqual(*(pickle.loads(pickle.dumps(each))
                                   for each in (other, own)))
                self.assertEqual(other + 1, own + 1)
                if '%' not in text:
                    self.assertIs(own, model.address_from_bytes(own.packed))

    def test_none(self) -> None:
        for text in '', '10.1.2', '10.1.2.03', 'fd00::1/64':
            with self.assertRaises(ValueError):
                model.address_from_text(text)
