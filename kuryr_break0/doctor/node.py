# SPDX-License-Identifier: Apache-2.0

"""The node as the checks see it: a snapshot, and what changes meanwhile."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional, Sequence, TypeVar

from kuryr_break0 import actual
from kuryr_break0 import config
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Record
from kuryr_break0 import snapshot

_T = TypeVar('_T')
#: Iterates over a sequence, and may show how far it is.
Over = Callable[[Sequence[Any]], Iterable[Any]]


class Node:
    """The snapshot that all checks use, so that they agree.

    Whoever binds or unbinds has the lock from the first change to the last.
    Addresses whose record differs between two reads of the ledger are in
    flight: nothing is said of them.

    :ivar seen: what was read
    :ivar live: the newest claim on each address
    :ivar useless: the break0s by which nothing can be reached
    :ivar changing: addresses that are just being bound or unbound
    :ivar lock_free: whether all who had the lock have let it go

    :param patience: seconds for which the lock is waited for
    :raises Break0Error: if state directory or kernel cannot be read
    """

    def __init__(self, options: config.Options, netlink: kernel.Netlink,
                 patience: float, over: Over = iter) -> None:
        self.options = options
        self.ledger = Ledger(options.state_dir)
        self.over = over
        self._patience = patience
        self.seen = actual.read(options, self.ledger, netlink, patience)
        self.live = self.seen.live
        self.useless: set[str] = set()
        self.lock_free = True
        self.changing: set[IPAddress] = set()
        self.refresh()

    def refresh(self) -> None:
        """Note what is being changed, or was, since the records were read.

        To be called each time after reading the kernel.
        """
        self.lock_free = (self.lock_free
                          and self.ledger.is_free_within(self._patience))
        before, after = (self.seen.contents.claims,
                         self.ledger.contents().claims)
        self.changing |= {
            address for address in before.keys() | after.keys()
            if _without_pod_side(before.get(address, ()))
            != _without_pod_side(after.get(address, ()))}

    def settled(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        """Return those that nobody is just changing, in their order."""
        return [address for address in addresses
                if address not in self.changing]

    def pods(self, parent: Optional[snapshot.Parent] = None
             ) -> list[list[Record]]:
        """Return the records of each pod that nobody is just changing."""
        live = self.live if parent is None else parent.live
        return snapshot.by_interface(
            live[address] for address in self.settled(live))


def sample(items: Sequence[_T], size: int) -> list[_T]:
    """Return so many of a sequence at most, evenly over all of it."""
    if len(items) <= size:
        return list(items)
    return [items[number * len(items) // size] for number in range(size)]


def largest_sysctl(path: str, *devices: Optional[str]) -> int:
    """Return the largest value that interfaces have of a sysctl.

    That of ``all`` and of the interface is what the kernel takes for many.

    :param path: below /proc/sys/net, with ``%s`` for the interface
    """
    return max(kernel.read_sysctl(path % device) or 0
               for device in devices if device is not None)


def _without_pod_side(claims: Iterable[Record]) -> list[object]:
    # That is written a little later, and changes nothing of the rest.
    return [(claim.owner, claim.mac, claim.bound_at) for claim in claims]
