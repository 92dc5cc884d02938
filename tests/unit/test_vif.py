# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pickle
from typing import Any
import unittest

from os_vif.objects import base as osv_base

from kuryr_break0.kuryr import vif
from tests.support import kuryr


def in_order(primitive: Any) -> Any:
    """Return a primitive with its set of changed fields in a fixed order."""
    if isinstance(primitive, list):
        return [in_order(each) for each in primitive]
    if not isinstance(primitive, dict):
        return primitive
    return {key: sorted(value) if key == 'versioned_object.changes'
            else in_order(value) for key, value in primitive.items()}


class TestVIF(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.written = kuryr.macvlan_vif(
            '100.75.30.71', '100.75.30.72', 'fd00::71',
            subnets=['100.75.30.0/24', 'fd00::/64']).obj_to_primitive()
        self.vif = vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', self.written)

    def test_it_is_written_unchanged(self) -> None:
        self.assertEqual('VIFMacvlanBreak0', type(self.vif).__name__)
        again = self.vif.obj_to_primitive()
        for primitive in (again, self.written):
            primitive.pop('versioned_object.changes', None)
        self.assertEqual(in_order(self.written), in_order(again))

    def test_it_travels_between_processes(self) -> None:
        # kuryr-daemon passes the VIF through a multiprocessing Manager.
        there = pickle.loads(pickle.dumps(self.vif))
        self.assertIs(vif.VIFMacvlanBreak0, type(there))
        self.assertEqual(self.vif.vif_name, there.vif_name)
        self.assertEqual(vif.addresses(self.vif), vif.addresses(there))

    def test_importing_it_changes_nothing(self) -> None:
        read = osv_base.VersionedObject.obj_from_primitive(self.written)
        self.assertEqual('VIFMacvlanNested', type(read).__name__)

    def test_all_its_addresses(self) -> None:
        self.assertEqual(['100.75.30.71', '100.75.30.72', 'fd00::71'],
                         [str(each) for each in vif.addresses(self.vif)])
