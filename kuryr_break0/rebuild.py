# SPDX-License-Identifier: Apache-2.0

"""Finds out whose what is that the kernel holds and no record claims.

A macvlan on the same parent with the address, and with the MAC address of its
neighbour if there is one, is what was bound.
"""

from __future__ import annotations

import dataclasses
from typing import Collection, Iterator

from kuryr_break0 import config
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.snapshot import items_of
from kuryr_break0.snapshot import Parent
from kuryr_break0.snapshot import Snapshot


def find(options: config.Options, seen: Snapshot,
         parents: Collection[Parent]) -> Iterator[Record]:
    """Return the records that are missing.

    :param parents: those whose break0 is of this ledger; what another one
        has bound is recorded there
    """
    wanted: dict[IPAddress, Parent] = {}
    for parent in parents:
        if seen.contents.unreadable:
            wanted.update({item.dst: parent for item in items_of(
                parent, options.route_protocol)
                if item.dst in seen.contents.unreadable})
        wanted.update({item.dst: parent for item in parent.plan.unclaimed})
    found = kernel.list_macvlans(options.proc_dirs) if wanted else ()
    # Another one can have the MAC address of a pod as long as it is down.
    for macvlan in sorted(found, key=lambda each: not each.link.up):
        for address in macvlan.addresses:
            place = wanted.get(address)
            if place is None or macvlan.parent != place.name:
                continue
            neighbour = place.neighbours.get(address)
            if neighbour is None or neighbour.mac == macvlan.link.mac:
                del wanted[address]
                yield dataclasses.replace(
                    _sibling(seen, macvlan), address=address,
                    mac=macvlan.link.mac, parent=macvlan.parent,
                    parent_index=kernel.find_ifindex(macvlan.parent),
                    netns=macvlan.netns, namespace=macvlan.namespace,
                    configured=None, bound_at=files.now())


def _sibling(seen: Snapshot, macvlan: kernel.Macvlan) -> Record:
    """Return a record of the same interface, which says whose it is."""
    for record in seen.live.values():
        if (record.namespace is not None
                and record.namespace.is_same(macvlan.namespace)
                and record.owner.ifname == macvlan.link.name):
            return record
    return Record(macvlan.addresses[0], Owner.adopted(
        macvlan.namespace, macvlan.link.name), macvlan.parent)
