# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""The node at one time: what the ledger says, and what the kernel holds."""

from __future__ import annotations

from typing import Iterator, Optional

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from kuryr_break0 import netlink
from kuryr_break0.policy import Look
from kuryr_break0.policy import parent_of
from kuryr_break0.policy import Policy


class Node:
    """What all checks look at, so that they speak of the same.

    Whoever binds or unbinds has the lock from the first change to the last.
    So between reading ledger and kernel those are waited for who have it,
    and what is another entry after than before is being changed: of that
    nothing is said. Nor of what no entry claims, if there may have been one.

    :ivar contents: of the state directory
    :ivar live: the entries whose sandbox exists
    :ivar gone: the others
    :ivar changing: addresses that are just being bound or unbound
    :ivar parent_name: the interface that the pods are on, or are to be;
        None where neither pods nor options say
    :ivar parent: the same as the kernel has it
    :ivar desired: what the addresses are to have
    :ivar refused: what is against which address
    :ivar plan: the difference to what they have
    :ivar peer: what pods are to know of the node; None without break0
    :ivar lock_free: whether all who had the lock have let it go

    :param patience: seconds for which the lock is waited for
    :raises Break0Error: if state directory or kernel cannot be read
    """

    def __init__(self, options: config.Options, kernel: netlink.Kernel,
                 patience: float) -> None:
        self.options = options
        self.policy = Policy(options)
        self.ledger = Ledger(options.state_dir, options.lock_timeout)
        self._patience = patience
        self.contents: Contents
        self.contents, self.look, self._steady = self.ledger.beside(
            self.ledger.look,
            lambda: Look(kernel, kernel.link(options.device)), patience)
        entries = {entry.address: entry for entry in self.contents.entries}
        self.lock_free = True
        self.changing: set[IPAddress] = set()
        self.refresh()
        self.gone = [entry for entry in entries.values()
                     if entry.sandbox_gone]
        self.live = {entry.address: entry for entry in entries.values()
                     if not entry.sandbox_gone}
        self.parent_name: Optional[str] = (
            parent_of(self.live.values()) if self.live else options.parent)
        self.parent = (kernel.link(self.parent_name)
                       if self.parent_name is not None else None)
        self.desired, self.refused = self.policy.desired(self.look, self.live)
        self.plan = self.policy.plan(self.look, self.desired)
        self.peer = self.policy.peer_seen(self.look, self.live, self.desired)

    def refresh(self) -> None:
        """Note what is being changed, or was, since the entries were read.

        To be called after each look at the kernel.
        """
        self.lock_free = self.lock_free and self.ledger.wait(self._patience)
        self.changing |= {
            entry.address for entry in
            {*self.contents.entries} ^ {*self.ledger.look().entries}}

    def settled(self, addresses: Iterator[IPAddress]) -> list[IPAddress]:
        """Those that nobody is just changing, in their order."""
        return [address for address in addresses
                if address not in self.changing]

    def unclaimed(self, address: IPAddress) -> bool:
        """Whether no entry says whose an address is."""
        return self._steady and not (
            address in self.live or address in self.changing
            or address in self.contents.unreadable
            or any(address == entry.address for entry in self.gone))

    def pods(self) -> dict[Owner, list[Entry]]:
        """The entries of each pod that nobody is just changing."""
        found: dict[Owner, list[Entry]] = {}
        for address, entry in self.live.items():
            if address not in self.changing:
                found.setdefault(entry.owner, []).append(entry)
        return found

    def sysctl(self, path: str, *devices: Optional[str]) -> int:
        """The largest value that interfaces have of a sysctl.

        :param path: below /proc/sys/net, with ``%s`` for the interface
        """
        return max(netlink.read_sysctl(path % device) or 0
                   for device in devices if device is not None)
