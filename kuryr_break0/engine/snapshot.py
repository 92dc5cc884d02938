# SPDX-License-Identifier: Apache-2.0

"""The snapshot of ledger and kernel at one moment.

The reconciler, status, metrics and doctor all use this snapshot, so that their
results agree. :mod:`kuryr_break0.engine.actual` reads the snapshot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from typing import Any, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0.engine.plan import Plan
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0 import model
from kuryr_break0 import policy


@dataclasses.dataclass(frozen=True)
class Parent:
    """An interface with pods on it, and its break0.

    :ivar device: name of its break0
    :ivar parent: the interface; None if it does not exist
    :ivar present: the interface with the name of its break0, perhaps made by
        another program; None if there is no such interface
    :ivar link: its break0; None if it is missing or unusable
    :ivar conflict: the error if the parent or the break0 cannot be used; None
        otherwise
    :ivar ownership: relation of its break0 to this ledger
    :ivar differences: kind and text of each
        :class:`~kuryr_break0.break0.device.Difference` of its break0
    :ivar guard: defect of the guard of its break0; None if there is no defect,
        or if no pod is on the parent
    :ivar is_guarded: whether the kernel has the table of the guard of its
        break0
    :ivar live: newest claim of an existing sandbox on each address
    :ivar desired: neighbours and routes that the addresses of ``live`` must
        have
    :ivar plan: the changes that turn the present items into the desired ones
    :ivar routes, neighbours, addresses: present items on its break0
    :ivar node: node addresses that its pods must know; None without break0
    :ivar astray: addresses with a route through break0 that the kernel does
        not use. The value describes the route that the kernel uses instead,
        and contains the arguments of ``ip route get`` that show that route
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
    is_guarded: bool
    live: dict[model.IPAddress, model.Record]
    desired: dict[model.IPAddress, tuple[model.Entry, ...]]
    plan: Plan
    routes: dict[model.IPAddress, model.HostRoute]
    neighbours: dict[model.IPAddress, model.Neighbour]
    addresses: tuple[model.IPAddress, ...]
    node: Optional[model.NodeAddresses]
    astray: dict[model.IPAddress, tuple[str, str]]

    @property
    def other(self) -> Optional[Alias]:
        """Return the other ledger that its break0 belongs to, or None."""
        return (Alias.parse(self.link.alias) if self.link is not None
                and self.ownership.is_foreign else None)

    @functools.cached_property
    def has_ipv6(self) -> bool:
        """Return whether a pod on the parent has an IPv6 address."""
        return any(address.version == 6 for address in self.live)

    def is_configured(self, record: model.Record) -> bool:
        """Return whether a pod was configured with the current node addresses.

        The method compares only the record. The pod may have changed since.
        """
        return self.node is None or record.configured == self.node.digest

    @property
    def index(self) -> int:
        """Return the ifindex of its break0; 0 without one."""
        return self.link.index if self.link is not None else 0


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Ledger and kernel at one moment, with the results of comparing them.

    :ivar contents: records of the ledger
    :ivar is_steady: whether no bind or unbind took place during the read. A
        bind or unbind can cause differences between records and kernel
    :ivar identity: identity of the ledger; None if it was never used
    :ivar parents: parents of pods or of a break0, by name
    :ivar facts: addresses that the node itself uses
    :ivar routes: routes of the node
    :ivar live: newest claim of an existing sandbox on each address
    :ivar rivals: older claims of existing sandboxes, by address
    :ivar gone: claims of sandboxes that are proven not to exist
    :ivar unjudged: claims of sandboxes that may have ended, with the reason
        why their state is unknown
    :ivar refused: reason for refusal, by address
    :ivar name_conflict: the interface named ``[break0] device``, if it is not
        the break0 of one of ``parents``; otherwise None
    :ivar unclaimed: parents of unclaimed routes and neighbours, by address
    """

    options: config.Options
    contents: Contents
    is_steady: bool
    identity: Optional[Identity]
    parents: dict[str, Parent]
    facts: policy.Facts
    routes: kernel.Routes
    live: dict[model.IPAddress, model.Record]
    rivals: dict[model.IPAddress, tuple[model.Record, ...]]
    gone: tuple[model.Record, ...]
    unjudged: dict[model.Record, str]
    refused: dict[model.IPAddress, str]
    name_conflict: Optional[kernel.Link]

    @property
    def unclaimed(self) -> dict[model.IPAddress, Parent]:
        return {item.dst: parent for parent in self.parents.values()
                for item in parent.plan.unclaimed}

    @property
    def is_lost(self) -> bool:
        """Return whether a break0 belongs to a lost ledger.

        The lost ledger had the same directory as the present ledger.
        """
        return any(parent.ownership is Ownership.LOST
                   for parent in self.parents.values())

    def parent_of(self, address: model.IPAddress) -> Optional[Parent]:
        """Return the parent of an address; None if it is unknown."""
        record = self.live.get(address)
        if record is not None:
            return self.parents.get(record.parent)
        return self.unclaimed.get(address)

    def interfaces(self) -> list[list[model.Record]]:
        """Return the records of each interface of each pod."""
        return by_interface(self.live.values())


def by_interface(records: Iterable[model.Record]) -> list[list[model.Record]]:
    """Group records by interface.

    The records of a group can have different owners, because the owner of a
    rebuilt record has no container id. All records of a group have the same
    parent. If an interface was created again on another parent, its older
    records are in another group.
    """
    interfaces: dict[Any, list[model.Record]] = {}
    for record in records:
        interfaces.setdefault((
            record.namespace or record.owner.container_id,
            record.owner.ifname, record.parent), []).append(record)
    return list(interfaces.values())


def items_of(parent: Parent, protocol: int) -> list[model.Entry]:
    """List the routes and neighbours with our protocol number on a break0."""
    items: list[model.Entry] = [*parent.routes.values(),
                                *parent.neighbours.values()]
    return [item for item in items if item.protocol == protocol]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disable the garbage collection of Python inside a ``with`` block.

    The objects of a snapshot live until the end of a sync. A search for
    garbage among these objects takes up to half of the time of a sync, and
    finds nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
