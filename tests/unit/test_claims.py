# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any, Optional
import unittest

from kuryr_break0.ledger import claims
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record

ADDRESS = ipaddress.ip_address('10.0.0.71')
HERE, THERE = NamespaceId(4, 100, 1000), NamespaceId(4, 101, 1001)
MAC, OTHER_MAC = 'fa:16:3e:00:00:01', 'fa:16:3e:00:00:02'


def claim(container: str, namespace: Optional[NamespaceId] = HERE,
          bound_at: float = 1, **fields: Any) -> Record:
    return Record(ADDRESS, Owner(container, 'eth0'), 'eth0',
                  fields.pop('mac', MAC), namespace=namespace,
                  bound_at=bound_at, **fields)


class TestAdd(unittest.TestCase):

    def test_each_kind_of_claim_before(self) -> None:
        new = claim('new', HERE, 5)
        discovered = claim('discovered-1000', origin=Origin.DISCOVERED)
        rebuilt = claim(Owner.ADOPTED + '1000')
        for name, before, after, rivals, is_handed_over in (
                ('none', (), (new,), (), False),
                ('its own', (claim('new'),), (new,), (), False),
                ('its own later one', (claim('new', bound_at=9),),
                 (claim('new', bound_at=9),), (), False),
                ('one discovered there', (discovered,), (new,), (),
                 False),
                ('one discovered elsewhere',
                 (dataclasses.replace(discovered, namespace=THERE),),
                 (new, dataclasses.replace(discovered, namespace=THERE)),
                 (dataclasses.replace(discovered, namespace=THERE),), True),
                ('one rebuilt there', (rebuilt,), (new,), (), False),
                ('one adopted there',
                 (dataclasses.replace(rebuilt, origin=Origin.KURYR),),
                 (new, dataclasses.replace(rebuilt, origin=Origin.KURYR)),
                 (dataclasses.replace(rebuilt, origin=Origin.KURYR),), True),
                ('another one', (claim('old', THERE),),
                 (new, claim('old', THERE)), (claim('old', THERE),), True),
                ('its own, and an earlier one',
                 (claim('new'), claim('old', THERE)),
                 (new, claim('old', THERE)), (claim('old', THERE),), False),
                ('a gone one', (claim('gone', THERE),), (new,), (),
                 True),
                ('one without a provable end', (claim('old', None),),
                 (new,), (claim('old', None),), True)):
            with self.subTest(before=name):
                self.assertEqual(
                    claims.Addition(after, rivals), claims.add(
                        new, before, lambda each: (
                            each.owner.container_id == 'gone')))
                self.assertEqual(is_handed_over, claims.Transition(
                    before, after).is_handed_over)


class TestIsOwn(unittest.TestCase):

    def test_each_kind_of_evidence(self) -> None:
        adopted = claim('adopted-1000')
        by_inode = claim('adopted-100')
        owner = Owner('new', 'eth0')
        for name, expected, found, arguments in (
                ('owner', True, claim('new'), (owner, None, None)),
                ('another interface', False, claim('new'),
                 (Owner('new', 'eth1'), HERE, MAC)),
                ('another container', False, claim('old'),
                 (owner, HERE, MAC)),
                ('adopted', True, adopted, (owner, HERE, MAC)),
                ('adopted, by inode', True, by_inode, (owner, HERE, MAC)),
                ('another MAC address', False, adopted,
                 (owner, HERE, OTHER_MAC)),
                ('no MAC address', False, adopted, (owner, HERE, None)),
                ('another namespace', False, adopted, (owner, THERE, MAC)),
                ('no namespace', False, adopted, (owner, None, MAC)),
                ('that bind', True, claim('new', bound_at=3),
                 (owner, None, None, 3)),
                ('another bind', False, claim('new', bound_at=3),
                 (owner, None, None, 2))):
            with self.subTest(case=name):
                self.assertEqual(expected, claims.is_own(found, *arguments))
