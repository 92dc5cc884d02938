# SPDX-License-Identifier: Apache-2.0

"""Changes the kernel for the claims on some addresses.

A bind adds a claim, an unbind and an undo drop some, and so does what is
proven gone: each is a move from the claims before to those after. A move that
adds writes the ledger first, one that drops writes it last. Killed at any
instruction, what is left is a record without a route, never a live pod
without a record. Nothing is read that grows with the number of pods.
"""

from __future__ import annotations

import contextlib
import errno
from typing import (Any, Callable, Collection, Iterable, Iterator, NamedTuple,
                    Optional)

from kuryr_break0.apply import Applied
from kuryr_break0.apply import apply
from kuryr_break0.apply import Work
from kuryr_break0 import claims as claims_
from kuryr_break0.claims import Claims
from kuryr_break0 import config
from kuryr_break0.devices import Break0
from kuryr_break0.devices import Devices
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import Guard
from kuryr_break0.guard import pairs
from kuryr_break0 import kernel
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.model import by_address
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.model import Owner
from kuryr_break0.model import Pair
from kuryr_break0.model import Record
from kuryr_break0.pods import Pods
from kuryr_break0.policy import Policy
from kuryr_break0.routes import delete_connections
from kuryr_break0.routes import Routes

LOG = log.get_logger(__name__)

#: As LOG.info, but later; see :meth:`Engine.locked`.
Say = Callable[..., None]


class Move(NamedTuple):
    """A change of the claims on one address."""

    before: Claims
    after: Claims


class Engine:
    """Makes moves, under the lock of the ledger.

    Errors of single addresses are added to ``failure``.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._records = ledger.records
        self.devices = Devices(options, ledger)
        self.routes = Routes(options, ledger)
        self.pods = Pods(options, ledger)

    @contextlib.contextmanager
    def locked(self, required: bool = False,
               writable: bool = False) -> Iterator[Say]:
        """Keep others out.

        Where the lock cannot be had, a pod is worth more than the lock: it
        is recorded and bound without. What takes away needs it.

        :param writable: fail if nothing can be recorded
        :returns: a LOG.info whose lines are written when the lock is free
            again, since to write one can take as long as to set a route
        """
        said: list[tuple[Any, ...]] = []
        self._unwritable: Optional[exceptions.LedgerUnavailable] = None
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._ledger.lock())
                except exceptions.LedgerUnavailable as err:
                    if writable:
                        raise
                    LOG.error('Working without a lock. %s', err)
                    self._unwritable = err
                except exceptions.LockTimeout as err:
                    if required:
                        raise
                    LOG.error('Working without a lock. %s', err)
                yield lambda *line: said.append(line)
        finally:
            for line in said:
                LOG.info(*line)

    def bind(self, records: Collection[Record], yielding: bool,
             failure: Failures) -> bool:
        """Add claims of one interface, and set what follows from them.

        :param yielding: refuse what another existing sandbox has, and undo
            what fails, address by address
        :returns: whether a sync is to restore what the others need
        """
        passed: list[IPAddress] = []
        moves: dict[IPAddress, Move] = {}
        break0 = None
        with self.locked(writable=yielding) as say:
            # The first one of a boot: records of an earlier one must go before
            # there are new ones.
            if kernel.find_ifindex(self._options.device) is None:
                with contextlib.suppress(exceptions.LedgerUnavailable):
                    self._ledger.ensure_identity()
            for record in records:
                self._add_claim(record, yielding, moves, passed, failure)
            with failure.collect(*moves), kernel.Netlink() as netlink:
                break0 = self._set(netlink, [
                    record for record in records if record.address in moves
                ], moves, failure, say)
            for address in failure.failed & moves.keys() if yielding else ():
                with Failures().log_errors(), kernel.Netlink() as netlink:
                    self._drop(netlink, address, Move(
                        moves[address].after, moves[address].before), say)
        delete_connections(passed)
        return break0 is not None and break0.needs_sync

    def _add_claim(self, record: Record, yielding: bool,
                   moves: dict[IPAddress, Move], passed: list[IPAddress],
                   failure: Failures) -> None:
        """Write a claim, unless it is refused or came too late.

        An unwritable ledger must not cost a pod its route: what is in the
        kernel is recorded when it can be again. Who yields tries again.
        """
        address = record.address
        before: Claims = ()
        with Failures().log_errors():
            before = self._records.claims(address)
        added = claims_.add(record, before, _is_gone)
        if added.after[0] != record:
            LOG.info('%s has bound %s again meanwhile', record.owner, address)
            return
        if yielding and added.rivals:
            failure.add(exceptions.AddressTaken(
                address=address, owner=added.rivals[0].owner,
                **vars(added.rivals[0].owner)))
            return
        is_recorded = False
        with failure.collect(address) if yielding else Failures().log_errors():
            self._records.put(added.after)
            is_recorded = True
        if is_recorded or not yielding:
            moves[address] = Move(before, added.after)
            if added.passed:
                passed.append(address)

    def unbind(self, addresses: Iterable[IPAddress],
               is_own: Callable[[Record], bool], name: object,
               mac: Optional[str], failure: Failures,
               ending: Optional[tuple[Owner, float]] = None) -> list[Record]:
        """Drop claims, and what the addresses had because of them.

        :param is_own: whether a claim is to be dropped
        :param name: of their owner, for the log
        :param mac: what a route without record is known by
        :param ending: the owner that a sync is to end, and the time of that
        :returns: the claims that were dropped
        """
        dropped: list[Record] = []
        passed: list[IPAddress] = []
        with self.locked(required=True) as say, kernel.Netlink() as netlink:
            if ending is not None:
                self._ledger.add_end(*ending)
            for address in addresses:
                with failure.collect(address):
                    before = self._records.claims(address)
                    if before and self._unwritable is not None:
                        raise self._unwritable  # it would stay recorded
                    own, others = claims_.split(
                        before, lambda claim: not is_own(claim))
                    if before and not own:
                        say('%s stays bound: it belongs to %s now, and was '
                            'to be unbound for %s', address, before[0].owner,
                            name)
                        continue
                    deleted = self._drop(netlink, address,
                                         Move(before, others), say, mac)
                    say('Unbound %s from break0 for %s%s', address, name,
                        '' if deleted else ' (it had no route of its own)')
                    dropped += own
                    if own and own[0] == before[0]:  # else it was another's
                        passed.append(address)
        delete_connections(passed)
        return dropped

    def remove_gone(self, addresses: Collection[IPAddress],
                    failure: Failures) -> list[Record]:
        """Drop claims whose sandbox is proven not to exist.

        :returns: those that are left, but of addresses where that failed
        """
        left: list[Record] = []
        with kernel.Netlink() as netlink:
            for address in addresses:
                with failure.collect(address):
                    left += self._remove_gone(netlink, address)
        return left

    def _remove_gone(self, netlink: kernel.Netlink, address: IPAddress
                     ) -> Claims:
        with self._ledger.lock():
            before = self._records.claims(address)
            judge = kernel.Judge()
            living, gone = claims_.split(before, lambda claim: judge.judge(
                *claim.place).state is kernel.State.GONE)
            deleted = bool(gone) and self._drop(
                netlink, address, Move(before, living), LOG.info)
        for claim in gone:
            LOG.info('Sandbox %s no longer exists; removed %s',
                     claim.owner_text, '%s from break0' % address if deleted
                     else 'its claim on %s' % address)
            self._ledger.journal.add(Done.SANDBOX_GONE)
        if gone and gone[0] == before[0]:
            delete_connections([address])
        return living

    def _drop(self, netlink: kernel.Netlink, address: IPAddress, move: Move,
              say: Say, mac: Optional[str] = None) -> bool:
        """Make a move to fewer claims; whether a route was deleted.

        This is the one place that deletes what an address has because its
        claim is gone. The newest claim that is left gets it.

        :param mac: what it is known by if there is no claim
        :raises Break0Error: if the kernel refuses; then the claims are there
        """
        before, after = move
        if after and after[0] == before[0]:  # it has the route
            self._records.put(after)
            return False
        # An undo goes back to claims of which some may be of dead ones.
        dropped = [*before, *after]
        after = self.pods.from_successor(after, _is_gone)
        dropped = [claim for claim in dropped if claim not in after]
        known = self.devices.names(recorded=bool(dropped))
        own = [name for name in known
               if not self.devices.is_others(netlink.link(name))]
        # Else a bind might take over a break0 of another ledger.
        may_set = bool(after) and len(own) == len(known)
        deleted = self._withdraw(
            netlink, address, [name for name in own if not may_set or (
                name != self.devices.name(after[0].parent))],
            dropped, after, mac)
        if not after:
            self._records.remove(address)
            return deleted
        self._records.put(after)
        if may_set:
            failure = Failures()
            with failure.collect():
                self._set(netlink, after[:1], {address: move}, failure, say)
            for err in failure.errors[:1]:
                LOG.error('%s', err)
        return deleted

    def _withdraw(self, netlink: kernel.Netlink, address: IPAddress,
                  devices: Iterable[str], dropped: Collection[Record],
                  after: Claims = (), mac: Optional[str] = None) -> bool:
        """Delete what an address has on break0s; whether it had a route.

        But not what the claims did not get, nor, without any, what nothing
        says whose it is.

        :raises KernelRefused: if the kernel refuses
        """
        macs = {each for claim in dropped for each in claim.macs}
        if mac is not None and not dropped:
            macs.add(mac.lower())
        deleted = False
        for name in devices:
            index = kernel.find_ifindex(name)
            if index is None:
                continue
            items: list[Item] = [Pair.of(address, each)
                                 for each in macs or (None,)]
            present, kind = netlink.neighbour(index, address)
            found = present if kind == 'permanent' else None
            route = self._policy.route(address, index)._replace(metric=None)
            if dropped and claims_.have((*dropped, *after), found) or (
                    not dropped and found in macs):
                # The kernel would use the MAC address of the neighbour for
                # some seconds, and the next pod has another one.
                items += [route, Neighbour(address, index, '', None)]
            elif found is not None and macs:
                LOG.warning('Keeping %s on %s: %s has the address and is not '
                            'recorded yet', address, name, found)
            applied = apply(netlink, self._guard(name),
                            [Work(address, unset=tuple(items))])
            if applied.guard_error is not None:
                LOG.error('%s', applied.guard_error)
            for err in applied.errors.values():
                raise err
            deleted |= route in applied.items
        return deleted

    def _set(self, netlink: kernel.Netlink, records: Collection[Record],
             moves: dict[IPAddress, Move], failure: Failures, say: Say
             ) -> Optional[Break0]:
        """Set what the addresses of one interface must have.

        What is refused is refused before anything is admitted, and nothing is
        left of the claims that were there before. All else is added as if
        nothing was there; what the kernel has already is read then, and
        compared.
        """
        if not records:
            return None
        first = next(iter(records))
        break0 = self.devices.get(netlink, first.parent)
        sources: dict[IPAddress, Optional[IPAddress]] = {}
        existing: set[IPAddress] = set()
        blocked: set[IPAddress] = set()
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
                # NLM_F_EXCL does not notice a route of another metric.
                present = netlink.route_to(address)
                try:
                    self.routes.require_free(route, filter(None, [present]))
                except exceptions.ForeignRoute:
                    blocked.add(address)
                    raise
                sources[address] = route.src
                if present and (present.table, present.metric) == (
                        route.table, route.metric):
                    existing.add(address)
        for address, move in moves.items():
            if address in blocked or any(claim.parent != first.parent
                                         for claim in move.before):
                kept = set() if address in blocked else {break0.name}
                with failure.collect(address):
                    self._withdraw(
                        netlink, address, self.devices.names(recorded=True)
                        - kept, move.before, move.after)
        refused = [record for record in records
                   if record.address in failure.failed]
        admitted = by_address(pairs(record for record in records
                                    if record not in refused))
        earlier = by_address(pairs([*refused, *(
            claim for move in moves.values() for claim in move.before)]))

        def work(record: Record) -> Work:
            address = record.address
            items: list[Item] = [*admitted.get(address, ())]
            unset: list[Item] = [each for each in earlier.get(address, ())
                                 if each not in items]
            if address in sources:
                items += self._policy.items(record, break0.index,
                                            sources[address])
                if record.mac is None:  # an earlier pod may have one
                    unset.append(Neighbour(address, break0.index, '', None))
            return Work(address, tuple(items), tuple(unset), record,
                        is_new=address not in existing)

        applied = self._apply(netlink, break0, map(work, records), failure)
        if applied.is_device_lost:
            self.devices.renew(netlink, break0, first.parent)
            applied = self._apply(netlink, break0, map(work, records),
                                  failure)
        again = []
        for each in applied.works:
            err = applied.errors.get(each.address)
            with failure.collect(each.address):
                if err is not None and err.errno == errno.EEXIST:
                    # A dump shows routes that are not the one in use.
                    route, = of_kind(HostRoute, each.set)
                    self.routes.require_free(route, [
                        other for other in netlink.routes().host
                        if other.dst == each.address])
                    again.append(each._replace(is_new=False))
                elif err is not None:
                    raise err
        applied = self._apply(netlink, break0, again, failure)
        for address, err in applied.errors.items():
            failure.add(err, address)
        bound = [record for record in records if record.address in sources
                 and record.address not in failure.failed]
        for record in bound:
            say('Bound %s to %s for %s, source %s', record.address,
                break0.name, record.owner_text,
                sources[record.address] or 'by device')
        if first.netns is not None and bound:
            siblings = self.pods.configure(
                bound, self.pods.node_addresses(
                    netlink, break0, first.parent, set(sources.values())))
            self._apply(netlink, break0, [
                Work(address, tuple(items)) for address, items
                in by_address(pairs(siblings)).items()], failure)
        # The node may have asked the LAN for them, before they were here.
        self._guard(break0.name).release(
            netlink, kernel.find_ifindex(first.parent),
            {record.address: record.mac for record in bound})
        return break0

    def _apply(self, netlink: kernel.Netlink, break0: Break0,
               works: Iterable[Work], failure: Failures) -> Applied:
        """Apply works of a bind, to which a failing guard is no error.

        Unless [break0] guard is on.
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


def _is_gone(claim: Record) -> bool:
    return kernel.judge_state(*claim.place) is kernel.State.GONE
