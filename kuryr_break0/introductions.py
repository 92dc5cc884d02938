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

"""Which pods have been told how to reach the node, and which are to be."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Callable, Mapping, Optional

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0 import exceptions
from kuryr_break0.journal import Done
from kuryr_break0.journal import Journal
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from kuryr_break0.ledger import Peer
from kuryr_break0 import sandbox

LOG = logging.getLogger(__name__)


class Introductions:
    """Tells pods of the node, and keeps in the ledger what each knows."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 journal: Journal) -> None:
        self._options = options
        self._ledger = ledger
        self._journal = journal

    def introduce_all(self, live: Mapping[IPAddress, Entry],
                      peer: Peer) -> None:
        """Tell the node's addresses to pods that know others, or none."""
        outdated: dict[Owner, list[Entry]] = {}
        for entry in live.values():
            if entry.netns is not None and entry.peer != peer:
                outdated.setdefault(entry.owner, []).append(entry)
        untold = []
        for owner, entries in outdated.items():
            if self.introduce(entries, peer):
                self._journal.add(Done.POD)
                LOG.info('Told %s on %s for %s how to reach the node',
                         ', '.join(str(entry.address) for entry in entries),
                         self._options.device, owner)
            else:
                untold.append(str(owner))
        if outdated:
            with contextlib.suppress(exceptions.Break0Error), \
                    self._ledger.lock():
                # Who has unbound one meanwhile has found nothing to forget.
                self.leave([dataclasses.replace(entry, peer=peer)
                            for entries in outdated.values()
                            for entry in entries
                            if self._ledger.get(entry.address) is None])
        if untold != (self._ledger.recall('untold', math.inf) or []):
            self._ledger.remember('untold', untold)

    def introduce(self, entries: list[Entry], peer: Peer) -> bool:
        """Tell a pod how to reach its node, and note that it knows.

        Without, IPv4 works by ARP where the node is in the pod's subnet, so
        a failure is no error.

        :param entries: those of the pod that are to know
        """
        if not entries or entries[0].netns is None:
            return True
        first = entries[0]
        try:
            sandbox.introduce(
                str(first.netns), first.owner.ifname, peer,
                addresses=[entry.address for entry in entries],
                subnets=first.subnets, before=first.peer,
                protocol=self._options.route_protocol)
            told: Optional[Peer] = peer
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            told = None
            # Said once, not with each look.
            untold = self._ledger.recall('untold', math.inf) or []
            if str(first.owner) not in untold:
                self._ledger.remember('untold', [*untold, str(first.owner)])
                LOG.warning('The sandbox %s has not been told how to reach '
                            'the node: %s', first.owner, err)
        outdated = [entry for entry in entries if entry.peer != told]
        if outdated:  # not so after a bind, which has noted it already
            with contextlib.suppress(exceptions.Break0Error), \
                    self._ledger.lock():
                for entry in outdated:
                    if self._ledger.get(entry.address) == entry:
                        self._ledger.put(dataclasses.replace(entry,
                                                             peer=told))
        return told is not None

    def leave(self, removed: list[Entry]) -> None:
        """Take back from namespaces that are still there what was told.

        Kuryr deletes the interface first, and all of it goes with that.
        """
        for entry in removed:
            if (entry.netns is None or entry.peer is None
                    or entry.sandbox_gone):
                continue
            try:
                sandbox.forget(entry.netns, entry.owner.ifname, entry.peer,
                               self._options.route_protocol,
                               still=self._is_bound_to(entry.owner))
            except exceptions.Break0Error as err:
                LOG.debug('The sandbox %s still knows the node: %s',
                          entry.owner, err)

    def _is_bound_to(self, owner: Owner) -> Callable[[IPAddress], bool]:
        def is_bound(address: IPAddress) -> bool:
            entry = self._ledger.get(address)
            return entry is not None and entry.owner == owner
        return is_bound
