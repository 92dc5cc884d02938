# SPDX-License-Identifier: Apache-2.0

"""Binds and unbinds the addresses of one sandbox, and syncs the node.

The duration of a bind or unbind does not depend on the number of pods on the
node, unless a docstring says otherwise. So the functions do not read tables
with entries of all pods.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Collection, Iterable, Optional

from kuryr_break0 import config
from kuryr_break0.engine import admission
from kuryr_break0.engine import housekeeping
from kuryr_break0.engine.plan import Outcome
from kuryr_break0.engine.reconciler import Reconciler
from kuryr_break0.engine import transitions
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import claims
from kuryr_break0.ledger import files
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import timed
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SUBNETS
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)


class Break0Manager:
    """Manager of the addresses of the node's sandboxes.

    The manager keeps no state in memory, because each request may run in
    another process. The lock of the ledger serialises concurrent requests.

    :param options: see :func:`kuryr_break0.config.load`
    """

    def __init__(self, options: config.Options) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = Ledger(options.state_dir)
        self._records = self._ledger.records
        self._engine = transitions.Engine(options, self._ledger)

    @timed(Done.BIND, Done.BIND_FAILED)
    def bind(self, owner: model.Owner, addresses: Iterable[model.IPAddress], *,
             parent: str, mac: Optional[str] = None,
             subnets: Collection[model.IPNetwork] = (),
             netns: Optional[str] = None, pod: Optional[str] = None,
             yielding: bool = False, origin: Optional[model.Origin] = None,
             network: Optional[str] = None,
             bound_at: Optional[float] = None) -> None:
        """Make the addresses of a sandbox reachable through break0.

        The newest claim on an address gets the route. Earlier claims of other
        existing sandboxes stay in the record. When the new claim is dropped,
        the newest remaining claim gets the route. If the kernel rejects an
        item, the claim stays unless ``yielding``, and a sync sets the item.

        :param parent: parent of the pod's macvlan
        :param mac: MAC address of the pod's interface
        :param subnets: networks of the pod's interface
        :param netns: path of the pod's namespace
        :param pod: namespace/name in Kubernetes, or the container's name
        :param origin: origin of the claims; None if unknown
        :param network: name of the CNI network
        :param bound_at: time of the request in seconds since the boot, so that
            :meth:`unbind` can undo only this bind; None for the present time
        :param yielding: refuse an address that another existing sandbox has
            claimed, and undo the bind of each address that fails
        :raises InputRefused: if a name, the MAC address or an address is
            invalid, or there are too many addresses
        :raises ParentNotFound: if the parent does not exist
        :raises ParentMismatch: if ``[break0] parent`` names another interface
        :raises Break0Error: the first error of an address, after all other
            addresses were bound
        """
        failure = failures.Failures()
        addresses, mac = admission.validate(
            owner, list(addresses), parent, mac, netns, pod)
        parent_index = kernel.find_ifindex(parent)
        # Records contain the name of the parent, which may be an altname here.
        parent = kernel.find_current_name(parent, parent_index)
        namespace = _identified(netns) if netns is not None else None
        tap = kernel.find_taps().get(mac) if mac and netns is None else None
        bound_at = files.now() if bound_at is None else bound_at
        usable = []
        with contextlib.suppress(exceptions.LedgerUnavailable):
            self._ledger.prepare()  # refusal() writes the cache
        for address in addresses:
            reason = self._engine.admission.refusal(address, parent, origin)
            if reason is None:
                usable.append(address)
            else:
                failure.add(self._policy.refused(address, reason))
        # All look-ups end before the engine takes the lock.
        records = [model.Record(
            address, owner, parent, mac, tuple(subnets)[:MAX_SUBNETS], netns,
            namespace, pod, bound_at=bound_at, origin=origin, network=network,
            parent_index=parent_index, tap=tap) for address in usable]
        if not records:
            failure.raise_first()  # no address needs a break0
            return
        configured = self._options.parent
        if not kernel.has_interface(configured or parent):
            raise exceptions.ParentNotFound(parent=configured or parent)
        if configured not in (None, parent):
            raise exceptions.ParentMismatch(configured=configured,
                                            actual=parent)
        # Only a new ledger can detect that it replaces a lost ledger, and a
        # sync rebuilds the records of the lost ledger. The bind itself reports
        # an unusable ledger.
        with failure.log_errors(), contextlib.suppress(
                exceptions.LedgerUnavailable):
            if self._engine.devices.has_lost():
                self.sync()
        if self._engine.bind(records, yielding, failure):
            # A new break0 has no routes to the other pods, and its guard has
            # no entries of these pods.
            with failure.log_errors():
                self.sync()
        failure.raise_first()

    def check(self, record: model.Record) -> None:
        """Raise the error that a yielding bind of an address would raise.

        :param record: the claim that the bind would add
        :raises AddressRefused: if the policy refuses the address
        :raises AddressTaken: if another existing sandbox has claimed it
        :raises ForeignRoute: if another program has set a route to it
        :raises LedgerUnavailable: if the earlier claims cannot be read
        """
        self._engine.check(record)

    @timed(Done.UNBIND, Done.UNBIND_FAILED)
    def unbind(self, owner: model.Owner,
               addresses: Optional[Iterable[model.IPAddress]],
               netns: Optional[str] = None, mac: Optional[str] = None,
               interface_goes: bool = False,
               bound_at: Optional[float] = None,
               ends: bool = False) -> list[model.IPAddress]:
        """Drop the claims of an owner, with their routes and neighbours.

        Claims of other owners stay, because a DEL can follow the ADD of the
        next sandbox. The newest remaining claim gets the route. An address
        without a claim is no error.

        :param addresses: None for all recorded addresses of the owner. The
            duration of that search grows with the number of records
        :param netns: path of the sandbox's namespace. Namespace and MAC
            address together identify a claim without a container id; see
            :meth:`Owner.adopted`
        :param mac: MAC address of the sandbox's interface. If an address has
            no record, its route is deleted only if its neighbour has this MAC
            address
        :param interface_goes: whether the caller will delete the interface, so
            that its pod side need not be removed
        :param bound_at: drop only the claims of the bind with this time
        :param ends: whether the interface of the owner ends. If so, the next
            sync also drops the owner's claims of earlier binds
        :returns: the addresses of the dropped claims
        :raises Break0Error: the first error of an address, after all other
            addresses were unbound
        """
        failure = failures.Failures()
        began = files.now()
        namespace = kernel.identify(netns)
        mac = mac and mac.lower()

        def is_own(claim: model.Record) -> bool:
            return claims.is_own(claim, owner, namespace, mac, bound_at)

        named = None if addresses is None else list(dict.fromkeys(addresses))
        if named is None or len(named) > admission.MAX_ADDRESSES:
            # The owner of a rebuilt claim has a text with the prefix ADOPTED
            # instead of a container id, so search for both.
            recorded = {
                claim.address for each in self._records.find_containing(
                    owner.container_id, model.Owner.ADOPTED)
                for claim in each if is_own(claim)}
            named = sorted(
                recorded if named is None else recorded.intersection(named),
                key=model.address_order)
        removed = self._engine.unbind(named, is_own, owner, mac, failure,
                                      (owner, began) if ends else None)
        for record in removed:
            # The kernel deletes the pod side with the interface.
            if not interface_goes and record.netns and record.configured:
                self._engine.pods.withdraw(record)
        failure.raise_first()
        return [record.address for record in removed]

    def sync(self, dry_run: bool = False) -> Outcome:
        """Reconcile break0s, routes, neighbours and pod sides once.

        :param dry_run: change nothing
        :returns: the changes; in a dry run, the changes to make
        :raises Break0Error: the first error, after all other changes
        """
        outcome = Reconciler(self._options, self._ledger).sync(dry_run)
        if outcome.errors:
            raise outcome.errors[0]
        return outcome

    def housekeep(self) -> None:
        """Unbind the ended sandboxes of other pods, and repair lost routes.

        Kuryr's driver, the CNI plugin and the commands call this method after
        an ADD or DEL. See :mod:`kuryr_break0.engine.housekeeping`.

        :raises Break0Error: the first error
        """
        housekeeping.run(self._options, self._ledger, self._engine, self.sync)

    def try_to_housekeep(self) -> None:
        """Call :meth:`housekeep`, and only log its error.

        The error concerns other pods, and not the pod of the request.
        """
        try:
            self.housekeep()
        except exceptions.Break0Error as err:
            LOG.warning('Cannot repair the routes of other containers: %s',
                        err)


def _identified(netns: str) -> Optional[model.NamespaceId]:
    """Return the identity of a namespace; None if it cannot be read.

    :raises NetnsUnusable: if the path does not lead to a namespace
    """
    try:
        return kernel.identify_or_fail(netns)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO,
                         errno.EINVAL, errno.ELOOP):
            raise exceptions.NetnsUnusable(
                netns=netns, reason='is gone, or is another kind of '
                'file') from err
        LOG.warning('Cannot identify the namespace %s: %s. Its addresses stay '
                    'bound after its end. To unbind them then, run: '
                    'kuryr-break0 unbind', netns, err)
        return None
