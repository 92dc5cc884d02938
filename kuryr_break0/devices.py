# SPDX-License-Identifier: Apache-2.0

"""The break0s of a ledger: their names, whose they are, that they are there.

Whether a break0 belongs to another ledger is asked here, before anything is
changed on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from typing import Any, Callable, Collection, Iterable, Optional

from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import Guard
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.ledger.identity import ownership
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

_MAX_NAME = 15  # IFNAMSIZ, with the closing NUL


@dataclasses.dataclass
class Break0:
    """The break0 that the addresses of one bind go through.

    :ivar needs_sync: whether it was created or brought up for them, or its
        guard was deleted, so that those of others are to be restored
    """

    name: str
    index: int
    mac: str
    needs_sync: bool


class Names:
    """The names of the break0s of a ledger.

    :ivar known: those that there are, by the names their parents have now: a
        break0 stays on its parent when that is renamed
    :ivar primary: the parent that has [break0] device; None if none has yet

    :param identity: of the ledger
    :param link_of: returns an interface by its name
    :param links: lists all, for a ledger that may be a new one
    :param used: parents that pods are on, by their names of now. One of
        these that is gone was not renamed: it was a macvlan beside break0.
    """

    def __init__(self, options: config.Options, identity: Optional[Identity],
                 link_of: Callable[[str], Optional[kernel.Link]],
                 links: Callable[[], Iterable[kernel.Link]],
                 used: Collection[str]) -> None:
        self._options = options
        self.known: dict[str, str] = {}
        for parent, name in recorded(options, identity, links).items():
            known, link = link_of(parent), link_of(name)
            now = known.name if known is not None else parent
            if link is not None and (
                    ownership(link, identity, options.state_dir)
                    is Ownership.OURS) and (
                    now not in used if known is None
                    else known.lower_of_macvlans
                    != (link.lower, link.lower_namespace)):
                now = device.lower_name(link) or now
            if link is not None or now not in self.known:
                self.known[now] = name
        self.primary = options.parent or next(
            (parent for parent, name in self.known.items()
             if name == options.device and (
                 parent in used or kernel.find_ifindex(parent) is not None)),
            None)
        link = link_of(options.device)
        if self.primary is None and link and Alias.parse(link.alias):
            self.primary = device.lower_name(link)

    def of(self, parent: str) -> str:
        """Return the name of the break0 of a parent; always the same."""
        options = self._options
        known = self.known.get(parent, options.device)
        if self.primary != parent and known != options.device:
            return known  # it may be of the parent's earlier name
        if self.primary in (None, parent):
            return options.device
        name = '%s-%s' % (options.device, parent)
        if (len(name) <= _MAX_NAME and name not in self.known.values()
                and re.fullmatch(r'[\w.-]+', name, re.ASCII)):
            return name
        # The first characters of long names are often the same.
        return '%s-%s' % (options.device[:6], hashlib.sha256(
            os.fsencode(parent)).hexdigest()[:8])


def recorded(options: config.Options, identity: Optional[Identity],
             links: Callable[[], Iterable[kernel.Link]]) -> dict[str, str]:
    """Return the break0s by their parents, as the ledger knows these.

    Of one that knows none, and may be new, those that name its directory.
    """
    if identity is not None and identity.devices:
        return identity.devices
    found = {}
    for link in links():
        alias, parent = Alias.parse(link.alias), device.lower_name(link)
        if alias and parent and alias.directory == options.state_dir:
            found[parent] = link.name
    return found


class Devices:
    """Finds, examines and repairs them. Call it under the lock."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger

    def names(self, recorded: bool = False) -> set[str]:
        """Return the names of all that this ledger may have.

        :param recorded: without [break0] device, if it has made others
        """
        identity = self._ledger.identity()
        known = set(identity.devices.values()) if identity else set()
        return known if known and recorded else {self._options.device, *known}

    def indexes(self) -> list[int]:
        return [index for index in map(kernel.find_ifindex, self.names())
                if index is not None]

    def count_routes(self, names: Collection[str]) -> int:
        """Count the host routes on some interfaces."""
        table = self._options.route_table
        if table == kernel.RT_TABLE_MAIN:
            return kernel.count_host_routes(names)
        with kernel.Netlink() as netlink:
            return sum(len(netlink.host_routes_of(index, table))
                       for index in map(kernel.find_ifindex, names)
                       if index is not None)

    def name(self, parent: str) -> Optional[str]:
        """Return the name of that of a parent; None if it is not known."""
        identity = self._ledger.identity()
        return identity.devices.get(parent) if identity else None

    def get(self, netlink: kernel.Netlink, parent: str) -> Break0:
        """Make sure of the break0 of a parent.

        An ifindex is not used again, so the interface that has it is the one
        that was examined.
        """
        cache = self._ledger.cache
        cached = cache.get_recent('device.' + parent)
        if cached is not None:
            with contextlib.suppress(TypeError, ValueError, IndexError):
                name, index, mac, *rest = cached
                if (rest == self._circumstances(parent)
                        and kernel.find_ifindex(name) == index):
                    return Break0(name, index, mac, False)
        ensured = self.ensure(netlink, parent, claim=True)
        link = ensured.link
        cache.put('device.' + parent, [
            link.name, link.index, link.mac, *self._circumstances(parent)])
        return Break0(link.name, link.index, link.mac, ensured.needs_sync)

    def renew(self, netlink: kernel.Netlink, break0: Break0,
              parent: str) -> None:
        """Make sure of one that has just been down or gone."""
        ensured = self.ensure(netlink, parent, claim=True)
        break0.index, break0.mac = ensured.link.index, ensured.link.mac
        break0.needs_sync |= ensured.needs_sync

    def _circumstances(self, parent: str) -> list[Any]:
        return [self._options.device, kernel.find_ifindex(parent),
                *map(str, self._options.addr)]

    def ensure(self, netlink: kernel.Netlink, parent: str,
               claim: bool = False, name: Optional[str] = None,
               needs_ipv6: bool = False) -> device.Ensured:
        """Make sure of the break0 of a parent.

        :param claim: take it over if it belongs to another ledger
        :param name: what it is called; None if a snapshot did not say
        :param needs_ipv6: whether its pods have IPv6 addresses
        :raises OtherLedger: if it belongs to another ledger and stays so
        :raises Break0Error: if it cannot be made what it should be
        """
        options, ledger = self._options, self._ledger
        try:
            identity = ledger.ensure_identity()
        except exceptions.LedgerUnavailable as err:
            # A pod is worth more than a MAC address that stays the same.
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
        known = dataclasses.replace(
            identity,
            devices={**{other_parent: each for other_parent, each
                        in names.known.items() if each != name},
                     parent: name},
            macs={**identity.macs, name: ensured.link.mac})
        if other is not None and other.directory == options.state_dir:
            known = dataclasses.replace(known, claimed={
                **identity.claimed, name: other.ledger})
        if known != identity:
            ledger.cache.drop('device.' + parent)  # it has the earlier MAC
            with Failures().log_errors():
                ledger.put_identity(known)
        if ensured.repaired:
            with contextlib.suppress(exceptions.LedgerUnavailable):
                # A repair, unless it is made for the first pod.
                if not claim or ledger.records.count() > 1:
                    self._ledger.journal.add(Done.DEVICE)
        is_open = self.ensure_guard(netlink, ensured.link, index)
        return ensured._replace(needs_sync=ensured.needs_sync or is_open)

    def other_ledger(self, name: str, other: Alias) -> exceptions.OtherLedger:
        return exceptions.OtherLedger(
            device=name, own=self._options.state_dir, **other._asdict())

    def is_others(self, link: Optional[kernel.Link]) -> bool:
        """Return whether a break0 is another ledger's, and say so.

        That may know of pods which this one does not know, so nothing is
        taken away there.

        :raises LedgerUnavailable: if the identity of this one is damaged
        """
        found = ownership(link, self._ledger.identity(),
                          self._options.state_dir)
        alias = Alias.parse(link.alias) if link is not None else None
        if link is None or alias is None or found is not Ownership.OTHER:
            return False
        LOG.warning('%s', self.other_ledger(link.name, alias))
        return True

    def ensure_guard(self, netlink: kernel.Netlink, link: kernel.Link,
                     parent: Optional[int], is_filled: bool = False) -> bool:
        """Make sure of the guard of a break0.

        Who has no route through break0 is let in when he gets one.

        :param parent: the ifindex of its parent
        :param is_filled: whether all who have one are in the table
        :returns: whether a sync is to put them there
        :raises GuardUnavailable: if it cannot be had and [break0] guard is
            on; else that is logged, once
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

    def warn_once(self, what: str, text: str, fact: str = '') -> None:
        """Log something that is wrong, unless that was the last thing logged.

        :param what: the name that it is cached by
        :param text: empty if it is not wrong any more
        :param fact: compared in place of a text that changes
        """
        known = [text and (fact or text)]
        if (self._ledger.cache.get(what) or ['']) != known:
            self._ledger.cache.put(what, known)
            if text:
                LOG.warning('%s', text)
