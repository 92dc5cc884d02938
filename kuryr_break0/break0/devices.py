# SPDX-License-Identifier: Apache-2.0

"""The break0 devices of a ledger: their names, owners and state.

Before each change of a break0, this module checks that the ledger owns the
break0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from typing import Any, Callable, Collection, Iterable, Optional

from kuryr_break0.break0 import device
from kuryr_break0.break0.guard import Guard
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.ledger.identity import ownership
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

_MAX_NAME = 15  # IFNAMSIZ, with the closing NUL


@dataclasses.dataclass(frozen=True)
class Break0:
    """The break0 for the addresses of one bind.

    :ivar needs_sync: whether a sync must restore routes or guard entries of
        other pods, because the break0 was created or repaired, or its guard
        was deleted
    """

    name: str
    index: int
    mac: str
    needs_sync: bool


class Names:
    """The names of the break0 devices of a ledger.

    :ivar by_parent: names of the break0 devices, by the current name of the
        parent; a break0 stays on its parent if the parent is renamed
    :ivar primary: the parent of the break0 that is named [break0] device;
        None if there is no such break0 yet

    :param identity: the identity of the ledger
    :param link_of: returns an interface by its name
    :param links: returns all interfaces; called if the ledger may be new
    :param used: names of the parents that have pods. If such a parent is
        missing, its name stays in ``by_parent``, because the parent was
        deleted and not renamed. The parent was a macvlan: the kernel keeps its
        break0, which is a macvlan on the same lower interface
    """

    def __init__(self, options: config.Options, identity: Optional[Identity],
                 link_of: Callable[[str], Optional[kernel.Link]],
                 links: Callable[[], Iterable[kernel.Link]],
                 used: Collection[str]) -> None:
        self._options = options
        self.by_parent: dict[str, str] = {}
        for parent, name in recorded(options, identity, links).items():
            lower, link = link_of(parent), link_of(name)
            now = lower.name if lower is not None else parent
            if link is not None and (
                    ownership(link, identity, options.state_dir)
                    is Ownership.OURS) and (
                    now not in used if lower is None
                    else lower.lower_of_macvlans
                    != (link.lower, link.lower_namespace)):
                now = device.lower_name(link) or now
            if link is not None or now not in self.by_parent:
                self.by_parent[now] = name
        self.primary = options.parent or next(
            (parent for parent, name in self.by_parent.items()
             if name == options.device and (
                 parent in used or kernel.find_ifindex(parent) is not None)),
            None)
        link = link_of(options.device)
        if self.primary is None and link and Alias.parse(link.alias):
            self.primary = device.lower_name(link)

    def of(self, parent: str) -> str:
        """Return the name of the break0 of a parent.

        The break0 of the primary parent has the name ``[break0] device``. The
        name of another break0 also contains the name of its parent or, if the
        result is too long, a digest of the parent's name. A recorded name does
        not change.
        """
        options = self._options
        recorded_name = self.by_parent.get(parent, options.device)
        if self.primary != parent and recorded_name != options.device:
            return recorded_name  # may contain an earlier name of the parent
        if self.primary in (None, parent):
            return options.device
        name = '%s-%s' % (options.device, parent)
        if (len(name) <= _MAX_NAME and name not in self.by_parent.values()
                and re.fullmatch(r'[\w.-]+', name, re.ASCII)):
            return name
        # Use a digest: the first characters of two long names can be the same.
        return '%s-%s' % (options.device[:6], hashlib.sha256(
            os.fsencode(parent)).hexdigest()[:8])


def recorded(options: config.Options, identity: Optional[Identity],
             links: Callable[[], Iterable[kernel.Link]]) -> dict[str, str]:
    """Return the names of the break0 devices, by their recorded parents.

    A ledger without recorded devices may be new. For such a ledger, return the
    devices with an alias that contains its state directory.
    """
    if identity is not None and identity.devices:
        return identity.devices
    names = {}
    for link in links():
        alias, parent = Alias.parse(link.alias), device.lower_name(link)
        if alias and parent and alias.directory == options.state_dir:
            names[parent] = link.name
    return names


class Devices:
    """The break0 devices of a ledger.

    The caller of ``get``, ``renew``, ``ensure`` and ``ensure_guard`` holds the
    lock. Only a bind may proceed without the lock.
    """

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger

    def names(self, recorded: bool = False) -> set[str]:
        """Return the names of all break0 devices that this ledger may own.

        :param recorded: omit [break0] device if the ledger has recorded names
        """
        identity = self._ledger.identity()
        names = set(identity.devices.values()) if identity else set()
        return names if names and recorded else {self._options.device, *names}

    def indexes(self) -> list[int]:
        return [index for index in map(kernel.find_ifindex, self.names())
                if index is not None]

    def count_routes(self, names: Collection[str]) -> int:
        """Count the host routes in our table on the named interfaces."""
        table = self._options.route_table
        if table == kernel.RT_TABLE_MAIN:
            return kernel.count_host_routes(names)
        with kernel.Netlink() as netlink:
            return sum(len(netlink.host_routes_of(index, table))
                       for index in map(kernel.find_ifindex, names)
                       if index is not None)

    def name(self, parent: str) -> Optional[str]:
        """Return the recorded name of a parent's break0, or None."""
        identity = self._ledger.identity()
        return identity.devices.get(parent) if identity else None

    def get(self, netlink: kernel.Netlink, parent: str) -> Break0:
        """Return the break0 of a parent; create or repair it if necessary.

        The result is cached. The kernel assigns ifindexes in ascending order,
        so a later interface with the cached name has another ifindex.
        """
        cache = self._ledger.cache
        cached = cache.get_recent('device.' + parent)
        if cached is not None:
            with contextlib.suppress(TypeError, ValueError, IndexError):
                name, index, mac, *key = cached
                if (key == self._read_cache_key(parent)
                        and kernel.find_ifindex(name) == index):
                    return Break0(name, index, mac, False)
        ensured = self.ensure(netlink, parent, claim=True)
        link = ensured.link
        cache.put('device.' + parent, [
            link.name, link.index, link.mac, *self._read_cache_key(parent)])
        return Break0(link.name, link.index, link.mac, ensured.needs_sync)

    def renew(self, netlink: kernel.Netlink, break0: Break0,
              parent: str) -> Break0:
        """Create or repair a break0 that a bind has found down or gone."""
        ensured = self.ensure(netlink, parent, claim=True)
        return Break0(break0.name, ensured.link.index, ensured.link.mac,
                      break0.needs_sync or ensured.needs_sync)

    def _read_cache_key(self, parent: str) -> list[Any]:
        return [self._options.device, kernel.find_ifindex(parent),
                *map(str, self._options.addr)]

    def ensure(self, netlink: kernel.Netlink, parent: str,
               claim: bool = False, name: Optional[str] = None,
               needs_ipv6: bool = False) -> device.Ensured:
        """Create or repair the break0 of a parent, and its guard.

        :param claim: if True, take over a break0 of another ledger
        :param name: the name of the break0; None to determine it
        :param needs_ipv6: whether its pods have IPv6 addresses
        :raises OtherLedger: if the break0 belongs to another ledger and
            ``claim`` is False
        :raises Break0Error: if the break0 cannot be created or repaired
        """
        options, ledger = self._options, self._ledger
        try:
            identity = ledger.ensure_identity()
        except exceptions.LedgerUnavailable as err:
            # Continue with a new identity. The MAC address of break0 can
            # change, but without break0 the pod would be unreachable.
            LOG.error('%s', err)
            identity = Identity.new()
        names = Names(options, identity, netlink.link, netlink.links,
                      (parent,))
        name = name or names.of(parent)
        link = netlink.link(name)
        other = Alias.parse(link.alias) if link is not None and ownership(
            link, identity, options.state_dir).is_foreign else None
        if other is not None and not claim:
            raise self.other_ledger(name, other)
        index = kernel.find_ifindex(parent)
        made = device.Device(options, name, parent, identity)
        ensured = made.ensure(
            netlink, device.derived_mac(identity.secret, name), needs_ipv6)
        changed = dataclasses.replace(
            identity,
            devices={**{other_parent: each for other_parent, each
                        in names.by_parent.items() if each != name},
                     parent: name},
            macs={**identity.macs, name: ensured.link.mac})
        if other is not None and other.directory == options.state_dir:
            changed = dataclasses.replace(changed, claimed={
                **identity.claimed, name: other.ledger})
        if changed != identity:
            # The cached device has the earlier MAC address.
            ledger.cache.drop('device.' + parent)
            with failures.Failures().log_errors():
                ledger.put_identity(changed)
        if ensured.repaired:
            with contextlib.suppress(exceptions.LedgerUnavailable):
                # The creation of a break0 for its first pod is no repair.
                if not claim or ledger.records.count() > 1:
                    self._ledger.journal.add(Done.DEVICE)
        is_open = self.ensure_guard(netlink, ensured.link, index)
        return ensured._replace(needs_sync=ensured.needs_sync or is_open)

    def other_ledger(self, name: str, other: Alias) -> exceptions.OtherLedger:
        return exceptions.OtherLedger(
            device=name, own=self._options.state_dir, **other._asdict())

    def _is_others(self, link: Optional[kernel.Link]) -> bool:
        """Return whether a break0 belongs to another ledger; warn if so.

        The other ledger can have records of pods that this ledger does not
        know. So if the result is True, the caller must not delete items on
        that break0.

        :raises LedgerUnavailable: if the identity of this ledger is damaged
        """
        owner = ownership(link, self._ledger.identity(),
                          self._options.state_dir)
        alias = Alias.parse(link.alias) if link is not None else None
        if link is None or alias is None or owner is not Ownership.OTHER:
            return False
        LOG.warning('%s', self.other_ledger(link.name, alias))
        return True

    def has_lost(self) -> bool:
        """Return whether a lost ledger in the state directory has break0s.

        The result is False as soon as the new ledger has an identity.

        :raises LedgerUnavailable: if the identity of this ledger is damaged
        """
        if self._ledger.identity() is not None:
            return False
        with kernel.Netlink() as netlink:
            return any(ownership(link, None, self._options.state_dir)
                       is Ownership.LOST for link in netlink.links())

    def without_others(self, netlink: kernel.Netlink, names: Iterable[str]
                       ) -> list[str]:
        """Return the names of the break0s that belong to no other ledger."""
        return [name for name in names
                if not self._is_others(netlink.link(name))]

    def ensure_guard(self, netlink: kernel.Netlink, link: kernel.Link,
                     parent: Optional[int], is_filled: bool = False) -> bool:
        """Load the guard of a break0 if it is missing or was changed.

        A new guard has no entries. If pods have a route, a sync must add their
        entries at once. A pod without a route gets its entries together with
        its route.

        :param parent: the ifindex of the parent
        :param is_filled: whether the guard has the entries of all pods with a
            route
        :returns: whether a sync must add the entries of pods with a route
        :raises GuardUnavailable: if the guard cannot be loaded and [break0]
            guard is on; otherwise the error is logged once
        """
        try:
            is_open = Guard(self._options, self._ledger, link.name).ensure(
                link, self._policy.solicited(netlink.addresses(), parent,
                                             link.name),
                lambda: self.count_routes([link.name]) > 0, is_filled)
        except (exceptions.GuardUnavailable, exceptions.KernelRefused,
                OSError) as err:
            if self._options.guard == config.ON:
                raise
            self.warn_once('unguarded', str(err))
            return False
        if not is_open:
            self.warn_once('unguarded', '')
        return is_open

    def warn_once(self, kind: str, text: str, fact: str = '') -> None:
        """Log a warning, unless it equals the last warning of its kind.

        The state directory keeps the last warning of each kind, so that a
        process does not repeat the warning of an earlier process.

        :param kind: name of the kind in the cache
        :param text: the warning; empty if the problem is solved
        :param fact: a text to compare instead of ``text``, if ``text`` changes
            while the problem stays the same
        """
        fact_list = [text and (fact or text)]
        if (self._ledger.cache.get(kind) or ['']) != fact_list:
            self._ledger.cache.put(kind, fact_list)
            if text:
                LOG.warning('%s', text)
