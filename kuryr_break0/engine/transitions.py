# SPDX-License-Identifier: Apache-2.0

"""Applies transitions of claims to the ledger and the kernel.

A bind adds a claim. An unbind, an undo and the proof that a sandbox is gone
drop claims. A transition that adds a claim changes the ledger before the
kernel, and a transition that drops a claim changes the kernel before the
ledger. So a process that is killed at any point can leave a record without a
route, but never a live pod without a record. Without errors, a transition
reads the same amount of data for any number of pods.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Collection, Iterable, Optional

from kuryr_break0.break0.devices import Devices
from kuryr_break0.break0 import pods
from kuryr_break0 import config
from kuryr_break0.engine import admission
from kuryr_break0.engine import routes
from kuryr_break0.engine import transaction
from kuryr_break0.engine import writer
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import claims as claims_
from kuryr_break0.ledger.claims import Claims
from kuryr_break0.ledger.claims import Transition
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)


class Engine:
    """Applies transitions under the lock of the ledger.

    The methods add errors of single addresses to ``failure``.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger
        self._records = ledger.records
        self.devices = Devices(options, ledger)
        self.pods = pods.Pods(options, ledger)
        self.admission = admission.Admission(options, ledger, self.devices)
        self._writer = writer.Writer(options, ledger, self.devices, self.pods)

    def bind(self, records: Collection[model.Record], yielding: bool,
             failure: failures.Failures) -> bool:
        """Add claims of one interface, and set the items of its addresses.

        :param yielding: refuse each address that another existing sandbox
            has claimed, and undo the transition of each address that fails
        :returns: whether a sync must restore items of other pods
        """
        transitions: dict[model.IPAddress, Transition] = {}
        break0 = None
        with transaction.begin(self._ledger, writable=yielding) as held:
            # If break0 is missing, this can be the first bind of the boot.
            # Then ensure_identity() quarantines the records of an earlier
            # boot, which must precede the first new record.
            if kernel.find_ifindex(self._options.device) is None:
                with contextlib.suppress(exceptions.LedgerUnavailable):
                    self._ledger.ensure_identity()
            for record in records:
                self._add_claim(record, yielding, transitions, failure)
            with failure.collect(*transitions), kernel.Netlink() as netlink:
                break0 = self._writer.set(netlink, [
                    record for record in records
                    if record.address in transitions
                ], transitions, failure, held.log_later)
            undone = failure.failed & transitions.keys() if yielding else ()
            for address in undone:
                before, after = transitions[address]
                with failures.Failures().log_errors(), \
                        kernel.Netlink() as netlink:
                    self._drop(netlink, address, Transition(after, before),
                               held.log_later)
        routes.delete_connections([
            address for address, each in transitions.items()
            if each.is_handed_over])
        return break0 is not None and break0.needs_sync

    def _add_claim(self, record: model.Record, yielding: bool,
                   transitions: dict[model.IPAddress, Transition],
                   failure: failures.Failures) -> None:
        """Record a claim, unless it is refused or its owner has a newer one.

        If the ledger is unwritable, the pod gets its route nevertheless, and a
        later sync rebuilds the record. With ``yielding``, the address fails
        instead, because the caller tries again.
        """
        address = record.address
        before: Claims = ()
        with failures.Failures().log_errors():
            before = self._records.claims(address)
        added = claims_.add(record, before, pods.is_gone)
        if added.after[0] != record:
            LOG.info('Ignored a bind of %s: %s has bound it again since',
                     address, record.owner)
            return
        if yielding and added.rivals:
            failure.add(_taken(added.rivals[0]))
            return
        is_recorded = False
        with (failure.collect(address) if yielding
              else failures.Failures().log_errors()):
            self._records.put(added.after)
            is_recorded = True
        if is_recorded or not yielding:
            transitions[address] = Transition(before, added.after)

    def check(self, record: model.Record) -> None:
        """Raise the error that :meth:`bind` would add; change nothing.

        See :meth:`kuryr_break0.manager.Break0Manager.check`.
        """
        reason = self.admission.refusal(record.address, record.parent,
                                        record.origin)
        if reason is not None:
            raise self._policy.refused(record.address, reason)
        for rival in claims_.add(record, self._records.claims(
                record.address), pods.is_gone).rivals:
            raise _taken(rival)
        device = self.devices.name(record.parent)
        index = kernel.find_ifindex(device) if device else None
        with kernel.Netlink() as netlink:
            present = netlink.route_to(record.address)
        routes.require_free(self._policy.route(record.address, index or 0),
                            filter(None, [present]))

    def unbind(self, addresses: Iterable[model.IPAddress],
               is_own: Callable[[model.Record], bool], name: object,
               mac: Optional[str], failure: failures.Failures,
               ending: Optional[tuple[model.Owner, float]] = None
               ) -> list[model.Record]:
        """Drop claims, and delete the items of their addresses.

        :param is_own: returns whether to drop a claim
        :param name: the name of the claims' owner, for the log
        :param mac: the route and neighbour of an address without claims are
            deleted only if the neighbour has this MAC address
        :param ending: the owner of an interface that has ended, and the time
            of its end. A later sync drops the older claims of this owner
        :returns: the dropped claims
        """
        dropped: list[model.Record] = []
        handed_over: list[model.IPAddress] = []
        with transaction.begin(self._ledger, required=True) as held, \
                kernel.Netlink() as netlink:
            if ending is not None:
                self._ledger.add_end(*ending)
            for address in addresses:
                with failure.collect(address):
                    before = self._records.claims(address)
                    if before and held.unwritable is not None:
                        raise held.unwritable  # a claim cannot be dropped
                    dropped_claims, remaining = claims_.split(
                        before, lambda claim: not is_own(claim))
                    if before and not dropped_claims:
                        held.log_later(
                            '%s stays bound for %s: the unbind was for %s',
                            address, before[0].owner, name)
                        continue
                    deleted = self._drop(
                        netlink, address, Transition(before, remaining),
                        held.log_later, mac)
                    held.log_later(
                        'Unbound %s from break0 for %s%s', address, name,
                        '' if deleted else ' (it had no route)')
                    dropped += dropped_claims
                    if dropped_claims and dropped_claims[0] == before[0]:
                        handed_over.append(address)
        routes.delete_connections(handed_over)
        return dropped

    def remove_gone(self, addresses: Collection[model.IPAddress],
                    failure: failures.Failures) -> list[model.Record]:
        """Drop claims of sandboxes that are proven not to exist.

        :returns: the remaining claims on the addresses without an error
        """
        remaining: list[model.Record] = []
        with kernel.Netlink() as netlink:
            for address in addresses:
                with failure.collect(address):
                    remaining += self._remove_gone(netlink, address)
        return remaining

    def _remove_gone(self, netlink: kernel.Netlink, address: model.IPAddress
                     ) -> Claims:
        with self._ledger.lock():
            before = self._records.claims(address)
            living, gone = claims_.split(before, pods.is_gone)
            deleted = bool(gone) and self._drop(
                netlink, address, Transition(before, living), LOG.info)
        for claim in gone:
            LOG.info('Sandbox %s no longer exists; removed %s',
                     claim.owner_text, '%s from break0' % address if deleted
                     else 'its claim on %s' % address)
            self._ledger.journal.add(Done.SANDBOX_GONE)
        if gone and gone[0] == before[0]:
            routes.delete_connections([address])
        return living

    def _drop(self, netlink: kernel.Netlink, address: model.IPAddress,
              transition: Transition, log_info: writer.LogInfo,
              mac: Optional[str] = None) -> bool:
        """Apply a transition that drops claims.

        The newest remaining claim gets the address. If no claim remains, or if
        the policy now refuses the address, the items of the address are
        deleted.

        :param mac: as for :meth:`unbind`
        :returns: whether a route was deleted
        :raises Break0Error: if the kernel refuses a change; the claims remain
        """
        before, after = transition
        if after and after[0] == before[0]:  # the route stays
            self._records.put(after)
            return False
        # An undo restores earlier claims. Their sandboxes may have ended, and
        # from_successor() omits the claims of such sandboxes.
        dropped = [*before, *after]
        after = self.pods.from_successor(after)
        dropped = [claim for claim in dropped if claim not in after]
        names = self.devices.names(recorded=bool(dropped))
        devices = self.devices.without_others(netlink, names)
        successor = self.devices.name(after[0].parent) if after else None
        # If its break0 belongs to another ledger, setting items would take
        # the break0 over.
        may_set = (bool(after)
                   and ({successor} if successor else names) <= {*devices}
                   and not self._is_refused(after[0]))
        deleted = self._writer.withdraw(
            netlink, address, [name for name in devices
                               if not may_set or name != successor],
            dropped, after, mac)
        if not after:
            self._records.remove(address)
            return deleted
        self._records.put(after)
        if may_set:
            failure = failures.Failures()
            with failure.collect():
                self._writer.set(netlink, after[:1], {address: transition},
                                 failure, log_info)
            for err in failure.errors[:1]:
                LOG.error('%s', err)
        return deleted

    def _is_refused(self, claim: model.Record) -> bool:
        """Return whether the policy refuses an address; log the refusal."""
        reason = self.admission.refusal(claim.address, claim.parent,
                                        claim.origin)
        if reason is not None:
            LOG.error('%s', self._policy.refused(claim.address, reason))
        return reason is not None


def _taken(rival: model.Record) -> exceptions.AddressTaken:
    return exceptions.AddressTaken(address=rival.address, owner=rival.owner,
                                   **vars(rival.owner))
