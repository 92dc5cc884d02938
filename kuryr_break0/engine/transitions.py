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
import errno
import functools
from typing import (Callable, Collection, Iterable, Iterator, NamedTuple,
                    Optional)

from kuryr_break0.break0.devices import Break0
from kuryr_break0.break0.devices import Devices
from kuryr_break0.break0.guard import Guard
from kuryr_break0.break0.guard import pairs
from kuryr_break0.break0 import pods
from kuryr_break0 import config
from kuryr_break0.engine import admission
from kuryr_break0.engine.apply import Applied
from kuryr_break0.engine.apply import apply
from kuryr_break0.engine.apply import Work
from kuryr_break0.engine import routes
from kuryr_break0.engine import transaction
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

#: A function with the arguments of LOG.info, which may delay the log line.
LogInfo = Callable[..., None]


class _Found(NamedTuple):
    """The routes that a bind has found.

    :ivar sources: the source address of each route to set; None lets the
        kernel choose
    :ivar existing: the addresses whose route exists, with the same metric
    :ivar blocked: the addresses that have a route of another program
    """

    sources: dict[model.IPAddress, Optional[model.IPAddress]]
    existing: set[model.IPAddress]
    blocked: set[model.IPAddress]


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
                break0 = self._set(netlink, [
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
            failure.add(exceptions.AddressTaken(
                address=address, owner=added.rivals[0].owner,
                **vars(added.rivals[0].owner)))
            return
        is_recorded = False
        with (failure.collect(address) if yielding
              else failures.Failures().log_errors()):
            self._records.put(added.after)
            is_recorded = True
        if is_recorded or not yielding:
            transitions[address] = Transition(before, added.after)

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
              transition: Transition, log_info: LogInfo,
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
        recorded_devices = self.devices.names(recorded=bool(dropped))
        devices = [name for name in recorded_devices
                   if not self.devices.is_others(netlink.link(name))]
        # If a break0 belongs to another ledger, setting items would take the
        # break0 over.
        may_set = (bool(after) and len(devices) == len(recorded_devices)
                   and not self._is_refused(after[0]))
        deleted = self._withdraw(
            netlink, address, [name for name in devices if not may_set or (
                name != self.devices.name(after[0].parent))],
            dropped, after, mac)
        if not after:
            self._records.remove(address)
            return deleted
        self._records.put(after)
        if may_set:
            failure = failures.Failures()
            with failure.collect():
                self._set(netlink, after[:1], {address: transition}, failure,
                          log_info)
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

    def _withdraw(self, netlink: kernel.Netlink, address: model.IPAddress,
                  devices: Iterable[str], dropped: Collection[model.Record],
                  after: Claims = (), mac: Optional[str] = None) -> bool:
        """Delete the items of an address on break0 devices.

        If the neighbour has a MAC address that no claim has, the route and the
        neighbour stay, because an unrecorded pod can need them. If no claim
        was dropped, the route and the neighbour are deleted only if the
        neighbour has the MAC address ``mac``.

        :returns: whether a route was deleted
        :raises KernelRefused: if the kernel refuses a change
        """
        macs = {each for claim in dropped for each in claim.macs}
        if mac is not None and not dropped:
            macs.add(mac.lower())
        deleted = False
        for name in devices:
            index = kernel.find_ifindex(name)
            if index is None:
                continue
            items: list[model.Item] = [model.Pair.of(address, each)
                                       for each in macs or (None,)]
            present, kind = netlink.neighbour(index, address)
            permanent = present if kind == 'permanent' else None
            route = self._policy.route(address, index)._replace(metric=None)
            if (claims_.can_own_items((*dropped, *after), permanent)
                    if dropped else permanent in macs):
                # Delete the neighbour too. Otherwise packets for the next pod
                # with the address would go to this pod's MAC address.
                items += [route, model.Neighbour(address, index, '', None)]
            elif permanent is not None and macs:
                LOG.warning('Keeping %s on %s: the address belongs to %s, '
                            'which has no record yet', address, name,
                            permanent)
            applied = apply(netlink, self._guard(name),
                            [Work(address, unset=tuple(items))])
            if applied.guard_error is not None:
                LOG.error('%s', applied.guard_error)
            for err in applied.errors.values():
                raise err
            deleted |= route in applied.items
        return deleted

    def _set(self, netlink: kernel.Netlink, records: Collection[model.Record],
             transitions: dict[model.IPAddress, Transition],
             failure: failures.Failures, log_info: LogInfo
             ) -> Optional[Break0]:
        """Set the items of the addresses of one interface.

        Addresses are refused before the guard is changed, so that the guard
        admits no refused address. The whole routing table is read only after
        the error EEXIST.
        """
        if not records:
            return None
        first = next(iter(records))
        break0 = self.devices.get(netlink, first.parent)
        found = self._look_up_routes(netlink, break0, records, failure)
        for address, transition in transitions.items():
            if address in found.blocked or any(
                    claim.parent != first.parent
                    for claim in transition.before):
                kept = set() if address in found.blocked else {break0.name}
                with failure.collect(address):
                    self._withdraw(
                        netlink, address, self.devices.names(recorded=True)
                        - kept, transition.before, transition.after)
        self._apply_bind(netlink, break0, first.parent, functools.partial(
            self._works, break0, records, transitions, found,
            frozenset(failure.failed)), failure)
        bound = [record for record in records
                 if record.address in found.sources
                 and record.address not in failure.failed]
        for record in bound:
            log_info('Bound %s to %s for %s, source %s', record.address,
                     break0.name, record.owner_text,
                     found.sources[record.address] or 'chosen by the kernel')
        if first.netns is not None and bound:
            siblings = self.pods.configure(
                bound, self.pods.node_addresses(
                    netlink, break0, first.parent,
                    set(found.sources.values())))
            self._apply(netlink, break0, [
                Work(address, tuple(items)) for address, items
                in model.by_address(pairs(siblings)).items()], failure)
        # Before the bind, the node may have asked the LAN for the pods' MAC
        # addresses. If so, the kernel may still hold packets to the pods.
        self._guard(break0.name).release(
            netlink, kernel.find_ifindex(first.parent),
            {record.address: record.mac for record in bound})
        return break0

    def _look_up_routes(self, netlink: kernel.Netlink, break0: Break0,
                        records: Iterable[model.Record],
                        failure: failures.Failures) -> _Found:
        """Choose a source address for each route; look up present routes."""
        found = _Found({}, set(), set())
        for record in records:
            address = record.address
            with failure.collect(address):
                if not self._policy.has_family(address, break0.name):
                    LOG.debug('IPv6 is disabled on %s, so %s is not reachable '
                              'through it', break0.name, address)
                    continue
                route = self._policy.route(
                    address, break0.index,
                    self._policy.source(record, break0.name))
                # Look up the route: NLM_F_EXCL does not detect a route with
                # another metric.
                present = netlink.route_to(address)
                try:
                    routes.require_free(route, filter(None, [present]))
                except exceptions.ForeignRoute:
                    found.blocked.add(address)
                    raise
                found.sources[address] = route.src
                if present and (present.table, present.metric) == (
                        route.table, route.metric):
                    found.existing.add(address)
        return found

    def _works(self, break0: Break0, records: Iterable[model.Record],
               transitions: dict[model.IPAddress, Transition], found: _Found,
               failed: Collection[model.IPAddress]) -> Iterator[Work]:
        """Yield the works that set the items of the addresses.

        :param failed: the addresses that the guard must not admit
        """
        admitted = model.by_address(pairs(
            record for record in records if record.address not in failed))
        earlier = model.by_address(pairs([
            *(record for record in records if record.address in failed),
            *(claim for transition in transitions.values()
              for claim in transition.before)]))
        for record in records:
            address = record.address
            items: list[model.Item] = [*admitted.get(address, ())]
            unset: list[model.Item] = [
                each for each in earlier.get(address, ())
                if each not in items]
            if address in found.sources:
                items += self._policy.items(record, break0.index,
                                            found.sources[address])
                if record.mac is None:  # delete an earlier pod's neighbour
                    unset.append(model.Neighbour(
                        address, break0.index, '', None))
            yield Work(address, tuple(items), tuple(unset), record,
                       is_new=address not in found.existing)

    def _apply_bind(self, netlink: kernel.Netlink, break0: Break0,
                    parent: str, works: Callable[[], Iterable[Work]],
                    failure: failures.Failures) -> None:
        """Apply the works of a bind.

        If break0 is down or gone, or if a route exists already, try again.

        :param works: returns the works for the present index of break0
        """
        applied = self._apply(netlink, break0, works(), failure)
        if applied.is_device_lost:
            self.devices.renew(netlink, break0, parent)
            applied = self._apply(netlink, break0, works(), failure)
        retried = []
        for each in applied.works:
            err = applied.errors.get(each.address)
            with failure.collect(each.address):
                if err is not None and err.errno == errno.EEXIST:
                    # The existing route may be unused. Unlike a look-up, a
                    # dump contains unused routes too.
                    route, = model.of_kind(model.HostRoute, each.set)
                    routes.require_free(route, [
                        other for other in netlink.routes().host
                        if other.dst == each.address])
                    retried.append(each._replace(is_new=False))
                elif err is not None:
                    raise err
        applied = self._apply(netlink, break0, retried, failure)
        for address, err in applied.errors.items():
            failure.add(err, address)

    def _apply(self, netlink: kernel.Netlink, break0: Break0,
               works: Iterable[Work], failure: failures.Failures) -> Applied:
        """Apply works.

        If ``[break0] guard`` is on and the guard fails, each address fails.
        Otherwise the error of the guard is only logged.
        """
        applied = apply(netlink, self._guard(break0.name), list(works))
        err = applied.guard_error
        if isinstance(err, exceptions.GuardUnavailable):
            failure.add(err, *(work.address for work in applied.works))
        elif err is not None:
            LOG.warning('The guard of %s does not admit %s: %s', break0.name,
                        ', '.join(str(work.address)
                                  for work in applied.works), err)
        return applied

    def _guard(self, device: str) -> Guard:
        return Guard(self._options, self._ledger, device)
