# SPDX-License-Identifier: Apache-2.0

"""Bind and unbind the addresses of discovered containers."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Callable, Hashable, Optional

from kuryr_break0 import config
from kuryr_break0.discovery.records import find_maintained
from kuryr_break0.discovery.records import make_owner_id
from kuryr_break0.engine import containers
from kuryr_break0.engine import transitions
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: Maximum number of bound addresses of one container. A container can have
#: thousands of addresses, in any number of namespaces.
MAX_DISCOVERED = 32
#: Seconds to bind addresses of one namespace, before other namespaces get a
#: turn. The remaining addresses wait for the next turn of their namespace.
_TURN = 0.03
#: Maximum number of stored refusals. A stored refusal is not logged again. A
#: container can cause any number of refusals. If the maximum is reached, new
#: refusals are logged only after ``_REFUSAL_SECONDS`` without an addition.
_MAX_REFUSALS, _REFUSAL_SECONDS = 1024, 60.0


class Binder:
    """Binds and unbinds the addresses of discovered containers.

    Only one thread may use it.

    :param on_change: function to call after each bind, unbind and read of the
        records
    """

    def __init__(self, options: config.Options, ledger: Ledger,
                 on_change: Callable[[], None]) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = policy.Policy(options)
        self._manager = Break0Manager(options)
        #: records of discovered addresses, by namespace
        self._records: dict[model.NamespaceId,
                            dict[model.IPAddress, model.Record]] = {}
        #: containers of the namespaces that have records
        self._containers: dict[model.NamespaceId, Hashable] = {}
        #: namespaces with a refused address
        self._refused: set[model.NamespaceId] = set()
        self._refusals: set[tuple[model.IPAddress, Optional[int], str]] = set()
        self._clear_at = 0.0
        self._on_change = on_change

    def read_records(self) -> set[model.NamespaceId]:
        """Read the records of discovered addresses.

        If the ledger cannot be read, keep the previous records.

        :returns: namespaces to read again, because another program has changed
            their records or because an address was refused
        """
        records: dict[model.NamespaceId,
                      dict[model.IPAddress, model.Record]] = {}
        try:
            for record in find_maintained(self._ledger):
                if record.namespace is not None:
                    records.setdefault(record.namespace, {})[
                        record.address] = record
        except exceptions.LedgerUnavailable:
            records = self._records
        changed = {each for each in {*records, *self._records}
                   if _select_fields(records.get(each, {})) != _select_fields(
                       self._records.get(each, {}))}
        self._records = records
        self._containers = {each: container for each, container
                            in self._containers.items() if each in records}
        changed |= self._refused
        self._refused = set()
        self._on_change()
        return changed

    def has_bound(self, namespace: model.NamespaceId) -> bool:
        """Return whether an address of a namespace is bound."""
        return bool(self._records.get(namespace))

    def update(self, location: kernel.NamespaceLocation,
               container: Hashable) -> bool:
        """Bind new addresses of a namespace, and unbind removed addresses.

        :param container: see :class:`kernel.ExaminedNamespace`
        :returns: False if the caller must call again, because this method has
            not bound all addresses, or because an error may be temporary
        :raises NetnsUnusable: if the path does not lead to the namespace
        """
        bound = self._records.get(location.namespace, {})
        try:
            macvlans = [each for each in kernel.list_macvlans_in(
                location.path, location.namespace, kernel.QUICK_LIMITS,
                sorted({record.owner.ifname for record in bound.values()}))
                if self._is_eligible(each)]
        except exceptions.KernelRefused as err:
            LOG.debug('Cannot list the macvlans of %s yet: %s',
                      location.path, err)
            return False
        present = [(address, macvlan) for macvlan in macvlans
                   for address in macvlan.addresses
                   if address not in macvlan.unproven]
        duplicates = [(each, macvlan) for macvlan in macvlans
                      for each in macvlan.duplicates]
        for address, macvlan in duplicates[:MAX_DISCOVERED]:
            self._log_refusal(
                address, macvlan, 'duplicate address detection has found it '
                'on another host. Change the address of one of them.')
        # Bound addresses come first, so that they stay bound if the container
        # has too many addresses.
        present.sort(key=lambda each: each[0] not in bound)
        self._containers[location.namespace] = container
        elsewhere = sum(
            len(records) for each, records in self._records.items()
            if each != location.namespace and container is not None
            and container == self._containers.get(each))
        # Bound addresses stay bound even above the maximum: their claims may
        # be rebuilt claims, which another program may have made.
        maximum = max(MAX_DISCOVERED - elsewhere, len(bound))
        desired = dict(present[:maximum])
        if len(present) > maximum:
            self._log_refusal(
                *present[-1], 'its container has %d addresses, and the '
                'maximum is %d. Remove some of them.' % (
                    len(present) + elsewhere, MAX_DISCOVERED))
        incomplete = {each.link.name for each in macvlans if not each.is_whole}
        removed = [record for address, record in list(bound.items())
                   if (address not in desired
                       and record.owner.ifname not in incomplete)
                   or (address in desired
                       and record.owner.ifname != desired[address].link.name)]
        is_done = all([self._unbind(record, location) for record in removed])
        new = {address: macvlan for address, macvlan in desired.items()
               if not _is_current(bound.get(address), macvlan)}
        if new and not location.namespace.is_same(
                kernel.require_other_namespace(location.path)):
            raise exceptions.NetnsUnusable(
                netns=location.path, reason='is a different namespace now')
        ends, remaining = time.monotonic() + _TURN, list(new.items())
        while remaining:
            is_done &= self._bind(*remaining.pop(0))
            if time.monotonic() > ends:
                break
        is_done &= not remaining
        if not self.has_bound(location.namespace):
            del self._containers[location.namespace]
        return is_done

    def _is_eligible(self, macvlan: kernel.Macvlan) -> bool:
        """Return whether addresses of an interface may be bound."""
        refusal = containers.of_interface(self._options, macvlan)
        if refusal is None or refusal[0] is not containers.Reason.OTHER_PARENT:
            return refusal is None
        # If the interface of [break0] parent does not exist, for example after
        # a rename, bound addresses stay bound: their parent may be this
        # interface under another name.
        return any(record.owner.ifname == macvlan.link.name for record in
                   self._records.get(macvlan.namespace, {}).values()) and (
            not kernel.has_interface(str(self._options.parent)))

    def _bind(self, address: model.IPAddress, macvlan: kernel.Macvlan) -> bool:
        """Bind an address, unless a claim or the policy forbids the bind.

        :returns: False if an error may be temporary
        """
        reason = self._policy.refusal(address, model.Origin.DISCOVERED)
        if reason is not None:
            self._log_refusal(address, macvlan, 'it is %s. For the remedy, '
                              'run: kuryr-break0 doctor' % reason)
            return True
        owner = model.Owner(make_owner_id(macvlan.namespace),
                            macvlan.link.name)
        with contextlib.suppress(exceptions.LedgerUnavailable):
            for claim in self._ledger.records.claims(address):
                if claim.owner == owner or kernel.judge_state(
                        *claim.place) is kernel.State.GONE:
                    continue
                if claim.namespace is None or not claim.namespace.is_same(
                        macvlan.namespace):
                    self._log_refusal(
                        address, macvlan, 'it belongs to %s. Change the '
                        'address of one of them.' % claim.owner_text)
                    return False  # the owner may end soon
                if claim.is_rebuilt and claim.owner.ifname == owner.ifname:
                    continue  # bind again, because the MAC address has changed
                return True  # Kuryr, CNI or the command has bound it
        # Bind each address alone, so that an error concerns only one address.
        try:
            self._manager.bind(
                owner, [address], parent=macvlan.parent,
                mac=macvlan.link.mac, netns=macvlan.netns, yielding=True,
                origin=model.Origin.DISCOVERED)
        except exceptions.Break0Error as err:
            self._log_refusal(address, macvlan, str(err))
            return isinstance(err, exceptions.AddressRefused)
        record = model.Record(
            address, owner, macvlan.parent, macvlan.link.mac,
            netns=macvlan.netns, namespace=macvlan.namespace,
            origin=model.Origin.DISCOVERED)
        self._records.setdefault(macvlan.namespace, {})[address] = record
        self._on_change()
        return True

    def _log_refusal(self, address: model.IPAddress, macvlan: kernel.Macvlan,
                     reason: str) -> None:
        """Log the reason why an address is not bound, once.

        Also note the namespace, so that the finder reads it again after the
        next sync.

        :param reason: the reason and the remedy
        """
        if len(self._refused) < _MAX_REFUSALS:
            self._refused.add(macvlan.namespace)
        refusal = address, macvlan.namespace.cookie, reason
        now = time.monotonic()
        if len(self._refusals) >= _MAX_REFUSALS and now >= self._clear_at:
            self._refusals.clear()
        if refusal not in self._refusals and (
                len(self._refusals) < _MAX_REFUSALS):
            self._refusals.add(refusal)
            self._clear_at = now + _REFUSAL_SECONDS
            LOG.warning('%s, on %s in %s, is not bound: %s', address,
                        macvlan.link.name, self._describe(macvlan), reason)

    def _describe(self, macvlan: kernel.Macvlan) -> str:
        """Return the path of a namespace, with the container name if known."""
        names = [record.pod for record in self._records.get(
            macvlan.namespace, {}).values() if record.pod]
        return '%s (%s)' % (names[0], macvlan.netns) if names else (
            macvlan.netns)

    def _unbind(self, record: model.Record, location: kernel.NamespaceLocation
                ) -> bool:
        """Unbind an address; return whether the unbind succeeded."""
        try:
            self._manager.unbind(record.owner, [record.address], location.path)
        except exceptions.Break0Error as err:
            LOG.error('Cannot unbind %s of %s. The agent will try again: %s',
                      record.address, record.pod or record.owner, err)
            return False
        self._records.get(location.namespace, {}).pop(record.address, None)
        self._on_change()
        return True

    def unbind_ended(self, namespace: model.NamespaceId) -> bool:
        """Unbind the addresses of a namespace that the kernel has deleted.

        If the deletion cannot be proven, unbind no address.

        :returns: False if the caller must call again, because an unbind has
            failed or the deletion cannot be proven. For example, a proof needs
            a free file descriptor
        """
        records = self._records.get(namespace)
        if not records:
            # Return early, because a container can create and delete thousands
            # of namespaces.
            return True
        failure = failures.Failures()
        try:
            if any(kernel.judge_state(*record.place) is not kernel.State.GONE
                   for record in records.values()):
                return False
            remaining = transitions.Engine(
                self._options, self._ledger).remove_gone(records, failure)
            failure.raise_first()
        except exceptions.Break0Error as err:
            first = next(iter(records.values()))
            LOG.error('Cannot unbind %s of %s, which has ended. The agent '
                      'will try again: %s', ', '.join(map(str, records)),
                      first.pod or first.owner, err)
            return False
        if any(claim.namespace == namespace for claim in remaining):
            return False
        self._containers.pop(namespace, None)
        if self._records.pop(namespace, None):
            self._on_change()
        return True


def _select_fields(records: dict[model.IPAddress, model.Record]
                   ) -> set[tuple[Any, ...]]:
    """Return the fields of records that discovery reads from interfaces."""
    return {(each.address, each.owner, each.parent, each.mac)
            for each in records.values()}


def _is_current(record: Optional[model.Record],
                macvlan: kernel.Macvlan) -> bool:
    """Return whether a record exists and matches an interface."""
    return record is not None and (record.mac, record.parent) == (
        macvlan.link.mac, macvlan.parent) and (
        record.netns == macvlan.netns
        or kernel.identify(record.netns) == macvlan.namespace)
