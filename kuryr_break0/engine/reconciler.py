# SPDX-License-Identifier: Apache-2.0

"""Reconciles the kernel with the ledger, for all pods of the node.

A missing record does not prove that a pod is gone, because a ledger can be
lost. So unclaimed items are deleted only with ``prune``. If a pod has the
address of an unclaimed item, the record of the pod is rebuilt from the kernel.
Otherwise the item is reported. A sandbox is treated as gone only if its
namespace is proven not to exist. An error on one parent or address does not
stop the work on other parents and addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Collection, Iterator, Mapping

from kuryr_break0.break0.guard import Guard
from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine.apply import apply
from kuryr_break0.engine.apply import log_repairs
from kuryr_break0.engine.apply import Work
from kuryr_break0.engine.plan import Outcome
from kuryr_break0.engine.plan import Plan
from kuryr_break0.engine import problems
from kuryr_break0.engine import rebuild
from kuryr_break0.engine import released
from kuryr_break0.engine import routes
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0.engine.snapshot import uncollected
from kuryr_break0.engine import transitions
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: Number of addresses that a sync changes before it releases the lock to other
#: processes.
CHANGED_AT_ONCE = 64


class Reconciler:
    """Reads snapshots; repairs differences between kernel and ledger."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._engine = transitions.Engine(options, ledger)

    def sync(self, dry_run: bool = False, claim: bool = False,
             prune: bool = False) -> Outcome:
        """Make all pods reachable, and drop the claims of gone sandboxes.

        The snapshot is read without the lock. So the record of an address is
        read again under the lock before the items of the address are changed.

        :param dry_run: change nothing
        :param claim: take over the break0 devices of another ledger
        :param prune: delete unclaimed items for which no pod was found
        :returns: the changes, and the errors; after a dry run, the changes
            that are necessary
        """
        failure = failures.Failures()
        outcome = Outcome()
        with failure.collect(), kernel.Netlink() as netlink, uncollected():
            outcome = _Sync(self._options, self._ledger, self._engine, netlink,
                            failure, dry_run, claim, prune).run()
        return dataclasses.replace(outcome, errors=tuple(failure.errors))


@dataclasses.dataclass
class _Sync:
    """One sync, with the arguments of Reconciler.sync.

    :ivar failure: collects the errors
    :ivar repaired: the repairs of break0s: device and text
    :ivar applied: the items of all plans that were set or deleted
    """

    options: config.Options
    ledger: Ledger
    engine: transitions.Engine
    netlink: kernel.Netlink
    failure: failures.Failures
    dry_run: bool
    claim: bool
    prune: bool
    repaired: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    applied: set[model.Item] = dataclasses.field(default_factory=set)

    def run(self) -> Outcome:
        """Do the steps of a sync; return the outcome without its errors."""
        began = files.now()
        snapshot = self._read()
        if not self.dry_run:
            self._tidy(snapshot)
        if self._ensure_devices(snapshot):
            snapshot = self._read()
        lost = self._lost(snapshot)
        rebuilt = [record for record in lost
                   if self.dry_run or self._put_rebuilt(record)]
        # Even if no record was rebuilt here, another sync may have rebuilt it.
        if lost and not self.dry_run:
            snapshot = self._read()
        plans = {name: self._plan(snapshot, parent, rebuilt)
                 for name, parent in snapshot.parents.items()}
        for address, reason in snapshot.refused.items():
            LOG.error('%s', policy.Policy(self.options).refused(
                address, reason))
        for plan in plans.values():
            for route in plan.foreign:
                LOG.error('%s', routes.foreign_route(route))
        ended = self.ledger.list_ended()
        by_del = released.by_del(snapshot, ended)
        if not self.dry_run:
            self._note(snapshot)
            released.drop(by_del, self.engine, self.ledger, self.failure)
            if ended:
                with self.failure.collect(), self.ledger.lock():
                    self.ledger.delete_ends(began)
            # If the sandbox of the newest claim is gone, the next claim gets
            # the address.
            moved = {record.address for record in snapshot.gone if record
                     == snapshot.contents.claims[record.address][0]}
            self.engine.remove_gone(moved, self.failure)
            self.applied.update(item for plan in plans.values()
                                for item in (*plan.set, *plan.unset)
                                if item.dst in moved - self.failure.failed)
            for name, parent in snapshot.parents.items():
                self._apply(parent, plans[name], snapshot, moved)
            self.engine.remove_gone(
                {record.address for record in snapshot.gone} - moved,
                self.failure)
            self._note_taps(snapshot)
        pods = self.engine.pods.repair(
            self._interfaces(snapshot, by_del), self.failure, self.dry_run,
            snapshot.contents.unreadable)
        by_pods = released.by_change(pods.released)
        if not self.dry_run:
            released.drop(by_pods, self.engine, self.ledger, self.failure)
        return dataclasses.replace(
            self._outcome(snapshot, plans, rebuilt),
            released={**by_del, **by_pods}, pods=tuple(pods.changed),
            missing={each.record: str(each) for each in pods.missing})

    def _plan(self, snapshot: Snapshot, parent: Parent,
              rebuilt: Collection[model.Record]) -> Plan:
        """Return the changes to make on a parent.

        The plan for a break0 of another ledger only reports unclaimed items.
        """
        plan = parent.plan
        rebuilt_addresses = {record.address for record in rebuilt}
        unclaimed = tuple(item for item in plan.unclaimed
                          if item.dst not in rebuilt_addresses)
        if self._is_skipped(parent):
            return Plan(unclaimed=unclaimed)
        if not self.prune:
            return dataclasses.replace(plan, unclaimed=unclaimed)
        return dataclasses.replace(plan, unclaimed=(),
                                   unset=(*plan.unset, *unclaimed))

    def _outcome(self, snapshot: Snapshot, plans: Mapping[str, Plan],
                 rebuilt: list[model.Record]) -> Outcome:
        """Return the changes; after a dry run, the necessary changes."""
        added: list[model.Item] = []
        deleted: list[model.Item] = []
        for name, parent in snapshot.parents.items():
            applied = [[item for item in items
                        if self.dry_run or item in self.applied]
                       for items in (plans[name].set, plans[name].unset)]
            added += applied[0]
            deleted += applied[1]
            for text in () if parent.guard else problems.guard_text(*applied):
                self.repaired.append((parent.device, text))
                if not self.dry_run:
                    LOG.info('Repaired %s: %s', parent.device, text)
        return Outcome(
            tuple(added), tuple(deleted),
            tuple(route for plan in plans.values() for route in plan.foreign),
            tuple(item for plan in plans.values() for item in plan.unclaimed),
            devices=tuple(self.repaired), rebuilt=tuple(rebuilt),
            gone=snapshot.gone, unjudged=snapshot.unjudged,
            refused=snapshot.refused)

    def _interfaces(self, snapshot: Snapshot, dropped: Collection[model.Record]
                    ) -> Iterator[tuple[list[model.Record],
                                        model.NodeAddresses]]:
        for records in snapshot.interfaces():
            parent = snapshot.parents[records[0].parent]
            if dropped:
                records = [each for each in records if each not in dropped]
            if records and records[0].netns is not None and (
                    parent.node is not None
                    and not self._is_skipped(parent)):
                yield records, parent.node

    def _tidy(self, snapshot: Snapshot) -> None:
        """Quarantine damaged records, and delete unfinished files."""
        with self.ledger.lock():
            if snapshot.contents.damaged:
                self.ledger.records.addresses()
            for address in snapshot.contents.unreadable:
                with self.failure.collect(), contextlib.suppress(
                        exceptions.RecordNewer):
                    self.ledger.records.claims(address)
            self.ledger.records.delete_unfinished()

    def _note(self, snapshot: Snapshot) -> None:
        """Cache next hops for the next bind; warn about unjudged sandboxes."""
        # The number and the example in the text can change in each sync, so
        # warn_once() compares the constant 'some' instead.
        self.engine.devices.warn_once(
            'unjudged', problems.unjudged_text(snapshot), 'some')
        self.ledger.cache.put('next_hops', sorted(map(
            str, snapshot.routes.next_hops)))
        self.ledger.cache.put('through_break0', sorted(map(
            str, snapshot.routes.left_out)))
        self.ledger.add_next_hops(snapshot.routes.next_hops
                                  | snapshot.routes.left_out)

    def _note_taps(self, snapshot: Snapshot) -> None:
        """Record the macvtaps of VMs that were started after their bind."""
        untapped = [record for record in snapshot.live.values() if record.mac
                    and record.netns is None and record.tap is None]
        taps = kernel.find_taps() if untapped else {}
        for record in untapped:
            tap = taps.get(str(record.mac))
            if tap is None:
                continue
            with self.failure.collect(), self.ledger.lock():
                self.ledger.records.update_newest(record, tap=tap)

    def _claims(self, parent: Parent) -> bool:
        """Return whether to take over the break0 of another ledger.

        If the state directory was wiped, the previous ledger is lost and this
        ledger replaces it. Then this ledger takes over each break0 with an
        alias that names the state directory.
        """
        return parent.ownership is Ownership.LOST or (
            self.claim and parent.ownership is Ownership.OTHER)

    def _is_skipped(self, parent: Parent) -> bool:
        """Return whether to skip a break0, because another ledger owns it.

        If a sync would take the break0 over, a dry run does not skip it, to
        show the changes on it.
        """
        return parent.ownership.is_foreign and not (
            self.dry_run and self._claims(parent))

    def _read(self) -> Snapshot:
        return actual.read(self.options, self.ledger, self.netlink,
                           ways=False)

    def _ensure_devices(self, snapshot: Snapshot) -> bool:
        """Create or repair the break0 of each parent.

        :returns: whether a break0 may have been changed
        """
        is_changed = False
        for parent in snapshot.parents.values():
            claim = self._claims(parent)
            if parent.conflict is not None:
                if parent.live or parent.name == self.options.parent:
                    self.failure.add(parent.conflict)
                continue
            if parent.other is not None and not claim:
                if parent.live or (self.prune and parent.plan.unclaimed):
                    self.failure.add(self.engine.devices.other_ledger(
                        parent.device, parent.other))
                continue
            if not parent.live and not claim:
                continue
            texts = [text for _, text in parent.differences]
            if parent.link is None:
                texts.append('it was missing')
            if parent.guard is not None:
                texts.append(parent.guard)
            if parent.other is not None:
                texts.append('it belonged to the ledger %s in %s'
                             % parent.other)
            repaired = [(parent.device, text) for text in texts]
            if self.dry_run or not texts:
                self.repaired += repaired
                continue
            is_changed = True
            with self.failure.collect(), self.ledger.lock():
                # All pods of the parent may have been unbound meanwhile.
                if claim or any(map(self.ledger.records.get, parent.live)):
                    self.engine.devices.ensure(
                        self.netlink, parent.name, claim, parent.device,
                        parent.has_ipv6)
                    guard = Guard(self.options, self.ledger, parent.device)
                    # If the guard cannot be loaded, it was not repaired, and
                    # ensure() has logged the error.
                    is_lost = guard.is_wanted and not guard.is_possible
                    self.repaired += [
                        each for each in repaired
                        if not is_lost or each[1] != parent.guard]
        return is_changed

    def _lost(self, snapshot: Snapshot) -> list[model.Record]:
        """Return new records for unclaimed items of pods."""
        return list(rebuild.find(
            self.options, snapshot, [
                parent for parent in snapshot.parents.values()
                if not self._is_skipped(parent)]))

    def _put_rebuilt(self, record: model.Record) -> bool:
        with self.failure.collect(), self.ledger.lock():
            # A bind or a newer release may have written the record meanwhile.
            if self.ledger.records.exists(record.address):
                return False
            self.ledger.ensure_identity()
            self.ledger.records.put([record])
            self.ledger.journal.add(Done.REBUILT)
            LOG.warning('Rebuilt the lost record of %s: its owner is the '
                        'interface %s on %s in %s', record.address,
                        record.owner.ifname, record.parent, record.netns)
            return True
        return False

    def _apply(self, parent: Parent, plan: Plan, snapshot: Snapshot,
               moved: Collection[model.IPAddress]) -> None:
        """Apply the plan of one parent, in groups of addresses.

        An address is skipped if its claims have changed since the snapshot,
        because the process that changed the claims has changed the items too.
        """
        if parent.link is None or self._is_skipped(parent):
            return  # there is no break0, or another ledger owns it
        guard = Guard(self.options, self.ledger, parent.device)
        works = _works(plan, snapshot, moved)
        unread = {work.address for work in works}
        for start in range(0, len(works), CHANGED_AT_ONCE):
            read: set[model.IPAddress] = set()
            applied = None
            with self.failure.collect(), self.ledger.lock():
                applied = apply(self.netlink, guard, [
                    work for work in works[start:start + CHANGED_AT_ONCE]
                    if self._is_ready(work, plan, snapshot, read)])
            if applied is None:
                continue
            if applied.guard_error is None:
                unread -= read
            else:
                self.failure.add(applied.guard_error)
            for address, err in applied.errors.items():
                self.failure.add(err, address)
            self.applied |= applied.items
            log_repairs(parent.device, applied, self.ledger.journal)
            if applied.is_device_lost:
                break  # other addresses would get the same error
            # Before a pod had its route, the node may have asked the LAN for
            # the pod's MAC address. If so, the kernel may still hold packets.
            with self.failure.collect():
                guard.release(
                    self.netlink, kernel.find_ifindex(parent.name), {
                        work.address: work.claim.mac for work in applied.works
                        if work.claim and applied.items.intersection(
                            model.of_kind(model.HostRoute, work.set))})
        else:
            if parent.guard and not unread and guard.is_there():
                with self.failure.collect(), self.ledger.lock():
                    self.engine.devices.ensure_guard(
                        self.netlink, parent.link,
                        kernel.find_ifindex(parent.name), is_filled=True)

    def _is_ready(self, work: Work, plan: Plan, snapshot: Snapshot,
                  read: set[model.IPAddress]) -> bool:
        """Return whether the claims on an address are as in the snapshot.

        :param read: a set; the method adds the address if the claims can be
            read
        """
        with self.failure.collect(work.address):
            is_as_read = snapshot.contents.is_still(self.ledger.records,
                                                    work.address)
            read.add(work.address)
            return is_as_read
        return False


def _works(plan: Plan, snapshot: Snapshot,
           moved: Collection[model.IPAddress]) -> list[Work]:
    """Return the works of a plan, in the order of their addresses.

    The claim on an address may be on another parent than the items.

    :param moved: addresses to omit, because their items were changed already
    """
    added, deleted = model.by_address(plan.set), model.by_address(plan.unset)
    return [Work(address, tuple(added.get(address, ())),
                 tuple(deleted.get(address, ())), snapshot.live.get(address))
            for address in sorted(added.keys() | deleted.keys(),
                                  key=model.address_order)
            if address not in moved]
