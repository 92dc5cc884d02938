# SPDX-License-Identifier: Apache-2.0

"""Makes the kernel match the ledger, for all pods of the node.

The ledger is evidence, not the truth. What merely has no record is not
deleted: its record is rebuilt from the kernel if a pod is found that has the
address, else it stays and is reported. What has one is deleted only if the
namespace of its sandbox is proven not to exist. Each parent is a matter of its
own, and so is each address: what fails for one holds up no other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
from typing import Any, Collection, Iterable, Iterator, Mapping, Optional

from kuryr_break0 import actual
from kuryr_break0.claims import Claims
from kuryr_break0 import config
from kuryr_break0.engine import Engine
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import Guard
from kuryr_break0.guard import said
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Journal
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.plan import by_order
from kuryr_break0.plan import Outcome
from kuryr_break0.policy import Policy
from kuryr_break0 import rebuild
from kuryr_break0.routes import foreign_route
from kuryr_break0.snapshot import Parent
from kuryr_break0.snapshot import Snapshot

LOG = log.get_logger(__name__)

#: Addresses that a sync changes before it lets others have the lock.
CHANGED_AT_ONCE = 16


class Reconciler:
    """Compares snapshot and ledger, and makes the difference none."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger

    def sync(self, dry_run: bool = False, claim: bool = False,
             prune: bool = False) -> Outcome:
        """Make all pods of the node reachable, and remove what is gone.

        What is read is read without the lock, so each change is decided
        again under it, by the record that its address has then.

        :param dry_run: change nothing
        :param claim: take over what belongs to another ledger
        :param prune: delete what has no record and could not be matched
        :returns: what there was to do; errors are in it
        """
        failure = Failures()
        outcome = Outcome()
        with failure.noted(), kernel.Netlink() as netlink, uncollected():
            outcome = _Sync(self._options, self._ledger, netlink, failure,
                            dry_run, claim, prune).run()
        return dataclasses.replace(outcome, errors=tuple(failure.errors))


class _Sync:
    """One sync."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 netlink: kernel.Netlink, failure: Failures, dry_run: bool,
                 claim: bool, prune: bool) -> None:
        self._options = options
        self._ledger = ledger
        self._records = ledger.records
        self._engine = Engine(options, ledger)
        self._devices = self._engine.devices
        self._journal = Journal(options.state_dir)
        self._netlink = netlink
        self._failure = failure
        self._dry_run = dry_run
        self._claim = claim
        self._prune = prune
        self._contents: Optional[Contents] = None
        #: what was changed, as far as it was in the plan
        self._applied: set[Item] = set()

    def run(self) -> Outcome:
        seen = self._read()
        if not self._dry_run:
            self._tidy(seen)
        devices = self._ensure_devices(seen)
        if devices and not self._dry_run:
            seen = self._read()
        rebuilt = self._rebuild(seen)
        if rebuilt and not self._dry_run:
            seen = self._read()
        for address, reason in seen.refused.items():
            LOG.error('%s', Policy(self._options).refused(address, reason))
        for parent in seen.parents.values():
            for route in parent.plan.foreign:
                if not self._is_left(seen, parent):
                    LOG.error('%s', foreign_route(route))
        pruned: set[Item] = set()
        if self._prune:
            pruned = self._pruned(seen, {each.address for each in rebuilt})
        if not self._dry_run:
            self._note(seen)
            # What a gone one had, the next that has its address gets.
            moved = {record.address for record in seen.gone if record
                     == seen.contents.claims[record.address][0]}
            self._remove_gone(moved)
            self._applied.update(
                item for parent in seen.parents.values()
                for item in parent.plan.changes
                if item.dst in moved - self._failure.failed)
            for parent in seen.parents.values():
                self._apply(parent, seen, moved)
            self._remove_gone({record.address for record in seen.gone}
                              - moved)
            self._note_taps(seen)
        return self._outcome(seen, devices, rebuilt, pruned)

    def _remove_gone(self, addresses: Iterable[IPAddress]) -> None:
        for address in addresses:
            with self._failure.noted(address):
                self._engine.remove_gone_claims(self._netlink, address)

    def _outcome(self, seen: Snapshot, devices: list[tuple[str, str]],
                 rebuilt: list[Record], pruned: set[Item]) -> Outcome:
        """Return what was done; of a dry run, what there is to do."""
        claimed = {record.address for record in rebuilt}
        items: dict[str, list[Any]] = {
            name: [] for name in ('replace', 'delete', 'foreign', 'learn',
                                  'forget', 'unclaimed')}
        for parent in seen.parents.values():
            is_left = self._is_left(seen, parent)
            for name, found in items.items():
                found += [
                    item for item in getattr(parent.plan, name)
                    if name == 'unclaimed' and item.dst not in claimed
                    and item not in pruned
                    or not is_left and (
                        name == 'foreign' or name != 'unclaimed' and (
                            self._dry_run or item in self._applied))]
        for item in sorted(pruned, key=by_order):
            items['delete' if isinstance(item, HostRoute)
                  else 'forget'].append(item)
        return Outcome(
            devices=tuple(devices), rebuilt=tuple(rebuilt), gone=seen.gone,
            unjudged=seen.unjudged, pods=tuple(self._engine.pods.repair(
                self._interfaces(seen), self._failure, self._dry_run)),
            **dict[str, Any]((name, tuple(found))
                             for name, found in items.items()))

    def _interfaces(self, seen: Snapshot
                    ) -> Iterator[tuple[list[Record], NodeAddresses]]:
        for records in seen.interfaces():
            for name in {record.parent for record in records}:
                parent = seen.parents[name]
                some = [record for record in records
                        if record.parent == name and record.netns is not None]
                if some and parent.node is not None and not (
                        self._is_left(seen, parent)):
                    yield some, parent.node

    def _tidy(self, seen: Snapshot) -> None:
        """Note what an earlier version did not, and sweep."""
        with self._ledger.lock():
            for address in (*self._records.addresses(),
                            *seen.contents.unreadable):
                claims = seen.contents.claims.get(address, ())
                with self._failure.noted(), contextlib.suppress(
                        exceptions.RecordNewer):
                    if address in seen.contents.unreadable or any(
                            claim.parent_index is None for claim in claims):
                        # Which moves it to quarantine if it is damaged.
                        self._note_parents(self._records.claims(address))
            self._records.sweep()

    def _note(self, seen: Snapshot) -> None:
        # Of how many, and of which one, may change with each sync.
        self._devices.warn_once('unjudged', seen.unjudged_problem, 'some')
        self._ledger.cache.put('next_hops', sorted(map(
            str, seen.routes.next_hops)))  # which spares the next bind it
        self._ledger.note_next_hops(seen.routes.next_hops
                                    | seen.routes.left_out)
        self._ledger.cache.put('elsewhere', list(map(str, seen.elsewhere)))

    def _note_taps(self, seen: Snapshot) -> None:
        """Record the macvtaps of VMs that were started after their bind."""
        wanted = [record for record in seen.live.values() if record.mac
                  and record.netns is None and record.tap is None]
        taps = kernel.find_taps() if wanted else {}
        for record in wanted:
            tap = taps.get(str(record.mac))
            if tap is None:
                continue
            with self._failure.noted(), self._ledger.lock():
                claims = self._records.claims(record.address)
                if claims[:1] == (record,):
                    self._records.put([dataclasses.replace(
                        record, tap=tap), *claims[1:]])

    def _claims(self, seen: Snapshot, parent: Parent) -> bool:
        """Return whether a break0 of another ledger is to be taken over."""
        return parent.other is not None and (self._claim
                                             or seen.follows(parent))

    def _is_left(self, seen: Snapshot, parent: Parent) -> bool:
        """Return whether a break0 is, and stays, that of another ledger.

        A dry run shows what there was to do if it were taken over.
        """
        return parent.other is not None and not (
            self._dry_run and self._claims(seen, parent))

    def _note_parents(self, claims: Claims) -> None:
        """Note the ifindex of parents that an earlier version did not."""
        noted = [dataclasses.replace(claim, parent_index=kernel.index_of(
            claim.parent)) if claim.parent_index is None else claim
            for claim in claims]
        if noted != [*claims]:
            self._records.put(noted)

    def _read(self) -> Snapshot:
        seen = actual.read(self._options, self._ledger, self._netlink,
                           known=self._contents)
        self._contents = seen.contents
        return seen

    def _ensure_devices(self, seen: Snapshot) -> list[tuple[str, str]]:
        """Make sure of each break0; what it was and should not be.

        A ledger that was lost, as its directory was wiped, is followed by
        this one: it takes over what says that it belongs to this directory.
        """
        found: list[tuple[str, str]] = []
        for parent in seen.parents.values():
            claim = self._claims(seen, parent)
            if parent.conflict is not None:
                if parent.live or parent.name == self._options.parent:
                    self._failure.note(parent.conflict)
                continue
            if parent.other is not None and not claim:
                if parent.live or (self._prune and parent.plan.unclaimed):
                    self._failure.note(self._devices.other_ledger(
                        parent.device, parent.other))
                continue
            if not parent.live and not claim:
                continue
            texts = [*parent.differences]
            if parent.link is None:
                texts.append('it was missing')
            if parent.guard is not None:
                texts.append(parent.guard)
            if parent.other is not None:
                texts.append('it belonged to the ledger %s in %s'
                             % parent.other)
            known_wrongly = [*said(parent.barred, parent.admitted)]
            found += [(parent.device, text) for text in texts]
            if self._dry_run:
                found += [(parent.device, text) for text in known_wrongly]
            if self._dry_run or not (texts or known_wrongly):
                continue
            refused = {*seen.refused, *parent.plan.blocked}
            with self._failure.noted(), self._ledger.lock():
                # None, if all of them have been unbound meanwhile.
                if claim or any(map(self._records.get, parent.live)):
                    if texts:
                        self._devices.ensure(self._netlink, parent.name,
                                             claim, refused, parent.device)
                    # Not where pods have come and gone since it was read.
                    if self._devices.repair_guard(self._netlink, parent,
                                                  refused):
                        found += [(parent.device, text)
                                  for text in known_wrongly]
        return found

    def _rebuild(self, seen: Snapshot) -> list[Record]:
        """Make records of what the kernel holds and the ledger does not."""
        return [record for record in rebuild.find(
            self._options, seen, [parent for parent in seen.parents.values()
                                  if not self._is_left(seen, parent)])
                if self._dry_run or self._put_rebuilt(record)]

    def _put_rebuilt(self, record: Record) -> bool:
        with self._failure.noted(), self._ledger.lock():
            # It has been bound meanwhile, or a later version wrote it.
            if self._records.exists(record.address):
                return False
            self._ledger.ensure_identity()
            self._records.put([record])
            self._journal.add(Done.REBUILT)
            LOG.warning('The record of %s was lost; rebuilt it: %s on %s has '
                        'it in %s', record.address, record.owner.ifname,
                        record.parent, record.netns)
            return True
        return False

    def _pruned(self, seen: Snapshot, claimed: Collection[IPAddress]
                ) -> set[Item]:
        """Delete what is unclaimed; but on no break0 of another ledger."""
        unclaimed = [item for parent in seen.parents.values()
                     if not self._is_left(seen, parent)
                     for item in parent.plan.unclaimed
                     if item.dst not in claimed]
        if not self._dry_run:
            with self._ledger.lock():
                unclaimed = [item for item in unclaimed
                             if not self._records.claims(item.dst)]
                self._change('', [(Verb.DELETE, item)
                                  for item in unclaimed], {})
        return set(unclaimed)

    def _apply(self, parent: Parent, seen: Snapshot,
               moved: Collection[IPAddress]) -> None:
        """Change routes and neighbours of one parent, address by address.

        Neighbours are set before routes. An address is left out whose claims
        are not those that were read: whoever has changed them has done it.
        """
        if parent.link is None or self._is_left(seen, parent):
            return  # what another ledger knows of it is not known here
        taken = {route.dst: route for route in parent.plan.foreign}
        owners = {address: record.owner
                  for address, record in parent.live.items()}
        plan = parent.plan
        stages: tuple[tuple[Verb, tuple[Item, ...]], ...] = (
            (Verb.REPLACE, (*plan.learn, *plan.replace)),
            (Verb.DELETE, (*plan.delete, *plan.forget)))
        for verb, items in stages:
            changes: dict[IPAddress, list[kernel.Change]] = {}
            for item in items:
                if item.dst not in moved:
                    changes.setdefault(item.dst, []).append((verb, item))
            for some in _chunks(list(changes), CHANGED_AT_ONCE):
                batch: list[kernel.Change] = []
                with self._failure.noted(), self._ledger.lock():
                    for address in some:
                        with self._failure.noted(address):
                            if not self._is_as_read(address, seen):
                                continue
                            if verb is Verb.REPLACE and address in taken:
                                self._engine.routes.take_over(taken[address])
                            batch += changes[address]
                    if not self._change(' on ' + parent.device, batch,
                                        owners):
                        return  # the others would fail alike
                    if parent.parent is not None and verb is Verb.REPLACE:
                        # Without its route, the LAN was asked for it.
                        Guard(self._options, self._ledger,
                              parent.device).release(
                            self._netlink, parent.parent.index,
                            {item.dst: parent.live[item.dst].mac
                             for item in plan.replace if item.dst in some})

    def _is_as_read(self, address: IPAddress, seen: Snapshot) -> bool:
        return (self._records.claims(address)
                == seen.contents.claims.get(address, ()))

    def _change(self, where: str, batch: list[kernel.Change],
                owners: Mapping[IPAddress, Owner]) -> bool:
        """Make changes, and say so; False if break0 is down or gone."""
        done: collections.Counter[Done] = collections.Counter()
        usable = True
        for (verb, item), err in zip(batch, self._netlink.change(batch)):
            if err is not None and not (verb is Verb.DELETE and err.absent):
                self._failure.note(err)
                usable &= not err.device_lost
                continue
            self._applied.add(item)
            is_route = isinstance(item, HostRoute)
            LOG.info('%s the %s of %s%s for %s',
                     'Deleted' if verb is Verb.DELETE else 'Set',
                     'route' if is_route else 'neighbour', item.dst, where,
                     owners.get(item.dst, 'nobody'))
            done[Done.UNCLAIMED if verb is Verb.DELETE else
                 Done.ROUTE if is_route else Done.NEIGHBOUR] += 1
        for reason, times in done.items():
            self._journal.add(reason, times=times)
        return usable


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: what is read lives on until the end.

    To look for garbage among it takes up to half of the time, and finds none.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start:start + size]
