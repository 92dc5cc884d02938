# SPDX-License-Identifier: Apache-2.0

"""The node as the checks see it: a snapshot, and what changes meanwhile."""

from __future__ import annotations

from typing import Iterable, Optional

from kuryr_break0 import actual
from kuryr_break0 import config
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Record
from kuryr_break0 import snapshot
from kuryr_break0.snapshot import Parent


class Node:
    """The snapshot that all checks use, so that they agree.

    Whoever binds or unbinds has the lock from the first change to the last.
    So between reading ledger and kernel those are waited for who have it,
    and what is another record after than before is being changed: of that
    nothing is said. Nor of what no record claims, if there may have been one.

    :ivar seen: what was read
    :ivar changing: addresses that are just being bound or unbound
    :ivar lock_free: whether all who had the lock have let it go

    :param patience: seconds for which the lock is waited for
    :raises Break0Error: if state directory or kernel cannot be read
    """

    def __init__(self, options: config.Options, netlink: kernel.Netlink,
                 patience: float) -> None:
        self.options = options
        self.ledger = Ledger(options.state_dir)
        self._patience = patience
        self.seen = actual.read(options, self.ledger, netlink, patience)
        self.contents = self.seen.contents
        self.live = self.seen.live
        self.gone = self.seen.gone
        self.lock_free = True
        self.changing: set[IPAddress] = set()
        self.refresh()
        self.views = [ParentView(self, parent)
                      for parent in self.seen.parents.values()]

    def refresh(self) -> None:
        """Note what is being changed, or was, since the records were read.

        To be called each time after reading the kernel.
        """
        self.lock_free = (self.lock_free
                          and self.ledger.is_free_within(self._patience))
        before, after = self.contents.claims, self.ledger.contents().claims
        self.changing |= {
            address for address in before.keys() | after.keys()
            if _without_pod_side(before.get(address, ()))
            != _without_pod_side(after.get(address, ()))}

    def settled(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        """Return those that nobody is just changing, in their order."""
        return [address for address in addresses
                if address not in self.changing]

    def unclaimed(self, address: IPAddress) -> bool:
        """Return whether no record says whose an address is."""
        return self.seen.is_steady and not (
            address in self.contents.claims or address in self.changing
            or address in self.contents.unreadable)

    def pods(self) -> list[list[Record]]:
        """Return the records of each pod that nobody is just changing."""
        return snapshot.by_interface(
            record for record in self.live.values()
            if record.address not in self.changing)


class ParentView:
    """One parent of the node, and its break0.

    :ivar node: the whole
    :ivar seen: what was read of it
    """

    def __init__(self, node: Node, parent: Parent) -> None:
        self.node = node
        self.seen = parent
        self.options = node.options
        self.name = parent.device
        self.link = parent.present
        self.parent_name = parent.name
        self.parent = parent.parent
        self.live = parent.live
        self.desired = parent.desired
        self.plan = parent.plan
        self.routes = parent.routes
        self.neighbours = parent.neighbours
        self.known = parent.node
        self.index = parent.index

    @property
    def changing(self) -> set[IPAddress]:
        return self.node.changing

    def refresh(self) -> None:
        self.node.refresh()

    def settled(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        return self.node.settled(addresses)

    def unclaimed(self, address: IPAddress) -> bool:
        return self.node.unclaimed(address)

    def pods(self) -> list[list[Record]]:
        """Return the records of each pod on this parent."""
        return snapshot.by_interface(
            record for record in self.live.values()
            if record.address not in self.changing)

    def sysctl(self, path: str, *devices: Optional[str]) -> int:
        """Return the largest value that interfaces have of a sysctl.

        :param path: below /proc/sys/net, with ``%s`` for the interface
        """
        return max(kernel.read_sysctl(path % device) or 0
                   for device in devices if device is not None)


def _without_pod_side(claims: Iterable[Record]) -> list[object]:
    # That is written a little later, and changes nothing of the rest.
    return [(claim.owner, claim.mac, claim.bound_at) for claim in claims]
