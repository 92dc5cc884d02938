# SPDX-License-Identifier: Apache-2.0

"""Finds recorded addresses that the interfaces of their pods do not have.

A container may change its address, as by DHCP. Then the route of the earlier
one would keep the node from the next host that has it. But an absence counts
only beside a presence, and if it is seen twice: Kuryr gives a pod its
addresses after they are bound, and a DHCP client takes one away before it
gives the next.
"""

from __future__ import annotations

from typing import Collection, Iterable, NamedTuple

from kuryr_break0 import kernel
from kuryr_break0.ledger.cache import Cache
from kuryr_break0.ledger import files
from kuryr_break0.model import Record

#: Seconds from the bind of an address to the first look that counts, and from
#: that to the second.
PAUSE = 10.0
#: Where the cache keeps the first sightings.
_NAME = 'missing'


class Missing(NamedTuple):
    """An address that its interface does not have.

    :ivar is_replaced: whether the interface has another one of the family
    """

    record: Record
    is_replaced: bool

    def __str__(self) -> str:
        return 'the interface %s of its container does not have it, %s' % (
            self.record.owner.ifname,
            'but has other addresses in its place. It is unbound if a sync '
            'sees that again after %d s' % PAUSE if self.is_replaced else
            'nor another IPv%d address in its place. It stays bound, since '
            'a program in the container, as a DHCP client, may give it back' %
            self.record.address.version)


def find(states: Collection[kernel.AddressState], link: kernel.Link,
         records: Collection[Record]) -> list[Missing]:
    """Compare the records of an interface with what its namespace has.

    An interface proves nothing that is down, or that may be another one by
    its MAC address. Nor does one without an address of the family, or with
    IPv6 addresses only that the kernel makes by router advertisements.

    :param states: all addresses of the namespace
    :param records: those of the interface, recorded with its namespace
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
    settled = files.now() - PAUSE
    return [Missing(record, record.address.version in given)
            for record in records
            if record.address not in present and record.bound_at <= settled
            and record.namespace is not None]


class Sightings:
    """The addresses that were missing in earlier looks.

    :param cache: keeps them from one sync to the next
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._first: dict[str, float] = {}
        for key, when in (each for each in cache.get(_NAME) or ()
                          if isinstance(each, list) and len(each) == 2):
            if isinstance(key, str) and isinstance(when, float):
                self._first[key] = when

    def has(self, records: Iterable[Record]) -> bool:
        """Return whether one of some addresses was missing."""
        return bool(self._first) and any(
            _key(record) in self._first for record in records)

    def note(self, records: Iterable[Record],
             missing: Iterable[Missing]) -> list[Missing]:
        """Note a look at an interface; return what a look before has seen.

        :param records: those of the interface
        :param missing: those of them that it lacks, and has others for
        """
        now, seen = files.now(), {_key(each.record): each
                                  for each in missing if each.is_replaced}
        for key in map(_key, records) if self._first else ():
            if key not in seen:
                self._first.pop(key, None)
        for key in seen:
            self._first.setdefault(key, now)
        return [each for key, each in seen.items()
                if now - self._first[key] >= PAUSE]

    def keep(self, records: Iterable[Record]) -> None:
        """Keep what concerns records that are there."""
        before = self._cache.get(_NAME) or []
        known = set(map(_key, records)) if self._first else set()
        kept = [[key, when] for key, when in self._first.items()
                if key in known]
        if kept != before:
            self._cache.put(_NAME, kept)


def _key(record: Record) -> str:
    """Return what names one bind of an address."""
    return '%s %r %s' % (record.address, record.bound_at, record.owner)
