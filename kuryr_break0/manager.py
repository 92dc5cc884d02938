# SPDX-License-Identifier: Apache-2.0

"""Binds and unbinds the addresses of one sandbox. What is done for each pod
costs the same for any number of pods: no dumps of what grows with them.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Collection, Iterable, Optional

from kuryr_break0 import claims
from kuryr_break0 import config
from kuryr_break0.engine import Engine
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import timed
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SUBNETS
from kuryr_break0 import log
from kuryr_break0.model import address_order
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPNetwork
from kuryr_break0.model import MAC
from kuryr_break0.model import NAME
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.plan import Outcome
from kuryr_break0 import policy
from kuryr_break0.policy import Policy
from kuryr_break0.reconciler import Reconciler

LOG = log.get_logger(__name__)

#: Addresses that one interface may have: each takes some 0.1 ms of the lock.
MAX_ADDRESSES = 512
#: Addresses that the housekeeping of one ADD or DEL examines for sandboxes
#: that are gone. More than the 110 pods that kubelet allows by default.
EXAMINED = 128


class Break0Manager:
    """Keeps break0, and one host route through it per pod of this node.

    Nothing is kept in memory: every request may be a process of its own, and
    several at once are kept apart by the lock of the ledger.

    :param options: see :func:`kuryr_break0.config.load`
    """

    def __init__(self, options: config.Options) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = Ledger(options.state_dir)
        self._records = self._ledger.records
        self._engine = Engine(options, self._ledger)

    @timed(Done.BIND, Done.BIND_FAILED)
    def bind(self, owner: Owner, addresses: Iterable[IPAddress], *,
             parent: str, mac: Optional[str] = None,
             subnets: Collection[IPNetwork] = (),
             netns: Optional[str] = None, pod: Optional[str] = None,
             yielding: bool = False, origin: Optional[Origin] = None,
             network: Optional[str] = None,
             bound_at: Optional[float] = None) -> None:
        """Make the addresses of a sandbox reachable through break0.

        The newest claim on an address wins; those of other sandboxes that
        exist are kept, and count again when it is unbound. No error but a
        refusal leaves a live pod without a record.

        :param parent: the interface that the pod's macvlan is on
        :param mac: MAC address of the pod's interface
        :param subnets: the networks that it is in on the link
        :param netns: path of the pod's namespace
        :param pod: its namespace and name in Kubernetes
        :param origin: by which way it came
        :param network: name of its CNI network
        :param bound_at: when it was asked for, in seconds since the boot, so
            that :meth:`unbind` can undo just that; None for now
        :param yielding: refuse what another existing sandbox has, and undo
            what fails, address by address
        :raises Break0Error: the first error of one of the addresses; the
            others are bound all the same
        """
        failure = Failures()
        addresses, mac = _sane(owner, list(addresses), parent, mac, netns,
                               pod)
        parent_index = kernel.find_ifindex(parent)
        parent = kernel.find_current_name(parent, parent_index)  # no altname
        namespace = _identified(netns) if netns is not None else None
        tap = kernel.find_taps().get(mac) if mac and netns is None else None
        bound_at = files.now() if bound_at is None else bound_at
        usable = []
        with contextlib.suppress(exceptions.LedgerUnavailable):
            self._ledger.prepare()  # for the cache
        for address in addresses:
            reason = self.refusal(address, parent, origin)
            if reason is None:
                usable.append(address)
            else:
                failure.add(self._policy.refused(address, reason))
        # What can be is done before others have to wait.
        records = [Record(address, owner, parent, mac,
                          tuple(subnets)[:MAX_SUBNETS], netns, namespace,
                          pod, bound_at=bound_at, origin=origin,
                          network=network, parent_index=parent_index, tap=tap)
                   for address in usable]
        if not records:
            failure.raise_first()  # nothing to make break0 for
            return
        configured = self._options.parent
        if not kernel.has_interface(configured or parent):
            raise exceptions.ParentNotFound(parent=configured or parent)
        if configured not in (None, parent):
            raise exceptions.ParentMismatch(configured=configured,
                                            actual=parent)
        if self._engine.bind(records, yielding, failure):
            # Those of the others are gone, or are to be in its guard again.
            with failure.log_errors():
                self.sync()
        failure.raise_first()

    def refusal(self, address: IPAddress, parent: str,
                origin: Optional[Origin]) -> Optional[str]:
        """Return why :meth:`bind` refuses an address; None if it does not.

        Facts that cannot be read now are for the reconciler to refuse by.
        """
        reason = self._policy.refusal(address, origin)
        if reason is not None:
            return reason
        try:
            facts = self._facts(address, parent)
        except (exceptions.Break0Error, OSError) as err:
            LOG.warning('Binding %s without knowing whether it is in use on '
                        'this node: %s', address, err)
            return None
        return self._policy.refusal(address, origin, facts)

    def _facts(self, address: IPAddress, parent: str) -> policy.Facts:
        """Return the facts of one address, by look-ups."""
        own: set[IPAddress] = set()
        try:
            own.update(filter(None, [kernel.find_source(address)]))
        except PermissionError:
            return policy.Facts(no_hosts=(address,))
        # Only a socket in a VRF sees the addresses there. Before 5.7 it needs
        # CAP_NET_RAW to be there.
        with contextlib.suppress(PermissionError):
            own.update(filter(None, [kernel.find_source(address, parent)]))
        cache = self._ledger.cache
        next_hops = cache.get_recent('next_hops')
        if next_hops is None:
            with kernel.Netlink() as netlink:
                found = netlink.next_hops(self._engine.devices.indexes(),
                                          self._options.route_protocol)
            next_hops = sorted(map(str, found))
            cache.put('next_hops', next_hops)
            self._ledger.add_next_hops(found)
        # By a sync: to list them takes the longer the more pods there are.
        through_break0 = cache.get('through_break0') or ()
        text = str(address)
        return policy.Facts(
            own, (), (address,) if text in next_hops else (),
            (address,) if text in through_break0 else (),
            self._ledger.list_recent_next_hops())

    @timed(Done.UNBIND, Done.UNBIND_FAILED)
    def unbind(self, owner: Owner, addresses: Optional[Iterable[IPAddress]],
               netns: Optional[str] = None, mac: Optional[str] = None,
               interface_goes: bool = False,
               bound_at: Optional[float] = None,
               ends: bool = False) -> list[IPAddress]:
        """Take back what :meth:`bind` did for these addresses.

        Claims of other owners stay, since a DEL can come late; the newest of
        them counts from now on. What is not there is fine.

        :param addresses: None for all that are recorded for it, which takes
            the longer the more records there are
        :param netns: path of the sandbox's namespace, by which with the MAC
            address what was adopted is known; see :meth:`Owner.adopted`
        :param mac: MAC address of the sandbox's interface, by which a route
            without record is known as its own
        :param bound_at: undo the bind that was asked for then, and no other
        :param interface_goes: the interface is about to be deleted, so
            nothing has to be taken back there
        :param ends: the interface of this owner ends, so the next sync drops
            the claims of an earlier bind too, with other addresses
        :returns: the addresses that this owner had
        :raises Break0Error: the first error of one of the addresses; the
            others are unbound all the same
        """
        failure = Failures()
        began = files.now()
        namespace = kernel.identify(netns)
        mac = mac and mac.lower()

        def is_own(claim: Record) -> bool:
            return claims.is_own(claim, owner, namespace, mac, bound_at)

        named = None if addresses is None else list(dict.fromkeys(addresses))
        if named is None or len(named) > MAX_ADDRESSES:
            # An adopted one has its namespace in place of a container id.
            found = {claim.address for each in self._records.find_containing(
                owner.container_id, Owner.ADOPTED)
                for claim in each if is_own(claim)}
            named = sorted(found if named is None else found.intersection(
                named), key=address_order)
        removed = self._engine.unbind(named, is_own, owner, mac, failure,
                                      (owner, began) if ends else None)
        for record in removed:
            # With the interface, all that was configured there goes.
            if not interface_goes and record.netns and record.configured:
                self._engine.pods.withdraw(record)
        failure.raise_first()
        return [record.address for record in removed]

    def sync(self, dry_run: bool = False) -> Outcome:
        """Make break0, routes, neighbours and pods what the ledger says.

        :param dry_run: change nothing
        :returns: what there was to do
        :raises Break0Error: the first error; what else there was to do is
            done
        """
        outcome = Reconciler(self._options, self._ledger).sync(dry_run)
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
        with failure.collect():
            self._prune(failure)
        with failure.collect():
            self._repair()
        failure.raise_first()

    def try_to_housekeep(self) -> None:
        """:meth:`housekeep`, and log what fails: it is of other pods."""
        try:
            self.housekeep()
        except exceptions.Break0Error as err:
            LOG.warning('Cannot repair what other containers need: %s', err)

    def _prune(self, failure: Failures) -> None:
        """Unbind some addresses whose sandbox is gone.

        Kuryr passes on no DEL for a pod that the API no longer knows, so each
        ADD and DEL examines some: the next one continues where this one
        ends.
        """
        cache = self._ledger.cache
        position = cache.get_number('pruned')
        addresses, count = self._records.list_part(position, EXAMINED)
        if count > EXAMINED:
            cache.put('pruned', [(position + EXAMINED) % count])
        judge = kernel.Judge()
        gone = [address for address in addresses
                if self._records.may_be_gone(address, judge)]
        if gone:
            self._engine.remove_gone(gone, failure)

    def _repair(self) -> None:
        """Sync if routes are missing.

        Or if the addresses of the node have changed since pods were
        configured. Routes are counted in a text that the kernel writes: about
        1 ms for 1,000. What a sync could not set is not missed again.
        """
        cache = self._ledger.cache
        expected = cache.get_number('missing')
        missing = self._missing()
        if missing > expected:
            LOG.warning('%d addresses have no route through break0: '
                        'repairing', missing)
        with kernel.Netlink() as netlink:
            own = sorted('%d %s' % each for each in netlink.addresses()
                         if not each.address.is_link_local)
        known = cache.get('own_addresses')
        if missing > expected or known not in (None, own):
            self.sync()
            missing = self._missing()
        if missing != expected:
            cache.put('missing', [missing])
        if own != known:
            cache.put('own_addresses', own)

    def _missing(self) -> int:
        devices = self._engine.devices
        with self._engine.locked():  # so that no pod is half bound
            return self._records.count() - devices.count_routes(
                devices.names())


def _identified(netns: str) -> Optional[NamespaceId]:
    """Return what a namespace is; None if this process cannot find out.

    :raises NetnsUnusable: if it is none
    """
    try:
        return kernel.identify_or_fail(netns)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO,
                         errno.EINVAL, errno.ELOOP):
            raise exceptions.NetnsUnusable(
                netns=netns, reason='is gone, or is another kind of '
                'file') from err
        LOG.warning('Cannot identify the namespace %s, so its end will not '
                    'be noticed: %s', netns, err)
        return None


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
