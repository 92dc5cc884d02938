# SPDX-License-Identifier: Apache-2.0

"""Finds macvlans in other namespaces, and binds their addresses.

What a container does in its namespace is its own business, and it may do it
a thousand times a second. So an event only marks a namespace to be read,
each is read once a second if it changes all the time, and all of it takes
a tenth of a processor at most. The timer of the agent is the guarantee.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Callable, Optional

from kuryr_break0 import config
from kuryr_break0 import containers
from kuryr_break0.discovery.namespace import BURST
from kuryr_break0.discovery.namespace import LAST
from kuryr_break0.discovery.namespace import Namespace
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
from kuryr_break0.pace import Pace
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

#: Addresses of one container that are bound. It can have thousands, and make
#: namespaces with more.
MAX_ADDRESSES = 32
#: Seconds of looks after which the rest waits, since the agent has other work.
_AT_ONCE = 0.05
#: So many messages at once are a flood, which is read in larger portions.
_FLOOD = 32
_FLOOD_PAUSE = 0.1
#: Seconds between two looks where the kernel sends no events.
_BLIND = 1.0
#: Seconds after which an end that cannot be proven is left to the timer.
_GIVE_UP = 60.0
#: Different refusals that are remembered, so that each is logged once, and
#: seconds until others are logged after these: a container can cause any
#: number.
_REMEMBERED, _FORGET = 1024, 60.0


class Finder:
    """Keeps bound what the namespaces of the node have.

    To be used by one thread.

    :param options: with ``discover``
    :param changed: called when what is bound has changed
    """

    def __init__(self, options: config.Options, ledger: Ledger,
                 changed: Callable[[], None] = lambda: None) -> None:
        self._options = options
        self._ledger = ledger
        self._policy = Policy(options)
        self._manager = Break0Manager(options)
        self._mounts = kernel.open_mounts()
        self._events: Optional[kernel.NamespaceEvents] = None
        try:
            self._events = kernel.NamespaceEvents()
        except OSError as err:
            LOG.warning('The kernel sends no events of containers (%s), so '
                        'they are looked for every second. Give the agent '
                        'CAP_NET_BROADCAST.', err)
        self._namespaces: dict[int, Namespace] = {}
        #: those that one container is in, or has made
        self._of_container: dict[int, list[NamespaceId]] = {}
        #: namespaces that have ended: when to unbind what they had, and
        #: seconds until the next try if that cannot be proven yet
        self._ended: dict[NamespaceId, tuple[float, float]] = {}
        #: what was discovered where, as recorded
        self._records: dict[NamespaceId, dict[IPAddress, Record]] = {}
        self._read_records()
        #: monotonic time of the next search for namespaces
        self._search_at: Optional[float] = 0.0
        self._not_before = 0.0
        self._pace = Pace()
        self._refusals: set[tuple[IPAddress, Optional[int], str]] = set()
        self._forget_at = 0.0
        self._changed = changed

    def close(self) -> None:
        self._mounts.close()
        if self._events is not None:
            self._events.close()

    def files(self) -> list[int]:
        """Return what select(2) is to wait for until it can be read."""
        return [] if self._events is None else [self._events.fileno()]

    def conditions(self) -> list[int]:
        """Return what has an exceptional condition when mounts change."""
        return [self._mounts.fileno()]

    def note(self) -> None:
        """Read what has happened; nothing is done about it yet."""
        now = time.monotonic()
        if self._events is None:
            return
        changes = self._events.get()
        if changes.lost:
            self.mark_all()
        if changes.is_new:
            self.search()
        for number in changes.changed:
            namespace = self._namespaces.get(number)
            if namespace is not None:
                namespace.mark(now)
            else:
                self.search()
        for number in changes.ended:
            namespace = self._namespaces.pop(number, None)
            if namespace is not None:
                self._end(namespace.found.namespace)
                self.search()  # it may have the number of one before it
        if changes.messages >= _FLOOD:
            # Not longer than until there is something to do.
            time.sleep(max(0.0, min(_FLOOD_PAUSE, (self.due() or now + 1)
                                    - now)))

    def mark_all(self) -> None:
        """Mark everything to be read, like the timer."""
        now = time.monotonic()
        self._read_records()
        self.search()
        for namespace in self._namespaces.values():
            namespace.mark(now)
        self._changed()

    def _read_records(self) -> None:
        records: dict[NamespaceId, dict[IPAddress, Record]] = {}
        # If it cannot be read, what it had before counts.
        with contextlib.suppress(exceptions.LedgerUnavailable):
            for record in followed(self._ledger):
                if record.namespace is not None:
                    records.setdefault(record.namespace, {})[
                        record.address] = record
            self._records = records

    def search(self) -> None:
        """Have namespaces searched for, as when mounts have changed."""
        if self._search_at is None:
            self._search_at = time.monotonic() + BURST

    def due(self) -> Optional[float]:
        """Return the monotonic time of the next :meth:`look`, if any."""
        times = [namespace.due for namespace in self._namespaces.values()
                 if namespace.due is not None]
        times += [at for at, _ in self._ended.values()]
        if self._search_at is not None:
            times.append(self._search_at)
        return max(min(times), self._not_before) if times else None

    def postpone(self) -> None:
        """Do nothing for a second, as after a fault of this process."""
        self._not_before = time.monotonic() + LAST

    def look(self) -> None:
        """Do what is due: bind what is new, unbind what is not there.

        After an error, what it did not get to is still due.
        """
        began = time.monotonic()
        self._pace.begin()
        if self._search_at is not None and self._search_at <= began:
            self._find()
            self._search_at = None if self._events is not None else (
                began + _BLIND)
        for identity, (at, _) in list(self._ended.items()):
            if at <= began:
                self._unbind_ended(identity, began)
        for due, number in sorted(
                (namespace.due, number) for number, namespace
                in self._namespaces.items() if namespace.due is not None):
            now = time.monotonic()
            if due > began or now > began + _AT_ONCE:
                break
            namespace = self._namespaces[number]
            namespace.due, namespace.looked = None, now
            try:
                if not self._look_at(namespace):
                    del self._namespaces[number]
            except Exception:
                namespace.mark(now)
                raise
        self._not_before = time.monotonic() + self._pace.end()

    def _find(self) -> None:
        """Find the namespaces of the node, and number those that are new.

        The events of one begin with that, so it is read afterwards.

        :raises SystemRefused: if this process cannot see all; then none is
            taken for gone
        """
        known = {namespace.found.namespace: number
                 for number, namespace in self._namespaces.items()}
        now = time.monotonic()
        present = {}
        for found in kernel.find(self._options.proc_dirs):
            self._ended.pop(found.namespace, None)
            number = known.get(found.namespace)
            if number is None:
                try:
                    number = kernel.number(found)
                except exceptions.NetnsUnusable as err:
                    LOG.debug('Skipping a network namespace for now: %s', err)
                    continue
                except exceptions.KernelRefused as err:
                    if err.exhausted:
                        raise
                    # Without a number it has no events, but the timer.
                    LOG.debug('Changes of %s are noticed by the timer '
                              'only: %s', found.path, err)
                    number = -found.namespace.inode
                present[number] = Namespace(
                    found, kernel.container_of(found.process), due=now)
            else:
                present[number] = dataclasses.replace(
                    self._namespaces[number], found=found)
                if self._events is None:
                    present[number].mark(now)
        for number, namespace in self._namespaces.items():
            identity = namespace.found.namespace
            if number in present:
                # The kernel uses numbers again.
                if present[number].found.namespace != identity:
                    self._end(identity)
            elif identity in self._records and kernel.state(
                    namespace.found.path, identity) is kernel.State.LIVING:
                # Somebody keeps it open, as Podman 4's server does. The
                # kernel has it by its number, and tells of its end.
                namespace.mark(now)
                present[number] = namespace
            else:
                self._end(identity)
        self._namespaces = present
        self._of_container = {}
        for namespace in present.values():
            if namespace.container is not None:
                self._of_container.setdefault(namespace.container, []).append(
                    namespace.found.namespace)

    def _look_at(self, namespace: Namespace) -> bool:
        """Bind and unbind what has changed; False if it is not there."""
        found = namespace.found
        try:
            macvlans = [each for each in kernel.macvlans_in(
                found.path, found.namespace) if self._is_eligible(each)]
        except exceptions.NetnsUnusable:
            self._end(found.namespace)
            return False
        except exceptions.KernelRefused as err:
            LOG.debug('Skipping a network namespace for now: %s', err)
            namespace.mark(time.monotonic())
            return True
        own = self._records.get(found.namespace, {})
        present = [(address, macvlan) for macvlan in macvlans
                   for address in macvlan.addresses
                   if address not in macvlan.unproven]
        duplicates = [each for macvlan in macvlans
                      for each in macvlan.duplicates]
        for address in duplicates[:MAX_ADDRESSES]:
            self._refuse(address, found.namespace, 'another host has it, as '
                         'duplicate address detection has found')
        # Those that are bound come first, so that others do not displace
        # them where there are too many.
        present.sort(key=lambda each: each[0] not in own)
        others = sum(len(self._records.get(other, ())) for other
                     in self._of_container.get(namespace.container or 0, ())
                     if other != found.namespace)
        # More are bound where they were rebuilt, which others had bound.
        most = max(MAX_ADDRESSES - others, len(own))
        wanted = dict(present[:most])
        if len(present) > most:
            self._refuse(present[-1][0], found.namespace, 'its container in '
                         '%s has %d addresses, and %d are allowed' % (
                             found.path, len(present) + others,
                             MAX_ADDRESSES))
        gone = [record for address, record in list(own.items())
                if address not in wanted
                or record.owner.ifname != wanted[address].link.name]
        for record in gone:
            self._unbind(record, namespace)
        for address, macvlan in wanted.items():
            bound = self._records.get(found.namespace, {}).get(address)
            if bound is None or bound.mac != macvlan.link.mac or (
                    bound.parent != macvlan.parent):
                self._bind(address, macvlan, namespace)
        return True

    def _is_eligible(self, macvlan: kernel.Macvlan) -> bool:
        against = containers.of_interface(self._options, macvlan)
        if against is None or against[0] is not containers.Reason.OTHER_PARENT:
            return against is None
        # An option whose interface is not there, as one that was renamed,
        # does not say that what is bound is on another one.
        return any(record.owner.ifname == macvlan.link.name for record in
                   self._records.get(macvlan.namespace, {}).values()) and (
            not kernel.exists(str(self._options.parent)))

    def _bind(self, address: IPAddress, macvlan: kernel.Macvlan,
              namespace: Namespace) -> None:
        """Bind an address, unless it is another's or may not be.

        Each by itself, so that one that is refused costs no other.
        """
        reason = self._policy.not_allowed(address)
        if reason is not None:
            self._refuse(address, macvlan.namespace, 'it is ' + reason)
            return
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
                    # Which may be about to end.
                    namespace.mark(time.monotonic())
                elif claim.is_rebuilt and (
                        claim.owner.ifname == owner.ifname):
                    continue  # rebuilt, before its MAC address changed
                return  # or it was bound for this container by another way
        try:
            self._manager.bind(
                owner, [address], parent=macvlan.parent,
                mac=macvlan.link.mac, netns=macvlan.netns, yielding=True,
                origin=Origin.DISCOVERED)
        except exceptions.Break0Error as err:
            self._refuse(address, macvlan.namespace, str(err))
            if not isinstance(err, exceptions.AddressRefused):
                namespace.mark(time.monotonic())
            return
        self._records.setdefault(macvlan.namespace, {})[address] = Record(
            address, owner, macvlan.parent, macvlan.link.mac,
            netns=macvlan.netns, namespace=macvlan.namespace,
            origin=Origin.DISCOVERED)
        self._changed()

    def _refuse(self, address: IPAddress, namespace: NamespaceId,
                reason: str) -> None:
        """Log why an address is not bound, once."""
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

    def _unbind(self, record: Record, namespace: Namespace) -> None:
        try:
            self._manager.unbind(record.owner, [record.address],
                                 namespace.found.path)
        except exceptions.Break0Error as err:
            LOG.error('%s stays bound for now: %s', record.address, err)
            namespace.mark(time.monotonic())
            return
        if record.namespace is not None:
            self._records.get(record.namespace, {}).pop(record.address, None)
        self._changed()

    def _end(self, namespace: NamespaceId) -> None:
        """Have what a namespace had unbound soon."""
        self._ended.setdefault(namespace, (time.monotonic() + BURST, BURST))

    def _unbind_ended(self, namespace: NamespaceId, now: float) -> None:
        """Unbind what a namespace had that is no more.

        The kernel sends that event some ms before it is proven. Each try
        waits as long as all before it.
        """
        _, pause = self._ended.pop(namespace)
        records = self._records.get(namespace)
        if not records:
            return  # as of each of the thousands that a container can make
        failure = Failures()
        try:
            # None of it may be left: what was proven a moment ago may not be
            # while this process lacks descriptors.
            if all(kernel.state(*record.place) is kernel.State.GONE
                   for record in records.values()):
                left = Engine(self._options, self._ledger).remove_gone(
                    records, failure)
                failure.raise_first()
                if not any(claim.namespace == namespace for claim in left):
                    if self._records.pop(namespace, None):
                        self._changed()
                    return
        except exceptions.Break0Error as err:
            LOG.error('%s', err)
        finally:
            if namespace in self._records and pause < _GIVE_UP:
                self._ended[namespace] = now + pause, 2 * pause
