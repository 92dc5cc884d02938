# SPDX-License-Identifier: Apache-2.0

"""Ledger and kernel at one moment.

The reconciler, status, metrics and doctor all use this, so that they agree.
:mod:`kuryr_break0.actual` reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Record
from kuryr_break0.plan import Plan
from kuryr_break0.policy import Facts


@dataclasses.dataclass(frozen=True)
class Parent:
    """An interface with pods on it, and its break0.

    :ivar device: the name of its break0
    :ivar parent: None if there is no such interface
    :ivar present: the interface that has the name of its break0, if any
    :ivar link: its break0; None if there is none that can be used
    :ivar conflict: why it cannot be used, or the parent is not there
    :ivar ownership: the relation of its break0 to this ledger
    :ivar differences: what its break0 is, and should not be, each with the
        kind of a :class:`~kuryr_break0.device.Difference`
    :ivar guard: what is wrong with the table of its guard, if anything
    :ivar live: the records of its pods, the newest claim on each address
    :ivar desired: the neighbours and routes that these addresses must have
    :ivar plan: the difference to what they have
    :ivar routes, neighbours, addresses: what its break0 has
    :ivar node: what its pods must know of the node; None without break0
    :ivar astray: the addresses that the kernel does not reach by their
        routes: how it does, and what to show it with ``ip route get``
    """

    name: str
    device: str
    parent: Optional[kernel.Link]
    present: Optional[kernel.Link]
    link: Optional[kernel.Link]
    conflict: Optional[exceptions.Break0Error]
    ownership: Ownership
    differences: tuple[tuple[str, str], ...]
    guard: Optional[str]
    live: dict[IPAddress, Record]
    desired: dict[IPAddress, tuple[Entry, ...]]
    plan: Plan
    routes: dict[IPAddress, HostRoute]
    neighbours: dict[IPAddress, Neighbour]
    addresses: tuple[IPAddress, ...]
    node: Optional[NodeAddresses]
    astray: dict[IPAddress, tuple[str, str]]

    @property
    def other(self) -> Optional[Alias]:
        """Return the ledger that its break0 belongs to, if not this one."""
        return (Alias.parse(self.link.alias) if self.link is not None
                and self.ownership.is_foreign else None)

    @property
    def index(self) -> int:
        """ifindex of its break0; 0, the kernel's number for none."""
        return self.link.index if self.link is not None else 0


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What was read at one moment, and what follows from it.

    :ivar is_steady: whether nothing was being bound or unbound meanwhile
    :ivar identity: of the ledger; None if it was never used
    :ivar parents: by their names
    :ivar facts: the addresses that the node itself uses
    :ivar live: the newest claim of an existing sandbox on each address
    :ivar rivals: earlier claims of sandboxes that exist too
    :ivar gone: claims of sandboxes that are proven not to exist
    :ivar unjudged: those of sandboxes that may exist or not, and why that
        cannot be found out
    :ivar refused: what is against which address
    :ivar stranger: an interface named as [break0] device that is none
    :ivar unclaimed: addresses with routes or neighbours of ours on a break0,
        and no record
    """

    options: config.Options
    contents: Contents
    is_steady: bool
    identity: Optional[Identity]
    parents: dict[str, Parent]
    facts: Facts
    routes: kernel.Routes
    live: dict[IPAddress, Record]
    rivals: dict[IPAddress, tuple[Record, ...]]
    gone: tuple[Record, ...]
    unjudged: dict[Record, str]
    refused: dict[IPAddress, str]
    stranger: Optional[kernel.Link]

    @property
    def unclaimed(self) -> dict[IPAddress, Parent]:
        return {item.dst: parent for parent in self.parents.values()
                for item in parent.plan.unclaimed}

    @property
    def is_lost(self) -> bool:
        """Return whether the ledger that bound pods here was lost."""
        return any(parent.ownership is Ownership.LOST
                   for parent in self.parents.values())

    def parent_of(self, address: IPAddress) -> Optional[Parent]:
        """Return the parent of an address; None if it is not known."""
        record = self.live.get(address)
        if record is not None:
            return self.parents.get(record.parent)
        return self.unclaimed.get(address)

    def interfaces(self) -> list[list[Record]]:
        """Return the records of each interface of each pod."""
        return by_interface(self.live.values())


def by_interface(records: Iterable[Record]) -> list[list[Record]]:
    """Return records by the interface that they are of.

    Its owners can differ, where a record was rebuilt; and its parents, while
    it is made again on another one.
    """
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault((
            record.namespace or record.owner.container_id,
            record.owner.ifname, record.parent), []).append(record)
    return list(found.values())


def items_of(parent: Parent, protocol: int) -> list[Entry]:
    """List our routes and neighbours on a break0."""
    items: list[Entry] = [*parent.routes.values(), *parent.neighbours.values()]
    return [item for item in items if item.protocol == protocol]
