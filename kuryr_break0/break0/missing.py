# SPDX-License-Identifier: Apache-2.0

"""Finds recorded addresses that the interfaces of their pods do not have.

A container may change its address, for example by DHCP. The route of the old
address then leads to this container, although another host may have got the
old address. An address counts as released only if the interface has another
address of the family instead, and if two syncs find this state. Both
conditions are needed: Kuryr adds the addresses to a pod after the bind, and a
DHCP client removes the old address before it adds the new address.
"""

from __future__ import annotations

from typing import Collection, Iterable, NamedTuple

from kuryr_break0 import kernel
from kuryr_break0.ledger.cache import Cache
from kuryr_break0.ledger import files
from kuryr_break0 import model

#: A pause in seconds. For this time after the bind of an address, syncs do not
#: check whether the address is missing. A missing address counts as released
#: if a sync finds the address missing at least this time after the first sync
#: that found it missing.
PAUSE = 10.0
#: Key in the ledger's cache for the times of the first sightings.
_NAME = 'missing'


class Missing(NamedTuple):
    """A recorded address that the interface does not have.

    :ivar is_replaced: whether the interface has another address of the family
    """

    record: model.Record
    is_replaced: bool

    def __str__(self) -> str:
        return 'the interface %s of its container does not have it, %s' % (
            self.record.owner.ifname,
            'and has other addresses. If the interface still lacks it after '
            '%d s, a sync unbinds it' % PAUSE if self.is_replaced else
            'and has no other IPv%d address. It stays bound, because a '
            'program in the container, such as a DHCP client, may add it '
            'again' % self.record.address.version)


def find(states: Collection[kernel.AddressState], link: kernel.Link,
         records: Collection[model.Record], pause: float = PAUSE
         ) -> list[Missing]:
    """Return the recorded addresses that a namespace does not have.

    If the interface is down, the list is empty. The list is also empty if the
    newest record has another MAC address than the interface, because the
    record may describe another interface. Two kinds of addresses do not make
    ``is_replaced`` true: link-local addresses, and IPv6 addresses with a
    limited lifetime, which the kernel creates from router advertisements.

    :param states: all addresses of the namespace
    :param link: the interface
    :param records: records of the interface, at least one. Records without a
        namespace, or younger than `pause`, are ignored
    :param pause: the minimum time in seconds since the bind
    """
    newest = max(records, key=lambda record: record.bound_at)
    if not link.up or link.mac != newest.mac:
        return []
    present = {state.address for state in states}
    given = {state.address.version for state in states
             if state.ifindex == link.index
             and not state.address.is_link_local
             and (state.address.version == 4
                  or state.flags & kernel.IFA_F_PERMANENT)}
    settled = files.now() - pause
    return [Missing(record, record.address.version in given)
            for record in records
            if record.address not in present and record.bound_at <= settled
            and record.namespace is not None]


class Sightings:
    """Replaced addresses, each with the time when a sync first found it.

    :param cache: cache of the ledger, which keeps the sightings between syncs
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._first: dict[str, float] = {}
        for key, when in (each for each in cache.get(_NAME) or ()
                          if isinstance(each, list) and len(each) == 2):
            if isinstance(key, str) and isinstance(when, float):
                self._first[key] = when

    def has(self, records: Iterable[model.Record]) -> bool:
        """Return whether an earlier sync found one of the records replaced."""
        return bool(self._first) and any(
            _key(record) in self._first for record in records)

    def note(self, records: Iterable[model.Record],
             missing: Iterable[Missing]) -> list[Missing]:
        """Note the missing addresses of an interface.

        :param records: all records of the interface
        :param missing: result of :func:`find` for these records; only replaced
            addresses count
        :returns: replaced addresses that were first found missing at least
            PAUSE ago
        """
        now, by_key = files.now(), {_key(each.record): each
                                    for each in missing if each.is_replaced}
        for key in map(_key, records) if self._first else ():
            if key not in by_key:
                self._first.pop(key, None)
        for key in by_key:
            self._first.setdefault(key, now)
        return [each for key, each in by_key.items()
                if now - self._first[key] >= PAUSE]

    def keep(self, records: Iterable[model.Record]) -> None:
        """Store the sightings in the cache; drop sightings without a record.

        :param records: all records of the ledger
        """
        before = self._cache.get(_NAME) or []
        noted = set(map(_key, records)) if self._first else set()
        kept = [[key, when] for key, when in self._first.items()
                if key in noted]
        if kept != before:
            self._cache.put(_NAME, kept)


def _key(record: model.Record) -> str:
    """Return a key that identifies one bind of an address."""
    return '%s %r %s' % (record.address, record.bound_at, record.owner)
