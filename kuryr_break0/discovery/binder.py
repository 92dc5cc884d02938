# SPDX-License-Identifier: Apache-2.0

"""Bind and unbind the addresses of discovered containers."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, Hashable, Optional

from kuryr_break0 import config
from kuryr_break0 import containers
from kuryr_break0.discovery.records import followed
from kuryr_break0.discovery.records import owner_id
from kuryr_break0.engine import Engine
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.manager import Break0Manager
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

#: Maximum number of bound addresses of one container, which can have thousands
#: of addresses in any number of namespaces.
MAX_ADDRESSES = 32
#: Seconds after which the other addresses of a namespace wait for its next
#: turn.
_AT_ONCE = 0.03
#: Different refusals that are remembered, so that each is logged once, and
#: seconds until others are logged after these: a container can cause any
#: number.
_REMEMBERED, _FORGET = 1024, 60.0


class Binder:
    """Keeps the addresses of namespaces bound, one namespace at a time.

    To be used by one thread.

    :param changed: called after a bind, an unbind, or a look at the ledger
    """

    def __init__(self, options: config.Options, ledger: Ledger,
                 changed: Callable[[], None]) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = Policy(options)
        self._manager = Break0Manager(options)
        #: records of discovered addresses, by namespace
        self._records: dict[NamespaceId, dict[IPAddress, Record]] = {}
        #: containers of the namespaces that have records
        self._containers: dict[NamespaceId, Hashable] = {}
        #: namespaces with a refused address
        self._refused: set[NamespaceId] = set()
        self._refusals: set[tuple[IPAddress, Optional[int], str]] = set()
        self._forget_at = 0.0
        self._changed = changed

    def read_records(self) -> set[NamespaceId]:
        """Read the records of discovered addresses.

        If the ledger cannot be read, keep the previous records.

        :returns: namespaces to read again, because another program has changed
            their records or because an address was refused
        """
        records: dict[NamespaceId, dict[IPAddress, Record]] = {}
        try:
            for record in followed(self._ledger):
                if record.namespace is not None:
                    records.setdefault(record.namespace, {})[
                        record.address] = record
        except exceptions.LedgerUnavailable:
            records = self._records
        changed = {each for each in {*records, *self._records}
                   if _essence(records.get(each, {})) != _essence(
                       self._records.get(each, {}))}
        self._records = records
        self._containers = {each: container for each, container
                            in self._containers.items() if each in records}
        changed |= self._refused
        self._refused = set()
        self._changed()
        return changed

    def has(self, namespace: NamespaceId) -> bool:
        """Return whether an address of a namespace is bound."""
        return bool(self._records.get(namespace))

    def update(self, found: kernel.Found, container: Hashable) -> bool:
        """Bind the addresses of a namespace, and unbind its lost addresses.

        :param container: see :class:`kernel.Examined`
        :returns: False if there is more to do, or an error may pass
        :raises NetnsUnusable: if another namespace is at its path, or none
        """
        own = self._records.get(found.namespace, {})
        try:
            macvlans = [each for each in kernel.macvlans_in(
                found.path, found.namespace, kernel.FEW, sorted({
                    record.owner.ifname for record in own.values()}))
                if self._is_eligible(each)]
        except exceptions.KernelRefused as err:
            LOG.debug('Skipping a network namespace for now: %s', err)
            return False
        present = [(address, macvlan) for macvlan in macvlans
                   for address in macvlan.addresses
                   if address not in macvlan.unproven]
        duplicates = [each for macvlan in macvlans
                      for each in macvlan.duplicates]
        for address in duplicates[:MAX_ADDRESSES]:
            self._refuse(address, found.namespace, 'another host has it, as '
                         'duplicate address detection has found')
        # Bound addresses come first, so that they stay bound if there are too
        # many.
        present.sort(key=lambda each: each[0] not in own)
        self._containers[found.namespace] = container
        elsewhere = sum(
            len(records) for each, records in self._records.items()
            if each != found.namespace and container is not None
            and container == self._containers.get(each))
        # Rebuilt claims, which another program may have made, can exceed the
        # maximum. They stay.
        most = max(MAX_ADDRESSES - elsewhere, len(own))
        wanted = dict(present[:most])
        if len(present) > most:
            self._refuse(present[-1][0], found.namespace, 'its container in '
                         '%s has %d addresses, and %d are allowed' % (
                             found.path, len(present) + elsewhere,
                             MAX_ADDRESSES))
        partly = {each.link.name for each in macvlans if not each.is_whole}
        gone = [record for address, record in list(own.items())
                if (address not in wanted
                    and record.owner.ifname not in partly)
                or (address in wanted
                    and record.owner.ifname != wanted[address].link.name)]
        is_done = all([self._unbind(record, found) for record in gone])
        new = {address: macvlan for address, macvlan in wanted.items()
               if not _is_bound(own.get(address), macvlan)}
        if new and not found.namespace.is_same(
                kernel.require_other(found.path)):
            raise exceptions.NetnsUnusable(
                netns=found.path, reason='is another one by now')
        ends, left = time.monotonic() + _AT_ONCE, list(new.items())
        while left:
            is_done &= self._bind(*left.pop(0))
            if time.monotonic() > ends:
                break
        is_done &= not left
        if not self.has(found.namespace):
            del self._containers[found.namespace]
        return is_done

    def _is_eligible(self, macvlan: kernel.Macvlan) -> bool:
        against = containers.of_interface(self._options, macvlan)
        if against is None or against[0] is not containers.Reason.OTHER_PARENT:
            return against is None
        # If [break0] parent names a missing interface, for example a renamed
        # one, bound addresses may still be on the intended parent. They stay.
        return any(record.owner.ifname == macvlan.link.name for record in
                   self._records.get(macvlan.namespace, {}).values()) and (
            not kernel.exists(str(self._options.parent)))

    def _bind(self, address: IPAddress, macvlan: kernel.Macvlan) -> bool:
        """Bind an address, unless a claim or the policy forbids that.

        :returns: False if an error may be temporary
        """
        reason = self._policy.refusal(address, Origin.DISCOVERED)
        if reason is not None:
            self._refuse(address, macvlan.namespace, 'it is ' + reason)
            return True
        owner = Owner(owner_id(macvlan.namespace), macvlan.link.name)
        with contextlib.suppress(exceptions.LedgerUnavailable):
            for claim in self._ledger.records.claims(address):
                if claim.owner == owner or kernel.state(
                        *claim.place) is kernel.State.GONE:
                    continue
                if claim.namespace is None or not claim.namespace.is_same(
                        macvlan.namespace):
                    self._refuse(address, macvlan.namespace,
                                 'it belongs to ' + claim.whose)
                    return False  # the owner may end soon
                if claim.is_rebuilt and claim.owner.ifname == owner.ifname:
                    continue  # the MAC address has changed since
                return True  # Kuryr, CNI or the command has bound it
        try:
            self._manager.bind(
                owner, [address], parent=macvlan.parent,
                mac=macvlan.link.mac, netns=macvlan.netns, yielding=True,
                origin=Origin.DISCOVERED)
        except exceptions.Break0Error as err:
            self._refuse(address, macvlan.namespace, str(err))
            return isinstance(err, exceptions.AddressRefused)
        self._records.setdefault(macvlan.namespace, {})[address] = Record(
            address, owner, macvlan.parent, macvlan.link.mac,
            netns=macvlan.netns, namespace=macvlan.namespace,
            origin=Origin.DISCOVERED)
        self._changed()
        return True

    def _refuse(self, address: IPAddress, namespace: NamespaceId,
                reason: str) -> None:
        """Log once why an address is not bound, and with the remedy.

        The namespace is read again after the next sync.
        """
        if len(self._refused) < _REMEMBERED:
            self._refused.add(namespace)
        refusal = address, namespace.cookie, reason
        now = time.monotonic()
        if len(self._refusals) >= _REMEMBERED and now >= self._forget_at:
            self._refusals.clear()
        if refusal not in self._refusals and (
                len(self._refusals) < _REMEMBERED):
            self._refusals.add(refusal)
            self._forget_at = now + _FORGET
            LOG.warning('The container address %s is not bound: %s', address,
                        reason)

    def _unbind(self, record: Record, found: kernel.Found) -> bool:
        """Unbind an address, and return whether that succeeded."""
        try:
            self._manager.unbind(record.owner, [record.address], found.path)
        except exceptions.Break0Error as err:
            LOG.error('%s stays bound for now: %s', record.address, err)
            return False
        self._records.get(found.namespace, {}).pop(record.address, None)
        self._changed()
        return True

    def unbind_ended(self, namespace: NamespaceId) -> bool:
        """Unbind the addresses of a namespace, if the kernel has deleted it.

        Without the proof for each address, unbind none of them.

        :returns: False to call again, because the proof is missing, for
            example for want of descriptors, or because an unbind has failed
        """
        records = self._records.get(namespace)
        if not records:
            return True  # a container can make thousands without any
        failure = Failures()
        try:
            if any(kernel.state(*record.place) is not kernel.State.GONE
                   for record in records.values()):
                return False
            left = Engine(self._options, self._ledger).remove_gone(
                records, failure)
            failure.raise_first()
        except exceptions.Break0Error as err:
            LOG.error('%s', err)
            return False
        if any(claim.namespace == namespace for claim in left):
            return False
        self._containers.pop(namespace, None)
        if self._records.pop(namespace, None):
            self._changed()
        return True


def _essence(records: dict[IPAddress, Record]) -> set[tuple[Any, ...]]:
    """Return the fields of records that come from interfaces."""
    return {(each.address, each.owner, each.parent, each.mac)
            for each in records.values()}


def _is_bound(record: Optional[Record], macvlan: kernel.Macvlan) -> bool:
    """Return whether a record matches its interface."""
    return record is not None and (record.mac, record.parent) == (
        macvlan.link.mac, macvlan.parent) and (
        record.netns == macvlan.netns
        or kernel.identify(record.netns) == macvlan.namespace)
