# SPDX-License-Identifier: Apache-2.0

"""Binds and unbinds the addresses of one sandbox. What is done for each pod
costs the same for any number of pods: no dumps of what grows with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import itertools
from typing import Any, Callable, Collection, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import Guard
from kuryr_break0.guard import pair
from kuryr_break0.guard import pairs
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger import files
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Journal
from kuryr_break0.ledger.journal import timed
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SIBLINGS
from kuryr_break0.ledger.records import MAX_SUBNETS
from kuryr_break0 import log
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPNetwork
from kuryr_break0.model import MAC
from kuryr_break0.model import NAME
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted
from kuryr_break0.plan import compute
from kuryr_break0 import podside
from kuryr_break0 import policy
from kuryr_break0.policy import Policy
from kuryr_break0.reconciler import foreign_route
from kuryr_break0.reconciler import forget_connections
from kuryr_break0.reconciler import Outcome
from kuryr_break0.reconciler import Reconciler
from kuryr_break0.reconciler import take_over

LOG = log.get_logger(__name__)

#: As LOG.info, but later; see :meth:`Break0Manager._locked`.
Say = Callable[..., None]

#: Seconds for which what was read of the node is cached: its next hops, its
#: addresses, and that break0 is what it should be. That it is there and up,
#: the kernel says to each pod.
CACHED = 30
#: Addresses that one interface may have: each takes some 0.1 ms of the lock.
MAX_ADDRESSES = 512
#: Addresses that the housekeeping of one ADD or DEL examines for sandboxes
#: that are gone. More than the 110 pods that kubelet allows by default.
EXAMINED = 128


@dataclasses.dataclass
class _Shim:
    """The break0 that the addresses of one bind go through."""

    name: str
    index: int
    mac: str
    routes_lost: bool


class Break0Manager:
    """Keeps break0, and one host route through it per pod of this node.

    Nothing is kept in memory: every request may be a process of its own, and
    several at once are kept apart by the lock of the ledger.

    :param options: see :func:`kuryr_break0.config.load`
    """

    def __init__(self, options: config.Options) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = Ledger(options.state_dir, options.lock_timeout)
        self._records = self._ledger.records
        self._journal = Journal(options.state_dir)
        self._reconciler = Reconciler(options, self._ledger, self._journal)

    @timed(Done.BIND, Done.BIND_FAILED)
    def bind(self, owner: Owner, addresses: Iterable[IPAddress], *,
             parent: str, mac: Optional[str] = None,
             subnets: Collection[IPNetwork] = (),
             netns: Optional[str] = None, pod: Optional[str] = None,
             yielding: bool = False, origin: Optional[Origin] = None,
             network: Optional[str] = None) -> None:
        """Make the addresses of a sandbox reachable through break0.

        The newest claim on an address wins; those of other sandboxes that
        exist are kept, and count again when it is unbound. The ledger is
        written before the kernel: killed at any instruction, what is left is
        a record without a route, never a live pod without a record. Nor does
        any error but a refusal leave one without.

        :param parent: the interface that the pod's macvlan is on
        :param mac: MAC address of the pod's interface
        :param subnets: the networks that it is in on the link
        :param netns: path of the pod's namespace
        :param pod: its namespace and name in Kubernetes
        :param origin: by which way it came
        :param network: name of its CNI network
        :param yielding: refuse what another existing sandbox has, and leave
            no record of what fails
        :raises Break0Error: the first error of one of the addresses; the
            others are bound all the same
        """
        failure = Failures()
        namespace = None
        addresses, mac = _sane(owner, list(addresses), parent, mac, netns,
                               pod)
        parent_index = kernel.index_of(parent)
        parent = kernel.current_name(parent, parent_index)  # no altname
        if netns is not None:
            try:
                namespace = kernel.identify_or_fail(netns)
            except OSError as err:
                if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO,
                                 errno.EINVAL, errno.ELOOP):
                    raise exceptions.NetnsUnusable(
                        netns=netns, reason='is gone, or is another kind of '
                        'file') from err
                LOG.warning('Cannot identify the namespace %s, so its end '
                            'will not be noticed: %s', netns, err)
        tap = kernel.find_taps().get(mac) if mac and netns is None else None
        bound_at = files.now()
        # What can be is done before others have to wait.
        records = [Record(address, owner, parent, mac,
                          tuple(subnets)[:MAX_SUBNETS], netns, namespace,
                          pod, bound_at=bound_at, origin=origin,
                          network=network, parent_index=parent_index, tap=tap)
                   for address in self._usable(addresses, parent, origin,
                                               failure)]
        if not records:
            failure.raise_first()  # nothing to make break0 for
            return
        self._require_parent(parent)
        passed: list[IPAddress] = []
        replaced: list[Record] = []
        shim = None
        with self._locked() as say:
            records = list(self._recorded(records, passed, replaced, yielding,
                                          failure))
            with failure.noted(), kernel.Netlink() as netlink:
                shim = self._bind_all(netlink, records, failure, say,
                                      replaced)
            if yielding and failure.errors:
                self._roll_back(records, shim)
        forget_connections(passed)
        if shim is not None and shim.routes_lost:
            # It was created or brought up, so those of the others are gone.
            with failure.logged():
                self.sync()
        failure.raise_first()

    def _usable(self, addresses: Iterable[IPAddress], parent: str,
                origin: Optional[Origin],
                failure: Failures) -> Iterator[IPAddress]:
        """Return the addresses that may be those of a pod.

        What cannot be found out now is for the reconciler to refuse.
        """
        for address in addresses:
            try:
                reason = self._policy.not_allowed(address)
                if reason is None:
                    reason = self._not_usable(address, parent, origin)
            except (exceptions.Break0Error, OSError) as err:
                LOG.warning('Binding %s without knowing whether it is in use '
                            'on this node: %s', address, err)
                reason = None
            if reason is None:
                yield address
            else:
                failure.note(self._policy.refused(address, reason))

    def _not_usable(self, address: IPAddress, parent: str,
                    origin: Optional[Origin]) -> Optional[str]:
        try:
            if kernel.source_for(address) == address:
                return policy.OWN
        except PermissionError:
            return 'not of a host, by the routes of the node'
        # Only a socket in a VRF sees the addresses there. Before 5.7 it needs
        # CAP_NET_RAW to be there.
        with contextlib.suppress(PermissionError):
            if kernel.source_for(address, parent) == address:
                return policy.OWN
        next_hops = self._ledger.cache.get('next_hops', CACHED)
        if next_hops is None:
            with kernel.Netlink() as netlink:
                found = netlink.next_hops(
                    self._device_indexes(), self._options.route_protocol)
            next_hops = sorted(map(str, found))
            with contextlib.suppress(exceptions.LedgerUnavailable):
                self._ledger.prepare()  # by the first pod
            self._ledger.cache.put('next_hops', next_hops)
            self._ledger.note_next_hops(found)
        if str(address) in next_hops:
            return policy.NEXT_HOP
        return (policy.EARLIER_NEXT_HOP if origin is Origin.DISCOVERED
                and str(address) in self._ledger.next_hops_seen() else None)

    def _devices(self) -> set[str]:
        identity = self._ledger.identity()
        return {self._options.device,
                *(identity.devices.values() if identity else ())}

    def _device_indexes(self) -> list[int]:
        return [index for index in map(kernel.index_of, self._devices())
                if index is not None]

    def _require_parent(self, parent: str) -> None:
        configured = self._options.parent
        if not kernel.exists(configured or parent):
            raise exceptions.ParentNotFound(parent=configured or parent)
        if configured not in (None, parent):
            raise exceptions.ParentMismatch(configured=configured,
                                            actual=parent)

    def _recorded(self, records: Iterable[Record], passed: list[IPAddress],
                  replaced: list[Record], yielding: bool, failure: Failures
                  ) -> Iterator[Record]:
        """Write the records; those that may go on to the kernel.

        :param passed: gets the addresses that other sandboxes had
        :param replaced: gets the earlier claims of the same interface
        """
        for record in records:
            try:
                claims = self._records.claims(record.address)
            except exceptions.LedgerUnavailable as err:
                LOG.error('%s', err)
                claims = ()
            earlier = [claim for claim in claims
                       if _is_of_same_interface(claim, record)]
            replaced += earlier
            others = [claim for claim in claims if claim not in earlier]
            existing = [claim for claim in others if kernel.state(
                *claim.place) is not kernel.State.GONE]
            if yielding and existing:
                failure.note(exceptions.AddressTaken(
                    address=record.address, owner=existing[0].owner,
                    **vars(existing[0].owner)))
                continue
            if others:
                passed.append(record.address)
            # An unwritable ledger must not cost the pod its route: what is
            # in the kernel is recorded when it can be again.
            with failure.noted() if yielding else failure.logged():
                self._records.put([record, *(
                    claim for claim in existing
                    if claim.namespace or claim.tap)])
            yield record

    def _bind_all(self, netlink: kernel.Netlink, records: list[Record],
                  failure: Failures, say: Say,
                  replaced: Iterable[Record] = ()) -> Optional[_Shim]:
        """Make sure of break0, routes, neighbours and the pod side."""
        if not records:
            return None
        first = records[0]
        shim = self._shim(netlink, first.parent)
        sources = {record.address: self._policy.source(record, shim.name)
                   for record in records}
        bound = []
        with failure.noted():
            self._admit(shim.name, records, replaced)
        for record in records:
            with failure.noted():
                self._bind(netlink, record, shim, sources[record.address],
                           say)
                bound.append(record)
        if first.netns is not None and bound:
            self._configure(bound, shim.name, self._node_addresses(
                netlink, shim, first.parent, sources.values()))
        return shim

    def _admit(self, device: str, records: list[Record],
               replaced: Iterable[Record] = ()) -> None:
        """Let a pod pass the guard, and no more who had its addresses.

        :raises GuardUnavailable: if that fails and [break0] guard is on
        """
        guarding = Guard(self._options, self._ledger, device)
        if not guarding.is_wanted:
            return
        before = [*replaced, *(
            claim for record in records
            for claim in self._records.claims(record.address)[1:])]
        admitted = pairs(records)
        try:
            missing = not guarding.change(
                admitted, set(pairs(before)) - set(admitted))
            reason = 'it is not loaded'
        except exceptions.KernelRefused as err:
            missing, reason = True, str(err)
            LOG.warning('The guard of %s does not admit %s: %s', device,
                        records[0].owner, err)
        if missing and self._options.guard == config.ON:
            raise exceptions.GuardUnavailable(device=device, reason=reason)

    def _configure(self, records: list[Record], device: str,
                   node: NodeAddresses) -> None:
        """Configure the pod side, and record that only when it was done.

        Without, IPv4 works by ARP where the node is in the pod's subnet, so
        a failure is no error; it is repaired by each sync.
        """
        try:
            others = podside.configure(records, node, self._options)
        except exceptions.Break0Error as err:
            LOG.warning('The sandbox %s is not configured to reach the node '
                        'yet: %s', records[0].owner, err)
            cache = self._ledger.cache  # so that no sync says it again
            cache.put('unconfigured', [*(cache.get('unconfigured') or ()),
                                       str(records[0].owner)])
            return
        siblings = self._siblings(records[0], others)
        macs = tuple(dict.fromkeys(each.mac for each in siblings
                                   if each.mac is not None))
        done = [dataclasses.replace(record, configured=node.digest,
                                    siblings=macs) for record in records]
        mac = records[0].mac
        if mac is not None:
            done += [dataclasses.replace(each, siblings=(
                *each.siblings, mac)) for each in siblings
                if mac not in each.siblings]
        for record in done:
            try:
                claims = self._records.claims(record.address)
                if claims and claims[0].owner == record.owner:
                    self._records.put([record, *claims[1:]])
            except exceptions.LedgerUnavailable as err:
                LOG.debug('%s', err)
        if siblings:
            self._admit(device, done)

    def _siblings(self, record: Record,
                  addresses: Iterable[IPAddress]) -> list[Record]:
        """Return the records of other interfaces of a sandbox on its parent.

        :param addresses: those of these interfaces; what is not recorded for
            the sandbox counts for nothing
        """
        found = []
        for address in itertools.islice(addresses, MAX_SIBLINGS):
            with contextlib.suppress(exceptions.LedgerUnavailable):
                other = self._records.get(address)
                if other is not None and other.parent == record.parent and (
                        other.namespace == record.namespace):
                    found.append(other)
        return found

    def _roll_back(self, records: Iterable[Record],
                   shim: Optional[_Shim]) -> None:
        """Leave nothing of a bind that yields to others, and failed."""
        for record in records:
            with Failures().logged():
                self._drop(record)
                if shim is not None:
                    with kernel.Netlink() as netlink:
                        self._unset(netlink, record.address, shim.index)

    def _drop(self, record: Record) -> None:
        left = [claim for claim in self._records.claims(record.address)
                if claim.owner != record.owner]
        if left:
            self._records.put(left)
        else:
            self._records.remove(record.address)

    @timed(Done.UNBIND, Done.UNBIND_FAILED)
    def unbind(self, owner: Owner, addresses: Optional[Iterable[IPAddress]],
               netns: Optional[str] = None, mac: Optional[str] = None,
               interface_goes: bool = False) -> list[IPAddress]:
        """Take back what :meth:`bind` did for these addresses.

        Claims of other owners stay, since a DEL can come late; the newest of
        them counts from now on. What is not there is fine. The ledger is
        written last.

        :param addresses: None for all that are recorded for it, which takes
            the longer the more records there are
        :param netns: path of the sandbox's namespace, by which what was
            adopted is known as its own; see :meth:`Owner.adopted`
        :param mac: MAC address of the sandbox's interface, by which a route
            without record is known as its own
        :param interface_goes: the interface is about to be deleted, so
            nothing has to be taken back there
        :returns: the addresses that this owner had
        :raises Break0Error: the first error of one of the addresses; the
            others are unbound all the same
        """
        failure = Failures()
        removed: list[Record] = []
        owners = {owner}
        namespace = kernel.identify(netns)
        if namespace is not None:
            owners |= {Owner.adopted(namespace, owner.ifname),
                       Owner.adopted(namespace._replace(cookie=None),
                                     owner.ifname)}
        if addresses is None:
            addresses = self._recorded_for(owners)
        with self._locked(required=True) as say, \
                kernel.Netlink() as netlink:
            for address in addresses:
                with failure.noted():
                    removed += self._unbind(netlink, owners, owner, address,
                                            mac, say)
        forget_connections(record.address for record in removed)
        for record in removed:
            if not interface_goes:
                self._withdraw(record)
        failure.raise_first()
        return [record.address for record in removed]

    def _recorded_for(self, owners: Iterable[Owner]) -> list[IPAddress]:
        return sorted({claim.address for owner in owners for claims
                       in self._records.containing(owner.container_id)
                       for claim in claims if claim.owner == owner},
                      key=address_order)

    def _unbind(self, netlink: kernel.Netlink, owners: Collection[Owner],
                owner: Owner, address: IPAddress, mac: Optional[str],
                say: Say) -> list[Record]:
        claims = self._records.claims(address)
        own = [claim for claim in claims if claim.owner in owners]
        left = [claim for claim in claims if claim.owner not in owners]
        if claims and not own:
            say('%s stays bound: it belongs to %s, not to %s any more',
                address, claims[0].owner, owner)
            return []
        if own and claims[0] is not own[0]:
            # A newer claim has the route.
            self._records.put(left)
            say('Removed the earlier claim of %s on %s, which belongs to %s',
                owner, address, claims[0].owner)
            return own
        successor = self._successor(left)
        macs = {each for claim in own for each in claim.macs}
        if not own and mac is not None:
            macs.add(mac.lower())
        identity = self._ledger.identity()
        known = identity.devices.values() if identity else ()
        # On any of them, since the parent may have another name by now.
        names = {*known} if known and own else self._devices()
        devices = [name for name in names
                   if not self._reconciler.is_others(netlink.link(name))]
        deleted = self._withdraw_on_node(netlink, address, devices, macs,
                                         bool(own))
        if successor is None:
            self._records.remove(address)
        else:
            self._records.put(left[left.index(successor):])
            if len(devices) == len(names):
                # Else a bind might take over that of another ledger.
                self._bind_all(netlink, [successor], Failures(), say)
        say('Unbound %s from break0 for %s%s', address, owner,
            '' if deleted else ' (it had no route of its own)')
        return own

    def _successor(self, claims: list[Record]) -> Optional[Record]:
        """Return the newest claim whose sandbox still has the address."""
        for claim in claims:
            if kernel.state(*claim.place) is kernel.State.GONE:
                continue
            try:
                if podside.has_address(claim, self._options):
                    return claim
            except exceptions.Break0Error as err:
                LOG.debug('The claim of %s counts: %s', claim.owner, err)
                return claim
        return None

    def _withdraw_on_node(self, netlink: kernel.Netlink, address: IPAddress,
                          devices: list[str], macs: set[str],
                          is_recorded: bool) -> bool:
        """Delete what an address has; whether it had a route.

        But not if its neighbour has another MAC address than the sandbox
        had: then a pod has it that could not be recorded.
        """
        deleted = False
        for name in devices:
            index = kernel.index_of(name)
            if index is None:
                continue
            with Failures().logged():
                Guard(self._options, self._ledger, name).change(
                    (), [pair(address, each) for each in macs]
                    or [pair(address, None)])
            present, kind = netlink.neighbour(index, address)
            if kind == 'permanent' and macs and present not in macs:
                LOG.warning('Keeping %s on %s: %s has the address and is not '
                            'recorded yet', address, name, present)
                continue
            if not is_recorded and (kind != 'permanent' or not macs):
                continue  # nothing says whose it is
            deleted |= self._unset(netlink, address, index)
        return deleted

    def _withdraw(self, record: Record) -> None:
        """Take back the pod side in a namespace that is still there.

        Kuryr deletes the interface first, and all of it goes with that.
        """
        if record.netns is None or record.configured is None or kernel.state(
                record.netns, record.namespace) is kernel.State.GONE:
            return
        try:
            podside.withdraw(record, self._options,
                             self._is_bound_to(record.owner))
        except exceptions.Break0Error as err:
            LOG.debug('The sandbox %s keeps what it needed to reach the '
                      'node: %s', record.owner, err)

    def _is_bound_to(self, owner: Owner) -> Callable[[IPAddress], bool]:
        def is_bound(address: IPAddress) -> bool:
            record = self._records.get(address)
            return record is not None and record.owner == owner
        return is_bound

    def sync(self, dry_run: bool = False) -> Outcome:
        """Make break0, routes, neighbours and pods what the ledger says.

        :param dry_run: change nothing
        :returns: what there was to do
        :raises Break0Error: the first error; what else there was to do is
            done
        """
        outcome = self._reconciler.sync(dry_run)
        if outcome.errors:
            raise outcome.errors[0]
        return outcome

    def housekeep(self) -> None:
        """Do a little for the other pods of the node, after an ADD or DEL.

        At a cost that does not grow with them, but for what is said of
        :meth:`_repair`. Where an agent works, it does all of that.

        :raises Break0Error: the first error
        """
        age = self._ledger.heartbeat.age()
        if age is not None and age <= self._options.patience:
            return
        failure = Failures()
        with failure.noted():
            self._prune()
        with failure.noted():
            self._repair()
        failure.raise_first()

    def _prune(self) -> None:
        """Unbind some addresses whose sandbox is gone.

        Kuryr passes on no DEL for a pod that the API no longer knows, so each
        ADD and DEL examines some: the next one continues where this one
        ends.
        """
        cache = self._ledger.cache
        position = _number(cache.get('pruned'))
        addresses, count = self._records.some(position, EXAMINED)
        if count > EXAMINED:
            cache.put('pruned', [(position + EXAMINED) % count])
        judge = kernel.Judge()
        gone = [address for address in addresses
                if self._records.may_be_gone(address, judge)]
        if gone:
            self._reconciler.remove_gone(gone)

    def _repair(self) -> None:
        """Sync if routes are missing.

        Or if the addresses of the node have changed since pods were
        configured. Routes are counted in a text that the kernel writes: about
        1 ms for 1,000. What a sync could not set is not missed again.
        """
        cache = self._ledger.cache
        expected = _number(cache.get('missing'))
        missing = self._missing()
        if missing > expected:
            LOG.warning('%d addresses have no route through break0: '
                        'repairing', missing)
        own = self._own_addresses()
        known = cache.get('own_addresses')
        if missing > expected or known not in (None, own):
            self.sync()
            missing = self._missing()
        if missing != expected:
            cache.put('missing', [missing])
        if own != known:
            cache.put('own_addresses', own)

    def _own_addresses(self) -> list[str]:
        """Return the addresses of the node, but for those that pods share."""
        with kernel.Netlink() as netlink:
            return sorted('%d %s' % each for each in netlink.addresses()
                          if not each.address.is_link_local)

    def _missing(self) -> int:
        with self._locked():  # so that no pod is half bound
            table = self._options.route_table
            if table == kernel.RT_TABLE_MAIN:
                return self._records.count() - kernel.count_host_routes(
                    self._devices())
            with kernel.Netlink() as netlink:
                return self._records.count() - sum(
                    len(netlink.host_routes_of(index, table))
                    for index in self._device_indexes())

    @contextlib.contextmanager
    def _locked(self, required: bool = False) -> Iterator[Say]:
        """Keep others out.

        Where the lock cannot be had, a pod is worth more than the lock: it
        is recorded and bound without. What takes away needs it.

        :returns: a LOG.info whose lines are written when the lock is free
            again, since to write one can take as long as to set a route
        """
        said: list[tuple[Any, ...]] = []
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._ledger.lock())
                except exceptions.LedgerUnavailable as err:
                    LOG.error('Working without a lock. %s', err)
                except exceptions.LockTimeout as err:
                    if required:
                        raise
                    LOG.error('Working without a lock. %s', err)
                yield lambda *line: said.append(line)
        finally:
            for line in said:
                LOG.info(*line)

    def _shim(self, netlink: kernel.Netlink, parent: str) -> _Shim:
        """Make sure of the break0 of a parent.

        An ifindex is not used again, so the interface that has it is the one
        that was examined.
        """
        cache = self._ledger.cache
        cached = cache.get('device.' + parent, CACHED)
        if cached is not None:
            with contextlib.suppress(TypeError, ValueError, IndexError):
                name, index, mac, *rest = cached
                if (rest == self._circumstances(parent)
                        and kernel.index_of(name) == index):
                    return _Shim(name, index, mac, False)
        ensured = self._reconciler.ensure_device(netlink, parent, claim=True)
        link = ensured.link
        cache.put('device.' + parent, [
            link.name, link.index, link.mac, *self._circumstances(parent)])
        return _Shim(link.name, link.index, link.mac, ensured.routes_lost)

    def _circumstances(self, parent: str) -> list[Any]:
        options = self._options
        return [options.device, options.devices.get(parent),
                kernel.index_of(parent), options.mac,
                *map(str, options.addr)]

    def _node_addresses(self, netlink: kernel.Netlink, shim: _Shim,
                        parent: str,
                        sources: Collection[Optional[IPAddress]]
                        ) -> NodeAddresses:
        """Return what pods must know of the node.

        Its addresses are read again if it turns out to use another one.
        """
        index = kernel.index_of(parent)
        cached: Optional[list[tuple[int, IPAddress]]] = None
        with contextlib.suppress(TypeError, ValueError):
            cached = [(int(at), ipaddress.ip_address(address)) for at, address
                      in self._ledger.cache.get('addresses', CACHED) or ()]
        if not cached or {src for src in sources if src} - {
                address for _, address in cached}:
            cached = [(each.ifindex, each.address)
                      for each in netlink.addresses()]
            self._ledger.cache.put('addresses', [
                [at, str(address)] for at, address in cached])
        return self._policy.node_addresses(
            {address for _, address in cached},
            [address for at, address in cached if at == index],
            sources, shim.mac, shim.name)

    def _bind(self, netlink: kernel.Netlink, record: Record, shim: _Shim,
              src: Optional[IPAddress], say: Say) -> None:
        """Set what an address must have on the node."""
        wanted = self._policy.wanted(record, shim.name, shim.index, src)
        if wanted is None:
            LOG.debug('IPv6 is disabled on %s, so %s is not reachable through '
                      'it', shim.name, record.address)
            return
        if record.address.version == 6 and (
                not self._options.static_neighbours):
            LOG.warning('From its pod, %s, the node cannot be reached: that '
                        'needs [break0] static_neighbours', record.address)
        # NLM_F_EXCL does not notice a route of another metric.
        present = netlink.route_to(record.address)
        if present is not None:
            self._require_free(wanted, [present])
        err = self._add(netlink, wanted)
        if err is not None and err.device_lost:
            # break0 is down, or has just gone.
            ensured = self._reconciler.ensure_device(netlink, record.parent,
                                                     claim=True)
            shim.index, shim.mac = ensured.link.index, ensured.link.mac
            shim.routes_lost |= ensured.routes_lost
            wanted = self._policy.wanted(record, shim.name, shim.index,
                                         src) or wanted
            err = self._add(netlink, wanted)
        if err is not None and err.errno == errno.EEXIST:
            self._replace(netlink, wanted, present)
        elif err is not None:
            raise err
        say('Bound %s to %s for %s, source %s', record.address, shim.name,
            record.owner, src or 'by device')

    @staticmethod
    def _add(netlink: kernel.Netlink,
             wanted: Wanted) -> Optional[exceptions.KernelRefused]:
        """Set neighbour and route where there is no route."""
        changes: list[kernel.Change] = [(Verb.ADD, wanted.route)]
        if wanted.neighbour is not None:
            # Before the route, or it might be asked for on the wire.
            changes.insert(0, (Verb.REPLACE, wanted.neighbour))
        *others, err = netlink.change(changes)
        for other in others:
            if other is not None and not other.device_lost:
                LOG.error('%s', other)
        return err

    def _require_free(self, wanted: Wanted,
                      in_the_way: Iterable[HostRoute]) -> None:
        """Refuse to override a route of others, or take it over.

        :raises ForeignRoute: if it stays
        """
        route = wanted.route
        plan = compute({route.dst: wanted}, in_the_way,
                       device=route.oif or 0, protocol=route.protocol,
                       takeover=self._options.takeover)
        if not plan.replace and plan.foreign:
            raise foreign_route(plan.foreign[0])
        for foreign in plan.foreign:
            take_over(foreign, self._ledger, self._journal)

    def _replace(self, netlink: kernel.Netlink, wanted: Wanted,
                 present: Optional[HostRoute]) -> None:
        """Set a route in place of what is there, if that may be.

        :param present: what was in use, which is known to be free
        """
        route = wanted.route
        if present is None or (present.table, present.metric) != (
                route.table, route.metric):
            # One that is not the one in use is only to be seen in a dump.
            self._require_free(wanted, [
                each for each in netlink.routes().host
                if each.dst == route.dst])
        changes: list[kernel.Change] = [(Verb.REPLACE, route)]
        if wanted.neighbour is None:
            # It was an earlier pod's, which had another MAC address.
            changes.append((Verb.DELETE, Neighbour(
                route.dst, route.oif or 0, '', None)))
        err = netlink.change(changes)[0]
        if err is not None:
            raise err

    def _unset(self, netlink: kernel.Netlink, address: IPAddress,
               index: int) -> bool:
        """Delete what an address has; whether it had a route.

        The neighbour too if it was learnt: the next pod of this address has
        another MAC address, and the kernel would use the old one for some
        seconds.
        """
        err, neighbour_err = netlink.change([
            (Verb.DELETE, dataclasses.replace(
                self._policy.route(address, index), metric=None)),
            (Verb.DELETE, Neighbour(address, index, '', None))])
        if neighbour_err is not None and not neighbour_err.absent:
            LOG.debug('%s', neighbour_err)
        if err is not None and not err.absent:
            raise err
        return err is None


def _sane(owner: Owner, addresses: list[IPAddress], parent: str,
          mac: Optional[str], netns: Optional[str], pod: Optional[str]
          ) -> tuple[list[IPAddress], Optional[str]]:
    """Cut what may be hostile to size, for every way in.

    A KuryrPort, a container engine or a person may say anything.

    :returns: the addresses, each once, and the MAC address in lower case
    :raises InputRefused: if it cannot be meant
    """
    reason = None
    for what, text in (('container id', owner.container_id),
                       ('interface', owner.ifname), ('parent', parent),
                       ('namespace path', netns), ('pod', pod)):
        if text is not None and not (isinstance(text, str)
                                     and NAME.fullmatch(text)):
            reason = ('its %s has control characters or more than 512 '
                      'characters' % what)
    if mac is not None:
        mac = mac.lower()
        if not MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
            reason = '%r is not the MAC address of one interface' % mac[:64]
    if len(addresses) > MAX_ADDRESSES:
        reason = 'it has %d addresses, and %d are allowed' % (
            len(addresses), MAX_ADDRESSES)
    scoped = [each for each in addresses if getattr(each, 'scope_id', None)]
    if scoped:
        reason = 'the address %r has a scope' % str(scoped[0])[:64]
    if reason is not None:
        raise exceptions.InputRefused(owner=str(owner)[:160], reason=reason)
    return list(dict.fromkeys(addresses)), mac


def _is_of_same_interface(claim: Record, record: Record) -> bool:
    """Return whether a claim is an earlier one of the same interface.

    What was discovered or rebuilt may be bound by its engine later.
    """
    return claim.owner == record.owner or (
        (claim.origin is Origin.DISCOVERED or claim.is_rebuilt)
        and claim.owner.ifname == record.owner.ifname
        and claim.namespace is not None
        and claim.namespace == record.namespace)


def _number(facts: Optional[list[Any]]) -> int:
    """Read a number that was cached; 0 for anything else."""
    value = facts[0] if facts else 0
    return value if isinstance(value, int) and value >= 0 else 0
