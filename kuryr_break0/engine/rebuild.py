# SPDX-License-Identifier: Apache-2.0

"""Rebuilds lost records from unclaimed routes and neighbours.

An unclaimed item belongs to a macvlan on the same parent if the macvlan has
the address of the item. If the address has a neighbour, the macvlan must also
have the MAC address of the neighbour.
"""

from __future__ import annotations

import dataclasses
from typing import Collection, Iterator

from kuryr_break0 import config
from kuryr_break0.engine.snapshot import items_of
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0 import model


def find(options: config.Options, snapshot: Snapshot,
         parents: Collection[Parent]) -> Iterator[model.Record]:
    """Yield a new record for each unclaimed item that belongs to a macvlan.

    If the record of an item is unreadable, the item is treated as unclaimed.

    :param parents: the parents with a break0 of this ledger; the pods of other
        parents have their records in another ledger
    """
    unclaimed: dict[model.IPAddress, Parent] = {}
    for parent in parents:
        if snapshot.contents.unreadable:
            unclaimed.update({item.dst: parent for item in items_of(
                parent, options.route_protocol)
                if item.dst in snapshot.contents.unreadable})
        unclaimed.update({item.dst: parent for item in parent.plan.unclaimed})
    macvlans = kernel.list_macvlans(options.proc_dirs) if unclaimed else ()
    # A macvlan that is down can have the MAC address of another pod, so
    # macvlans that are up are compared first.
    for macvlan in sorted(macvlans, key=lambda each: not each.link.up):
        for address in macvlan.addresses:
            place = unclaimed.get(address)
            if place is None or macvlan.parent != place.name:
                continue
            neighbour = place.neighbours.get(address)
            if neighbour is None or neighbour.mac == macvlan.link.mac:
                del unclaimed[address]
                yield dataclasses.replace(
                    _sibling(snapshot, macvlan), address=address,
                    mac=macvlan.link.mac, parent=macvlan.parent,
                    parent_index=kernel.find_ifindex(macvlan.parent),
                    netns=macvlan.netns, namespace=macvlan.namespace,
                    configured=None, bound_at=files.now())


def _sibling(snapshot: Snapshot, macvlan: kernel.Macvlan) -> model.Record:
    """Return a record of a macvlan, so that the caller can copy the owner.

    If no address of the macvlan has a record, return a new record with an
    adopted owner.
    """
    for record in snapshot.live.values():
        if (record.namespace is not None
                and record.namespace.is_same(macvlan.namespace)
                and record.owner.ifname == macvlan.link.name):
            return record
    return model.Record(macvlan.addresses[0], model.Owner.adopted(
        macvlan.namespace, macvlan.link.name), macvlan.parent)
