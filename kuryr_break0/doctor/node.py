# SPDX-License-Identifier: Apache-2.0

"""The snapshot for all checks, and addresses that change during the checks."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional, Sequence, TypeVar

from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine import snapshot
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model

_T = TypeVar('_T')
#: Iterates over a sequence, and may show the progress.
Over = Callable[[Sequence[Any]], Iterable[Any]]


class Node:
    """The snapshot for all checks.

    A bind or unbind holds the lock from its first change to its last. If two
    reads of the ledger return different records for an address, the address
    is being bound or unbound, and is not reported.

    :ivar snapshot: the snapshot
    :ivar live: the newest claim on each address
    :ivar useless: the break0s with a fault that stops all traffic
    :ivar changing: addresses that are being bound or unbound
    :ivar lock_free: whether the lock became free in time at each refresh

    :param patience: seconds to wait for the lock
    :raises Break0Error: if state directory or kernel cannot be read
    """

    def __init__(self, options: config.Options, netlink: kernel.Netlink,
                 patience: float, over: Over = iter) -> None:
        self.options = options
        self.ledger = Ledger(options.state_dir)
        self.over = over
        self._patience = patience
        self.snapshot = actual.read(options, self.ledger, netlink, patience)
        self.live = self.snapshot.live
        self.useless: set[object] = set()
        self.lock_free = True
        self.changing: set[model.IPAddress] = set()
        self.refresh()

    def refresh(self) -> None:
        """Find the addresses whose records changed since the snapshot.

        Call this after each read of the kernel.
        """
        self.lock_free = (self.lock_free
                          and self.ledger.is_free_within(self._patience))
        before, after = (self.snapshot.contents.claims,
                         self.ledger.contents().claims)
        self.changing |= {
            address for address in before.keys() | after.keys()
            if _without_pod_side(before.get(address, ()))
            != _without_pod_side(after.get(address, ()))}

    def settled(self, addresses: Iterable[model.IPAddress]
                ) -> list[model.IPAddress]:
        """Return the addresses that are not being changed, in their order."""
        return [address for address in addresses
                if address not in self.changing]

    def pods(self, parent: Optional[snapshot.Parent] = None
             ) -> list[list[model.Record]]:
        """Return the records of each pod that is not being changed."""
        live = self.live if parent is None else parent.live
        return snapshot.by_interface(
            live[address] for address in self.settled(live))


def sample(items: Sequence[_T], size: int) -> list[_T]:
    """Return at most `size` items, evenly spread over a sequence."""
    if len(items) <= size:
        return list(items)
    return [items[number * len(items) // size] for number in range(size)]


def _without_pod_side(claims: Iterable[model.Record]) -> list[object]:
    # The pod side is left out, because a bind records it last.
    return [(claim.owner, claim.mac, claim.bound_at) for claim in claims]
