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

"""What there is to do for a pod, and for the node."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import gc
import ipaddress
import math
import time
from typing import (Any, Callable, Collection, Iterable, Iterator, Mapping,
                    Optional)

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0.config import IPNetwork
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.introductions import Introductions
from kuryr_break0.journal import Done
from kuryr_break0.journal import Journal
from kuryr_break0.journal import timed
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import netns_id
from kuryr_break0.ledger import Owner
from kuryr_break0.ledger import Peer
from kuryr_break0 import netlink
from kuryr_break0.netlink import Verb
from kuryr_break0.plan import compute
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item
from kuryr_break0.plan import Neighbour
from kuryr_break0.plan import Plan
from kuryr_break0.plan import Wanted
from kuryr_break0.policy import Look
from kuryr_break0.policy import parent_of
from kuryr_break0.policy import Policy

LOG = logging.getLogger(__name__)

#: As LOG.info, but later; see :meth:`Break0Manager._locked`.
Say = Callable[..., None]

#: Seconds for which what was seen of the node is good: its next hops, its
#: addresses, and that break0 is what it should be. That it is there and up,
#: the kernel says to each pod.
FRESH = 30
#: Entries that one ADD or DEL looks at for sandboxes that are gone. More than
#: the 110 pods that kubelet allows on a node by default.
LOOKED_AT = 128
#: Addresses that a sync changes before it lets others have the lock.
CHANGED_AT_ONCE = 16
#: Seconds within which a route that was taken over is not taken again.
TRUCE = 60


class Break0Manager:
    """Keeps break0, and one host route through it per pod of this node.

    Nothing is kept in memory: every request may be a process of its own, and
    several at once are kept apart by the lock of the ledger.
    """

    def __init__(self, options: config.Options) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = Ledger(options.state_dir, options.lock_timeout)
        self._journal = Journal(options.state_dir)
        self._introductions = Introductions(options, self._ledger,
                                            self._journal)

    @timed(Done.BIND, Done.BIND_FAILED)
    def bind(self, owner: Owner, addresses: Iterable[IPAddress], *,
             parent: str, mac: Optional[str] = None,
             subnets: Collection[IPNetwork] = (),
             netns: Optional[str] = None, pod: Optional[str] = None,
             yielding: bool = False) -> None:
        """Make the addresses of a sandbox reachable through break0.

        Each belongs to this owner from now on, whose it was before. The
        ledger is written before the routes: killed at any instruction, what
        is left is a record without a route, never a live pod without a
        record.

        :param parent: the interface that the pod's macvlan is on
        :param mac: MAC address of the pod's interface
        :param subnets: the networks that it is in on the link
        :param netns: path of the pod's namespace
        :param pod: its namespace and name in Kubernetes
        :param yielding: refuse what another sandbox has that is not gone,
            and a namespace that is
        :raises Break0Error: the first that hindered one of the addresses;
            the others are bound all the same
        """
        failure = Failures()
        entries: list[Entry] = []
        passed: list[IPAddress] = []
        peer = None
        bare = False
        # What can be is done before others have to wait.
        with netlink.Kernel() as kernel:
            for address in addresses:
                with failure.noted():
                    self._require_usable(kernel, address)
                    entries.append(Entry(
                        address, owner, parent, mac, tuple(subnets), netns,
                        netns_id(netns), pod=pod))
            if not entries:
                failure.raise_first()  # nothing to make break0 for
            sources = {entry.address: self._policy.source(entry)
                       for entry in entries}
            with self._locked() as say:
                if yielding:
                    entries = list(self._free(entries, failure))
                with failure.noted():
                    self._require_parent(parent)
                    index, break0_mac, bare = self._device(kernel, parent)
                    peer = self._peer(kernel, parent, break0_mac,
                                      sources.values())
                if netns is not None:
                    entries = [dataclasses.replace(entry, peer=peer)
                               for entry in entries]
                for entry in entries:
                    # An unwritable ledger must not cost the pod its route.
                    with failure.logged():
                        earlier = self._ledger.get(entry.address)
                        if earlier is not None and earlier.owner != owner:
                            passed.append(entry.address)
                        self._ledger.put(entry)
                if peer is not None:
                    for entry in entries:
                        with failure.noted():
                            bare |= self._bind(kernel, entry, index,
                                               sources[entry.address], say)
        self._forget_connections(passed)
        if peer is not None:
            self._introductions.introduce(entries, peer)
        if bare:
            # It was created or brought up, so those of the others are gone.
            with failure.logged():
                self.sync()
        failure.raise_first()

    @timed(Done.UNBIND, Done.UNBIND_FAILED)
    def unbind(self, owner: Owner, addresses: Iterable[IPAddress],
               netns: Optional[str] = None) -> None:
        """Take back what :meth:`bind` did for these addresses.

        Those that belong to another owner by now are left to it, since a
        DEL can come late. What is not there is fine. The ledger is written
        last.

        :param netns: path of the sandbox's namespace, by which what was
            adopted is known as its own; see :meth:`Owner.adopted`
        :raises Break0Error: the first that hindered one of the addresses;
            the others are unbound all the same
        """
        failure = Failures()
        removed = []
        owners = {owner}
        if netns is not None:
            owners.add(Owner.adopted(netns, owner.ifname) or owner)
        with netlink.Kernel() as kernel, self._locked() as say:
            index = netlink.index_of(self._options.device)
            for address in addresses:
                with failure.noted():
                    entry = self._ledger.get(address)
                    if entry is not None and entry.owner not in owners:
                        say('%s stays bound: it belongs to %s, not to %s '
                            'any more', address, entry.owner, owner)
                        continue
                    deleted = index is not None and self._unset(
                        kernel, address, index)
                    self._ledger.remove(address)
                    if entry is not None:
                        removed.append(entry)
                    say('Unbound %s from %s for %s%s', address,
                        self._options.device, owner,
                        '' if deleted else ' (it had no route)')
        self._forget_connections(entry.address for entry in removed)
        self._introductions.leave(removed)
        failure.raise_first()

    def sync(self, dry_run: bool = False) -> Plan:
        """Make break0, routes and neighbours what the ledger says.

        What is read is read without the lock, so each change is decided
        again under it, by the entry that its address has then.

        :param dry_run: change nothing
        :returns: what there was to do
        :raises Break0Error: the first that hindered it; what else there is
            to do is done
        """
        failure = Failures()
        with netlink.Kernel() as kernel:
            with _uncollected():
                entries, unreadable = self._ledger.read()
                gone = [entry for entry in entries if entry.sandbox_gone]
                live = {entry.address: entry for entry in entries
                        if not entry.sandbox_gone}
                if live and not dry_run:
                    with self._locked():
                        # None, if all of them have been unbound meanwhile.
                        if any(map(self._ledger.get, live)):
                            self._ensure(kernel, parent_of(live.values()))
                look = Look(kernel, kernel.link(self._options.device))
                desired, refused = self._policy.desired(look, live)
                keep = unreadable | self._unclaimed(
                    look.ours(self._options.route_protocol)
                    - {entry.address for entry in entries}, dry_run)
                plan = self._policy.plan(look, desired, keep)
            for address, reason in refused.items():
                LOG.error('%s', self._policy.refused(address, reason))
            for route in plan.foreign:
                LOG.error('%s', self._foreign(route))
            if not dry_run:
                self._apply(kernel, plan, live, gone, failure)
                peer = self._policy.peer_seen(look, live, desired)
                if peer is not None:
                    self._introductions.introduce_all(live, peer)
        failure.raise_first()
        return plan

    def tend(self) -> None:
        """Do a little for the other pods of the node, after an ADD or DEL.

        At a cost that does not grow with them, but for what is said of
        :meth:`_restore`.

        :raises Break0Error: the first that hindered it
        """
        failure = Failures()
        with failure.noted():
            self._prune()
        with failure.noted():
            self._restore()
        failure.raise_first()

    def _prune(self) -> None:
        """Unbind some addresses whose sandbox is gone.

        Of a DEL for a pod that the API has forgotten, Kuryr tells nobody, so
        each ADD and DEL looks for such: the next one goes on where this one
        ends.
        """
        position = (self._ledger.recall('pruned', math.inf) or [0])[0]
        addresses, count = self._ledger.some(position, LOOKED_AT)
        if count > LOOKED_AT:
            self._ledger.remember('pruned', [(position + LOOKED_AT) % count])
        failure = Failures()
        for address in filter(self._ledger.may_be_gone, addresses):
            with failure.noted():
                entry = self._ledger.get(address)
                if entry is not None and entry.sandbox_gone:
                    LOG.info('The sandbox %s of %s on %s is gone',
                             entry.owner, address, self._options.device)
                    self.unbind(entry.owner, [address])
                    self._journal.add(Done.SANDBOX_GONE)
        failure.raise_first()

    def _restore(self) -> None:
        """Where no agent watches, sync if routes are missing.

        They are counted, in a text that the kernel writes: about 1 ms for
        1,000 routes. What a sync could not set is not missed again.
        """
        if self._options.route_table != netlink.RT_TABLE_MAIN:
            return
        silent = self._ledger.attended()
        if silent is not None and silent <= self._options.patience:
            return
        expected = (self._ledger.recall('missing', math.inf) or [0])[0]
        missing = self._missing()
        if missing > expected:
            LOG.warning('%d addresses are without their route on %s: '
                        'restoring', missing, self._options.device)
            self.sync()
            missing = self._missing()
        if missing != expected:
            self._ledger.remember('missing', [missing])

    def _missing(self) -> int:
        with self._locked():  # so that no pod is half bound
            return (self._ledger.count()
                    - netlink.count_host_routes(self._options.device))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Say]:
        """Keep others out.

        :returns: a LOG.info whose lines are written when the lock is free
            again, since to write one can take as long as to set a route
        """
        said: list[tuple[Any, ...]] = []
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._ledger.lock())
                except exceptions.LedgerUnavailable as err:
                    # Without its directory there is no ledger to keep right,
                    # and a pod is worth more than the lock.
                    LOG.error('Working without a lock. %s', err)
                yield lambda *line: said.append(line)
        finally:
            for line in said:
                LOG.info(*line)

    def _require_parent(self, parent: str) -> None:
        configured = self._options.parent
        if configured is None or configured == parent:
            return
        if netlink.index_of(configured) is None:
            raise exceptions.ParentNotFound(parent=configured)
        raise exceptions.ParentMismatch(configured=configured, actual=parent)

    def _require_usable(self, kernel: netlink.Kernel,
                        address: IPAddress) -> None:
        """Refuse what cannot be the address of a pod.

        :raises AddressRefused: saying why
        """
        self._policy.require_allowed(address)
        reason = None
        try:
            if netlink.source_for(address) == address:
                reason = 'an address of the node itself'
        except PermissionError:
            reason = 'not of a host, by the routes of the node'
        if reason is None:
            next_hops = self._ledger.recall('next_hops', FRESH)
            if next_hops is None:
                next_hops = sorted(map(str, kernel.next_hops(
                    netlink.index_of(self._options.device) or 0)))
                self._ledger.remember('next_hops', next_hops)
            if str(address) in next_hops:
                reason = 'a next hop of a route of the node'
        if reason is not None:
            raise self._policy.refused(address, reason)

    def _free(self, entries: Iterable[Entry],
              failure: Failures) -> Iterator[Entry]:
        """Those whose address no other living sandbox has."""
        for entry in entries:
            with failure.noted():
                if entry.netns is not None and entry.netns_id is None:
                    raise exceptions.NetnsUnusable(netns=entry.netns,
                                                   reason='is gone')
                other = self._ledger.get(entry.address)
                if (other is not None and other.owner != entry.owner
                        and not other.sandbox_gone):
                    raise exceptions.AddressTaken(
                        address=entry.address, owner=other.owner,
                        **vars(other.owner))
                yield entry

    def _device(self, kernel: netlink.Kernel,
                parent: str) -> tuple[int, str, bool]:
        """Make sure of break0; its ifindex, MAC, and if it has no routes.

        An ifindex is not used again, so the interface that has it is the
        one that was looked at.
        """
        index = netlink.index_of(self._options.device)
        if index is not None:
            seen = self._ledger.recall('device', FRESH)
            if seen and seen[1:] == self._seen(index, parent):
                return index, seen[0], False
        link, bare, _ = self._ensure(kernel, parent)
        self._ledger.remember('device', [link.mac, *self._seen(link.index,
                                                               parent)])
        return link.index, link.mac, bare

    def _ensure(self, kernel: netlink.Kernel,
                parent: str) -> device.Ensured:
        """See :func:`device.ensure`; a repair, but for the first pod."""
        ensured = device.ensure(kernel, self._options, parent)
        if ensured.bare or ensured.corrected:
            with contextlib.suppress(exceptions.LedgerUnavailable):
                if self._ledger.addresses():
                    self._journal.add(Done.DEVICE)
        return ensured

    def _seen(self, index: int, parent: str) -> list[Any]:
        return [index, netlink.index_of(parent), self._options.mac,
                *map(str, self._options.addr)]

    def _peer(self, kernel: netlink.Kernel, parent: str, mac: str,
              sources: Collection[Optional[IPAddress]]) -> Peer:
        """What pods are to know of the node.

        Its addresses are read again if it turns out to speak from another.
        """
        index = netlink.index_of(parent)
        known = self._ledger.recall('host_addresses', FRESH)
        if (known is None or known[0] != index
                or {str(src) for src in sources if src} - set(known[1:])):
            known = [index, *(str(address) for at, address
                              in kernel.addresses() if at == index)]
            self._ledger.remember('host_addresses', known)
        return self._policy.peer(map(ipaddress.ip_address, known[1:]),
                                 sources, mac)

    def _bind(self, kernel: netlink.Kernel, entry: Entry, index: int,
              src: Optional[IPAddress], say: Say) -> bool:
        """Set what an address is to have; if break0 had lost all of it.

        :raises ForeignRoute: if there is one that is to be left alone
        """
        wanted = self._policy.wanted(entry, index, src)
        if wanted is None:
            LOG.debug('IPv6 is off on %s, so %s is not reachable through it',
                      self._options.device, entry.address)
            return False
        if entry.address.version == 6 and not self._options.static_neighbours:
            LOG.warning('From its pod, %s, the node cannot be reached: that '
                        'needs [break0] static_neighbours', entry.address)
        bare = False
        err = self._add(kernel, wanted)
        if err is not None and err.device_lost:
            # break0 is down, or has just gone.
            link, bare, _ = self._ensure(kernel, entry.parent)
            wanted = self._policy.wanted(entry, link.index, src) or wanted
            err = self._add(kernel, wanted)
        if err is not None and err.errno == errno.EEXIST:
            self._replace(kernel, wanted)
        elif err is not None:
            raise err
        say('Bound %s to %s for %s, source %s', entry.address,
            self._options.device, entry.owner, src or 'by device')
        return bare

    def _add(self, kernel: netlink.Kernel,
             wanted: Wanted) -> Optional[exceptions.KernelRefused]:
        """Set neighbour and route where there is no route."""
        changes: list[netlink.Change] = [(Verb.ADD, wanted.route)]
        if wanted.neighbour is not None:
            # Before the route, or it might be asked for on the wire.
            changes.insert(0, (Verb.REPLACE, wanted.neighbour))
        *others, err = kernel.change(changes)
        for other in others:
            if other is not None and not other.device_lost:
                LOG.error('%s', other)
        return err

    def _replace(self, kernel: netlink.Kernel, wanted: Wanted) -> None:
        """Set a route in place of what is there, if that may be."""
        route = wanted.route
        present = kernel.route_to(route.dst)
        # One that is not the one in use is only to be seen in a dump.
        in_the_way = ([present] if present is not None
                      and present.table == route.table else
                      [each for each in kernel.routes().host
                       if each.dst == route.dst])
        plan = compute({route.dst: wanted}, in_the_way,
                       device=route.oif or 0, protocol=route.protocol,
                       takeover=self._options.takeover)
        if not plan.replace and plan.foreign:
            raise self._foreign(plan.foreign[0])
        for foreign in plan.foreign:
            self._take_over(foreign)
        changes: list[netlink.Change] = [(Verb.REPLACE, route)]
        if wanted.neighbour is None:
            # It was an earlier pod's, which had another MAC.
            changes.append((Verb.DELETE, Neighbour(
                route.dst, route.oif or 0, '', None)))
        err = kernel.change(changes)[0]
        if err is not None:
            raise err

    def _unset(self, kernel: netlink.Kernel, address: IPAddress,
               index: int) -> bool:
        """Delete what an address has; whether it had a route.

        The neighbour too if it was learnt: the next pod of this address has
        another MAC, and the kernel would use the old one for some seconds.
        """
        err, neighbour_err = kernel.change([
            (Verb.DELETE, self._policy.route(address, index)),
            (Verb.DELETE, Neighbour(address, index, '', None))])
        if neighbour_err is not None and not neighbour_err.absent:
            LOG.debug('%s', neighbour_err)
        if err is not None and not err.absent:
            raise err
        return err is None

    def _apply(self, kernel: netlink.Kernel, plan: Plan,
               live: Mapping[IPAddress, Entry], gone: list[Entry],
               failure: Failures) -> None:
        taken = {route.dst: route for route in plan.foreign}
        to_set: dict[IPAddress, list[netlink.Change]] = {}
        to_delete: dict[IPAddress, list[netlink.Change]] = {}
        wanted: list[Item] = [*plan.learn, *plan.replace]
        for item in wanted:
            to_set.setdefault(item.dst, []).append((Verb.REPLACE, item))
        unclaimed: list[Item] = [*plan.delete, *plan.forget]
        for item in unclaimed:
            to_delete.setdefault(item.dst, []).append((Verb.DELETE, item))

        owners = {entry.address: entry.owner
                  for entry in [*live.values(), *gone]}
        counted_below = {entry.address for entry in gone}

        def may_set(address: IPAddress) -> bool:
            if not self._ledger.is_as_read(address):
                return False  # whoever changed it has done it
            if address in taken:
                self._take_over(taken[address])
            return True

        def may_delete(address: IPAddress) -> bool:
            entry = self._ledger.get(address)
            return (entry is None or entry.sandbox_gone
                    or entry == live.get(address))

        for may, changes in ((may_set, to_set), (may_delete, to_delete)):
            for some in _chunks(list(changes), CHANGED_AT_ONCE):
                batch: list[netlink.Change] = []
                with self._locked() as say:
                    for address in some:
                        with failure.noted():
                            if may(address):
                                batch += changes[address]
                    done: collections.Counter[Done] = collections.Counter()
                    for change, err in zip(batch, kernel.change(batch)):
                        address = change[1].dst
                        if (self._changed(change, err, owners.get(address),
                                          failure, say)
                                and address not in counted_below):
                            done[_repair(change)] += 1
                for reason, times in done.items():
                    self._journal.add(reason, times=times)
                if failure.device_lost:
                    return  # the others would fail alike
        for entry in gone:
            with failure.noted(), self._locked() as say:
                if self._ledger.get(entry.address) == entry:
                    self._ledger.remove(entry.address)
                    self._journal.add(Done.SANDBOX_GONE)
                    say('Unbound %s from %s: its sandbox %s is gone',
                        entry.address, self._options.device, entry.owner)
                    self._forget_connections([entry.address])

    def _changed(self, change: netlink.Change,
                 err: Optional[exceptions.KernelRefused],
                 owner: Optional[Owner], failure: Failures,
                 say: Say) -> bool:
        """Log a change, or note why there was none."""
        verb, what = change
        if err is not None and not (verb is Verb.DELETE and err.absent):
            failure.note(err)
            return False
        say('%s the %s of %s on %s for %s',
            'Deleted' if verb is Verb.DELETE else 'Set',
            'route' if isinstance(what, HostRoute) else 'neighbour',
            what.dst, self._options.device, owner or 'nobody')
        return True

    @staticmethod
    def _forget_connections(addresses: Iterable[IPAddress]) -> None:
        """Let none of an earlier pod's connections be the next one's."""
        for address in addresses:
            try:
                netlink.forget_connections(address)
            except exceptions.KernelRefused as err:
                LOG.debug('%s', err)

    def _unclaimed(self, addresses: set[IPAddress],
                   dry_run: bool) -> set[IPAddress]:
        """Those that have not been without an entry for long enough."""
        now = time.time()
        before = dict(self._ledger.recall('unclaimed', math.inf) or [])
        since = {str(address): before.get(str(address), now)
                 for address in addresses}
        if since != before and not dry_run:
            self._ledger.remember('unclaimed', sorted(since.items()))
        return {address for address in addresses
                if now - since[str(address)] < self._options.gc_grace}

    @staticmethod
    def _foreign(route: HostRoute, reason: str = 'it is left alone, unless '
                 '[break0] takeover is set') -> exceptions.ForeignRoute:
        return exceptions.ForeignRoute(
            address=route.dst, on=netlink.name_of(route.oif),
            protocol=route.protocol, reason=reason)

    def _take_over(self, route: HostRoute) -> None:
        """Note that a route of others is about to be replaced.

        :raises ForeignRoute: if it has just been replaced already
        """
        now = time.time()
        recent = {address: when for address, when in
                  self._ledger.recall('takeovers', TRUCE) or []
                  if now - when < TRUCE}
        if str(route.dst) in recent:
            raise self._foreign(
                route, 'somebody has set it again after it was taken over, '
                'so it is left alone for a minute')
        recent[str(route.dst)] = now
        self._ledger.remember('takeovers', sorted(recent.items()))
        LOG.warning('Taking over the route of %s on %s with protocol %s',
                    route.dst, netlink.name_of(route.oif), route.protocol)
        self._journal.add(Done.TAKEOVER)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
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


def _repair(change: netlink.Change) -> Done:
    verb, what = change
    if verb is Verb.DELETE:
        return Done.UNCLAIMED
    return Done.ROUTE if isinstance(what, HostRoute) else Done.NEIGHBOUR


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start:start + size]
