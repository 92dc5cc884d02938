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
import logging
from typing import Any, Collection, Iterable, Iterator, Mapping, Optional

from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import Guard
from kuryr_break0.guard import pair
from kuryr_break0.guard import pairs
from kuryr_break0.guard import said
from kuryr_break0.guard import unclaimed_pairs
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger import files
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import follows
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Journal
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.plan import Plan
from kuryr_break0 import podside
from kuryr_break0.policy import Policy
from kuryr_break0 import snapshot
from kuryr_break0.snapshot import Parent
from kuryr_break0.snapshot import Snapshot

LOG = log.get_logger(__name__)

#: Addresses that a sync changes before it lets others have the lock.
CHANGED_AT_ONCE = 16
#: Pods whose namespaces one sync enters to compare the pod side, beside those
#: that are known to differ. Each takes about half a millisecond.
ENTERED = 128
#: Seconds within which a route that was taken over is not taken again.
TRUCE = 60


@dataclasses.dataclass(frozen=True)
class Outcome(Plan):
    """What there was to do on all parents, and what it came to.

    :ivar devices: what break0 was and should not be, by its name
    :ivar pods: the sandboxes whose pod side differed
    :ivar rebuilt: records that were made of what the kernel holds
    :ivar gone: records whose sandbox is proven not to exist
    :ivar unjudged: records of which that cannot be found out, and why
    :ivar errors: what failed
    """

    devices: tuple[tuple[str, str], ...] = ()
    pods: tuple[Owner, ...] = ()
    rebuilt: tuple[Record, ...] = ()
    gone: tuple[Record, ...] = ()
    unjudged: Mapping[Record, str] = dataclasses.field(default_factory=dict)
    errors: tuple[exceptions.Break0Error, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.devices or self.pods or self.rebuilt or self.gone
                    or super().__bool__())


class Reconciler:
    """Compares snapshot and ledger, and makes the difference none."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 journal: Journal) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._journal = journal

    def ensure_device(self, netlink: kernel.Netlink, parent: str,
                      claim: bool = False) -> device.Ensured:
        """Make sure of the break0 of a parent. Call it under the lock.

        :param claim: take it over if it belongs to another ledger
        :raises Break0Error: if it cannot be made so
        :raises OtherLedger: if it belongs to another ledger and stays so
        """
        options, ledger = self._options, self._ledger
        try:
            identity = ledger.ensure_identity()
        except exceptions.LedgerUnavailable as err:
            # A pod is worth more than a MAC address that stays the same.
            LOG.error('%s', err)
            identity = Identity.new()
        link = netlink.link(options.device)
        others = device.devices(identity, netlink.link, (parent,))
        primary = device.primary_of(options, others, link, ())
        name = device.name_for(options, parent, primary, others)
        if name != options.device:
            link = netlink.link(name)
        other = device.owned_by_other(link, identity) if link else None
        if other is not None and not claim:
            raise self.other_ledger(name, other)
        made = device.Device(options, name, parent, identity)
        ensured = made.ensure(netlink, device.derived_mac(identity.secret,
                                                          name))
        known = dataclasses.replace(
            identity,
            devices={**{other_parent: each for other_parent, each
                        in others.items() if each != name},
                     parent: name},
            macs={**identity.macs, name: ensured.link.mac})
        if other is not None and other.directory == options.state_dir:
            known = dataclasses.replace(known, claimed={
                **identity.claimed, name: other.ledger})
        if known != identity:
            ledger.cache.drop('device.' + parent)  # it has the earlier MAC
            with Failures().logged():
                ledger.put_identity(known)
        if ensured.repaired:
            with contextlib.suppress(exceptions.LedgerUnavailable):
                # A repair, unless it is made for the first pod.
                if not claim or ledger.records.count() > 1:
                    self._journal.add(Done.DEVICE)
        self._ensure_guard(netlink, ensured.link, parent)
        return ensured

    def other_ledger(self, name: str, other: Alias) -> exceptions.OtherLedger:
        """Return the error of a break0 that belongs to another ledger."""
        return exceptions.OtherLedger(
            device=name, own=self._options.state_dir, **other._asdict())

    def is_others(self, link: Optional[kernel.Link]) -> bool:
        """Return whether a break0 is another ledger's, and say so.

        That may know of pods which this one does not know, so nothing is
        taken away there.

        :raises LedgerUnavailable: if the identity of this one is damaged
        """
        identity = self._ledger.identity()
        other = device.owned_by_other(link, identity) if link else None
        if link is None or other is None or follows(
                identity, self._options.state_dir, other, link.name):
            return False
        LOG.warning('%s', self.other_ledger(link.name, other))
        return True

    def _ensure_guard(self, netlink: kernel.Netlink, link: kernel.Link,
                      parent: str) -> None:
        """Make sure of the guard of a break0.

        :raises GuardUnavailable: if it cannot be had and [break0] guard is
            on; else that is logged, once
        """
        guarding = Guard(self._options, self._ledger, link.name)
        if not guarding.is_wanted and not guarding.is_loaded():
            return
        try:
            found, index = netlink.addresses(), kernel.index_of(parent)
            hosts = self._policy.solicited(
                {each.address for each in found},
                [each.address for each in found if each.ifindex == index],
                link.name)
            if guarding.is_wanted and guarding.is_intact(link, hosts):
                return
            claims, _ = self._ledger.records.read()
            guarding.ensure(link, {
                *pairs(each[0] for each in claims.values()
                       if each[0].parent == parent),
                *self._unclaimed_pairs(netlink, link, claims)}, hosts)
            self.warn_once('unguarded', '')
        except (exceptions.GuardUnavailable, exceptions.KernelRefused,
                exceptions.LedgerUnavailable, OSError) as err:
            if self._options.guard == config.ON:
                raise
            self.warn_once('unguarded', str(err))

    def warn_once(self, what: str, text: str, fact: str = '') -> None:
        """Log something that is wrong, unless that was the last thing logged.

        :param what: the name that it is cached by
        :param text: empty if it is not wrong any more
        :param fact: compared in place of a text that changes
        """
        known = [text and (fact or text)]
        if (self._ledger.cache.get(what) or ['']) != known:
            self._ledger.cache.put(what, known)
            if text:
                LOG.warning('%s', text)

    def _unclaimed_pairs(self, netlink: kernel.Netlink, link: kernel.Link,
                         claimed: Collection[IPAddress]) -> set[kernel.Pair]:
        options = self._options
        return unclaimed_pairs(
            netlink.host_routes_of(link.index, options.route_table),
            netlink.neighbours(link.index), options.route_protocol, claimed)

    def repair_guard(self, netlink: kernel.Netlink, parent: Parent,
                     seen: Snapshot) -> bool:
        """Let the guard know just the pods of a parent.

        :returns: whether it knew others
        :raises KernelRefused: if the kernel refuses it
        """
        guarding = Guard(self._options, self._ledger, parent.device)
        if (parent.link is None or not guarding.is_loaded()
                or not (parent.barred or parent.admitted)):
            return False
        wrong = parent.barred | parent.admitted
        # With what decides about these: the other records of their pods.
        pods = {parent.live[address].namespace for address in wrong
                if address in parent.live} - {None}
        records = {address: self._ledger.records.get(address)
                   for address in wrong.union(
                       address for address, record in parent.live.items()
                       if record.namespace in pods)}
        missing, extra = guarding.difference(
            pairs(record for address, record in records.items()
                  if record is not None and record.parent == parent.name
                  and address not in seen.refused),
            self._unclaimed_pairs(netlink, parent.link, {
                address for address, record in records.items() if record}))
        looked_at = {address.packed for address in records}
        extra = {each for each in extra if each.address in looked_at}
        guarding.change(missing, extra)
        return bool(missing or extra)

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
            outcome = _Sync(self, netlink, failure, dry_run, claim,
                            prune).run()
        return dataclasses.replace(outcome, errors=tuple(failure.errors))

    def remove_gone(self, addresses: Iterable[IPAddress]) -> list[Record]:
        """Remove claims whose sandbox is proven not to exist.

        :returns: the claims that are left on these addresses
        :raises Break0Error: the first error of one of the addresses
        """
        failure = Failures()
        left: list[Record] = []
        with kernel.Netlink() as netlink:
            for address in addresses:
                with failure.noted():
                    left += self.remove_gone_claims(netlink, address)
        failure.raise_first()
        return left

    def remove_gone_claims(self, netlink: kernel.Netlink, address: IPAddress
                           ) -> list[Record]:
        """Remove the claims of gone sandboxes on one address.

        :returns: the claims that are left
        :raises Break0Error: if that fails; then they are still there
        """
        with self._ledger.lock():
            claims = self._ledger.records.claims(address)
            judge = kernel.Judge()
            gone = [claim for claim in claims if judge.judge(
                *claim.place).state is kernel.State.GONE]
            left = [claim for claim in claims if claim not in gone]
            if not gone:
                return left
            if left:
                self._ledger.records.put(left)
            else:
                self._withdraw(netlink, gone)
                self._ledger.records.remove(address)
        for claim in gone:
            LOG.info('Sandbox %s no longer exists; removed %s from break0',
                     claim.owner, address)
            self._journal.add(Done.SANDBOX_GONE)
        if not left:
            forget_connections([address])
        return left

    def _withdraw(self, netlink: kernel.Netlink, gone: list[Record]) -> None:
        """Delete routes and neighbour of an address that is nobody's.

        But not if its neighbour has another MAC address than any of the
        sandboxes had: then a pod has it that could not be recorded. Nor on a
        break0 of another ledger, which may know of one.
        """
        identity = self._ledger.identity()
        address = gone[0].address
        names = {self._options.device, *(
            identity.devices.values() if identity else ())}
        macs = {claim.mac for claim in gone}
        for name in names:
            link = netlink.link(name)
            if link is None or self.is_others(link):
                continue
            Guard(self._options, self._ledger, name).change(
                (), [pair(address, mac) for mac in macs
                     | {each for claim in gone for each in claim.siblings}])
            present, state = netlink.neighbour(link.index, address)
            if (state == 'permanent' and None not in macs
                    and present not in macs):
                continue
            for err in netlink.change(removals(
                    self._policy.route(address, link.index))):
                if err is not None and not err.absent:
                    raise err


class _Sync:
    """One sync."""

    def __init__(self, reconciler: Reconciler, netlink: kernel.Netlink,
                 failure: Failures, dry_run: bool, claim: bool,
                 prune: bool) -> None:
        self._reconciler = reconciler
        self._options = reconciler._options
        self._ledger = reconciler._ledger
        self._records = reconciler._ledger.records
        self._journal = reconciler._journal
        self._netlink = netlink
        self._failure = failure
        self._dry_run = dry_run
        self._claim = claim
        self._prune = prune

    def run(self) -> Outcome:
        if not self._dry_run:
            with self._ledger.lock():
                # It moves to quarantine what is damaged.
                self._note_parents(self._records.read()[0].values())
                self._records.sweep()
        seen = self._read()
        devices = self._ensure_devices(seen)
        if devices and not self._dry_run:
            seen = self._read()
        rebuilt = self._rebuild(seen)
        if rebuilt and not self._dry_run:
            seen = self._read()
        for address, reason in seen.refused.items():
            LOG.error('%s', self._reconciler._policy.refused(address, reason))
        if not self._dry_run:
            # Of how many, and of which one, may change with each sync.
            self._reconciler.warn_once('unjudged', seen.unjudged_problem,
                                       'some')
            self._ledger.cache.put('next_hops', sorted(map(
                str, seen.routes.next_hops)))  # which spares the next bind it
            self._ledger.note_next_hops(seen.routes.next_hops
                                        | seen.routes.left_out)
        own = [parent.plan for parent in seen.parents.values()
               if not self._is_left(seen, parent)]
        items: dict[str, Any] = {
            name: tuple(item for plan in own for item in getattr(plan, name))
            for name in ('replace', 'delete', 'foreign', 'learn', 'forget')}
        claimed = {record.address for record in rebuilt}
        outcome = Outcome(devices=tuple(devices), rebuilt=tuple(rebuilt),
                          gone=seen.gone, unjudged=seen.unjudged,
                          unclaimed=tuple(
                              item for parent in seen.parents.values()
                              for item in parent.plan.unclaimed
                              if item.dst not in claimed), **items)
        if self._prune:
            outcome = self._pruned(outcome, {
                item for plan in own for item in plan.unclaimed})
        for route in outcome.foreign:
            LOG.error('%s', foreign_route(route))
        if not self._dry_run:
            for parent in seen.parents.values():
                self._apply(seen, parent)
            for address in {record.address for record in seen.gone}:
                with self._failure.noted():
                    self._reconciler.remove_gone_claims(self._netlink,
                                                        address)
            self._note_taps(seen)
        return dataclasses.replace(outcome, pods=tuple(self._pods(seen)))

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

    def _note_parents(self, found: Iterable[tuple[Record, ...]]) -> None:
        """Note the ifindex of parents that an earlier version did not."""
        for claims in found:
            noted = [dataclasses.replace(claim, parent_index=kernel.index_of(
                claim.parent)) if claim.parent_index is None else claim
                for claim in claims]
            if noted != [*claims]:
                with self._failure.noted():
                    self._records.put(noted)

    def _read(self) -> Snapshot:
        return snapshot.read(self._options, self._ledger, self._netlink)

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
                    self._failure.note(self._reconciler.other_ledger(
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
            with self._failure.noted(), self._ledger.lock():
                # None, if all of them have been unbound meanwhile.
                if claim or any(map(self._records.get, parent.live)):
                    if texts:
                        self._reconciler.ensure_device(self._netlink,
                                                       parent.name, claim)
                    # Not where pods have come and gone since it was read.
                    if self._reconciler.repair_guard(self._netlink, parent,
                                                     seen):
                        found += [(parent.device, text)
                                  for text in known_wrongly]
        return found

    def _rebuild(self, seen: Snapshot) -> list[Record]:
        """Make records of what the kernel holds and the ledger does not.

        A macvlan on the same parent with the address, and with the MAC
        address of its neighbour if there is one, is what was bound.
        """
        wanted: dict[IPAddress, Parent] = {}
        for parent in seen.parents.values():
            if self._is_left(seen, parent):
                continue  # what another ledger has bound is recorded there
            for item in snapshot.items_of(parent):
                if (item.protocol == self._options.route_protocol
                        and item.dst in seen.contents.unreadable):
                    wanted[item.dst] = parent
            wanted.update({item.dst: parent
                           for item in parent.plan.unclaimed})
        if not wanted:
            return []
        rebuilt = []
        for macvlan in kernel.macvlans(self._options.netns_dirs,
                                       self._options.proc_dirs):
            for address in macvlan.addresses:
                found = wanted.get(address)
                if found is None or macvlan.parent != found.name:
                    continue
                neighbour = found.neighbours.get(address)
                if neighbour is not None and (
                        neighbour.mac != macvlan.link.mac):
                    continue
                record = dataclasses.replace(
                    self._sibling(seen, macvlan), address=address,
                    mac=macvlan.link.mac, parent=macvlan.parent,
                    parent_index=kernel.index_of(macvlan.parent),
                    netns=macvlan.netns, namespace=macvlan.namespace,
                    configured=None, bound_at=files.now())
                if self._dry_run or self._put_rebuilt(record):
                    rebuilt.append(record)
        return rebuilt

    @staticmethod
    def _sibling(seen: Snapshot, macvlan: kernel.Macvlan) -> Record:
        """Return a record of the same interface, which says whose it is."""
        for record in seen.live.values():
            if (record.namespace is not None
                    and record.namespace.is_same(macvlan.namespace)
                    and record.owner.ifname == macvlan.link.name):
                return record
        return Record(macvlan.addresses[0], Owner.adopted(
            macvlan.namespace, macvlan.link.name), macvlan.parent)

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

    def _pruned(self, outcome: Outcome, own: Collection[Item]) -> Outcome:
        """Turn what is unclaimed into what is to be deleted.

        :param own: what is on no break0 of another ledger
        """
        unclaimed = [item for item in outcome.unclaimed if item in own]
        if not self._dry_run:
            with self._ledger.lock():
                unclaimed = [item for item in unclaimed
                             if not self._records.claims(item.dst)]
                self._change(None, [(Verb.DELETE, item)
                                    for item in unclaimed], {})
        return dataclasses.replace(
            outcome, unclaimed=tuple(
                item for item in outcome.unclaimed if item not in own),
            delete=outcome.delete + tuple(
                item for item in unclaimed if isinstance(item, HostRoute)),
            forget=outcome.forget + tuple(
                item for item in unclaimed
                if not isinstance(item, HostRoute)))

    def _apply(self, seen: Snapshot, parent: Parent) -> None:
        """Change routes and neighbours of one parent, address by address."""
        if parent.link is None or self._is_left(seen, parent):
            return  # what another ledger knows of it is not known here
        plan = parent.plan
        replaced = {route.dst for route in plan.replace}
        taken = {route.dst: route for route in plan.foreign
                 if route.dst in replaced}
        to_set: dict[IPAddress, list[kernel.Change]] = {}
        to_delete: dict[IPAddress, list[kernel.Change]] = {}
        wanted: list[Item] = [*plan.learn, *plan.replace]
        for item in wanted:
            to_set.setdefault(item.dst, []).append((Verb.REPLACE, item))
        # With the record of a gone sandbox goes what it has.
        gone = {record.address for record in seen.gone}
        unwanted: list[Item] = [*plan.delete, *plan.forget]
        for item in unwanted:
            if item.dst not in gone:
                to_delete.setdefault(item.dst, []).append((Verb.DELETE,
                                                           item))

        def may_set(address: IPAddress) -> bool:
            claims = self._records.claims(address)
            if parent.live.get(address) not in claims[:1]:
                return False  # whoever changed it has done it
            if address in taken:
                take_over(taken[address], self._ledger, self._journal)
            return True

        def may_delete(address: IPAddress) -> bool:
            return (self._records.claims(address)
                    == seen.contents.claims.get(address, ()))

        owners = {address: record.owner
                  for address, record in parent.live.items()}
        for may, changes in ((may_set, to_set), (may_delete, to_delete)):
            for some in _chunks(list(changes), CHANGED_AT_ONCE):
                batch: list[kernel.Change] = []
                with self._failure.noted(), self._ledger.lock():
                    for address in some:
                        with self._failure.noted():
                            if may(address):
                                batch += changes[address]
                    if not self._change(parent, batch, owners):
                        return  # the others would fail alike

    def _change(self, parent: Optional[Parent], batch: list[kernel.Change],
                owners: Mapping[IPAddress, Owner]) -> bool:
        """Make changes, and say so; False if break0 is down or gone."""
        done: collections.Counter[Done] = collections.Counter()
        usable = True
        for (verb, item), err in zip(batch, self._netlink.change(batch)):
            if err is not None and not (verb is Verb.DELETE and err.absent):
                self._failure.note(err)
                usable &= not err.device_lost
                continue
            is_route = isinstance(item, HostRoute)
            LOG.info('%s the %s of %s%s for %s',
                     'Deleted' if verb is Verb.DELETE else 'Set',
                     'route' if is_route else 'neighbour', item.dst,
                     ' on ' + parent.device if parent else '',
                     owners.get(item.dst, 'nobody'))
            done[Done.UNCLAIMED if verb is Verb.DELETE else
                 Done.ROUTE if is_route else Done.NEIGHBOUR] += 1
        for reason, times in done.items():
            self._journal.add(reason, times=times)
        return usable

    def _pods(self, seen: Snapshot) -> Iterator[Owner]:
        """Configure the pod sides that are known to differ, and some more.

        Those that are compared go round, so that each has its turn.
        """
        cache = self._ledger.cache
        outdated: list[tuple[list[Record], NodeAddresses]] = []
        others: list[tuple[list[Record], NodeAddresses]] = []
        for records in seen.interfaces():
            for name in {record.parent for record in records}:
                parent = seen.parents[name]
                some = [record for record in records
                        if record.parent == name and record.netns is not None]
                if not some or parent.node is None or (
                        self._is_left(seen, parent)):
                    continue
                is_outdated = any(record.configured != parent.node.digest
                                  for record in some)
                (outdated if is_outdated else others).append(
                    (some, parent.node))
        position = (cache.get('entered') or [0])[0]
        if not isinstance(position, int) or not others:
            position = 0
        start = position % len(others) if others else 0
        turn = (others[start:] + others[:start])[:ENTERED]
        if len(others) > ENTERED and not self._dry_run:
            cache.put('entered', [(start + ENTERED) % len(others)])
        failed = set(cache.get('unconfigured') or ())
        still: list[str] = []
        for records, node in (*outdated, *turn):
            owner = records[0].owner
            try:
                changes = podside.repair(
                    records, node, self._options, self._dry_run)
            except exceptions.Break0Error as err:
                still.append(str(owner))
                if str(owner) not in failed:  # once, not with each sync
                    LOG.warning('The sandbox %s cannot be configured to '
                                'reach the node: %s', owner, err)
                continue
            if changes:
                yield owner
                LOG.log(logging.DEBUG if self._dry_run else logging.INFO,
                        'Configured %s for %s to reach the node',
                        ', '.join(str(record.address) for record in records),
                        owner)
            if not self._dry_run:
                if changes:
                    self._journal.add(Done.POD)
                self._put_configured(records, node)
        if sorted(failed) != sorted(still) and not self._dry_run:
            cache.put('unconfigured', still)

    def _put_configured(self, records: list[Record],
                        node: NodeAddresses) -> None:
        """Record that the pod side was configured, after it was."""
        outdated = [record for record in records
                    if record.configured != node.digest]
        if not outdated:
            return
        with self._failure.noted(), self._ledger.lock():
            for record in outdated:
                claims = self._records.claims(record.address)
                if claims and claims[0] == record:
                    self._records.put([dataclasses.replace(
                        record, configured=node.digest), *claims[1:]])
                elif not claims:
                    # It was unbound meanwhile, which found nothing yet.
                    with contextlib.suppress(exceptions.Break0Error):
                        podside.withdraw(record, self._options,
                                         lambda address: False)


def removals(route: HostRoute) -> list[kernel.Change]:
    """Return what deletes the route and the neighbour of an address."""
    return [(Verb.DELETE, dataclasses.replace(route, metric=None, src=None)),
            (Verb.DELETE, Neighbour(route.dst, route.oif or 0, '', None))]


def foreign_route(route: HostRoute, reason: str = 'it is left alone, unless '
                  '[break0] takeover is set') -> exceptions.ForeignRoute:
    """Return the error of a route of others in the way of a pod's."""
    return exceptions.ForeignRoute(
        address=route.dst, on=kernel.name_of(route.oif),
        protocol=route.protocol, reason=reason)


def take_over(route: HostRoute, ledger: Ledger, journal: Journal) -> None:
    """Note that a route of others is about to be replaced or overridden.

    :raises ForeignRoute: if it has just been replaced already
    """
    now = files.now()
    recent = {}
    with contextlib.suppress(TypeError, ValueError):
        recent = {str(address): float(when) for address, when
                  in ledger.cache.get('takeovers', TRUCE) or ()
                  if 0 <= now - float(when) < TRUCE}
    if str(route.dst) in recent:
        if route.metric != best_metric(route.dst):
            return  # it was not set again, but has stayed beside ours
        raise foreign_route(
            route, 'somebody has set it again after it was taken over, so it '
            'is left alone for a minute')
    recent[str(route.dst)] = now
    ledger.cache.put('takeovers', sorted(recent.items()))
    LOG.warning('Taking over the route of %s on %s with protocol %s',
                route.dst, kernel.name_of(route.oif), route.protocol)
    journal.add(Done.TAKEOVER)


def forget_connections(addresses: Iterable[IPAddress]) -> None:
    """Let none of an earlier pod's connections be the next one's."""
    for address in addresses:
        try:
            kernel.forget_connections(address)
        except exceptions.KernelRefused as err:
            LOG.debug('%s', err)


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
