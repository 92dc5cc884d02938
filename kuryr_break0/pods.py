# SPDX-License-Identifier: Apache-2.0

"""Has pods configured to reach their node, and records when that is done."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import itertools
import logging
from typing import Callable, Collection, Iterable, Iterator, Optional

from kuryr_break0.claims import Claims
from kuryr_break0 import config
from kuryr_break0.devices import Break0
from kuryr_break0.devices import Devices
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0 import kernel
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Journal
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SIBLINGS
from kuryr_break0 import log
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0 import podside
from kuryr_break0 import policy
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

#: Pods whose namespaces one sync enters to compare the pod side, beside those
#: that are known to differ. Each takes about half a millisecond.
ENTERED = 128


class Pods:
    """The pod sides of a node."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 devices: Devices) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._devices = devices
        self._records = ledger.records
        self._journal = Journal(options.state_dir)

    def node_addresses(self, netlink: kernel.Netlink, break0: Break0,
                       parent: str,
                       sources: Collection[Optional[IPAddress]]
                       ) -> NodeAddresses:
        """Return what pods must know of the node.

        Its addresses are read again if it turns out to use another one.
        """
        index = kernel.index_of(parent)
        cache = self._ledger.cache
        cached: Optional[list[tuple[int, IPAddress]]] = None
        elsewhere: Optional[list[IPAddress]] = None
        with contextlib.suppress(TypeError, ValueError):
            cached = [(int(at), ipaddress.ip_address(address)) for at, address
                      in cache.fresh('addresses') or ()]
            known = cache.fresh('elsewhere')
            elsewhere = None if known is None else [
                *map(ipaddress.ip_address, known)]
        if not cached or elsewhere is None or {
                src for src in sources if src} - {
                address for _, address in cached}:
            cached = [(each.ifindex, each.address)
                      for each in netlink.addresses()]
            elsewhere = policy.elsewhere(cached, netlink.preferred_sources(
                self._devices.indexes(), self._options.route_protocol))
            cache.put('addresses', [[at, str(address)]
                                    for at, address in cached])
            cache.put('elsewhere', list(map(str, elsewhere)))
        return self._policy.node_addresses(
            {address for _, address in cached},
            [address for at, address in cached if at == index],
            sources, elsewhere, break0.mac, break0.name)

    def from_successor(self, claims: Claims,
                       is_gone: Callable[[Record], bool]) -> Claims:
        """Return the claims from the newest that still has the address."""
        for place, claim in enumerate(claims):
            if is_gone(claim):
                continue
            try:
                if not podside.has_address(claim, self._options):
                    continue
            except exceptions.Break0Error as err:
                LOG.debug('The claim of %s counts: %s', claim.owner, err)
            return claims[place:]
        return ()

    def configure(self, records: list[Record], node: NodeAddresses
                  ) -> list[Record]:
        """Configure the pod side, and record that only when it was done.

        Without, IPv4 works by ARP where the node is in the pod's subnet, so
        a failure is no error; it is repaired by each sync.

        :returns: the records to admit again, if it has other interfaces
        """
        try:
            others = podside.configure(records, node, self._options)
        except exceptions.Break0Error as err:
            LOG.warning('The sandbox %s is not configured to reach the node '
                        'yet: %s', records[0].owner, err)
            cache = self._ledger.cache  # so that no sync says it again
            cache.put('unconfigured', [*(cache.get('unconfigured') or ()),
                                       str(records[0].owner)])
            return []
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
        return done if siblings else []

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

    def repair(self, found: Iterable[tuple[list[Record], NodeAddresses]],
               failure: Failures, dry_run: bool) -> Iterator[Owner]:
        """Configure the pod sides that are known to differ, and some more.

        Those that are compared go round, so that each has its turn.

        :param found: the records of each interface, with what it must know
        :returns: those that were to be changed
        """
        cache = self._ledger.cache
        outdated: list[tuple[list[Record], NodeAddresses]] = []
        others: list[tuple[list[Record], NodeAddresses]] = []
        for records, node in found:
            (outdated if any(record.configured != node.digest for record
                             in records) else others).append((records, node))
        position = (cache.get('entered') or [0])[0]
        if not isinstance(position, int) or not others:
            position = 0
        start = position % len(others) if others else 0
        turn = (others[start:] + others[:start])[:ENTERED]
        if len(others) > ENTERED and not dry_run:
            cache.put('entered', [(start + ENTERED) % len(others)])
        failed = set(cache.get('unconfigured') or ())
        still: list[str] = []
        for records, node in (*outdated, *turn):
            owner = records[0].owner
            try:
                changes = podside.repair(
                    records, node, self._options, dry_run)
            except exceptions.Break0Error as err:
                still.append(str(owner))
                if str(owner) not in failed:  # once, not with each sync
                    LOG.warning('The sandbox %s cannot be configured to '
                                'reach the node: %s', owner, err)
                continue
            if changes:
                yield owner
                LOG.log(logging.DEBUG if dry_run else logging.INFO,
                        'Configured %s for %s to reach the node',
                        ', '.join(str(record.address) for record in records),
                        owner)
            if not dry_run:
                if changes:
                    self._journal.add(Done.POD)
                self._put_configured(records, node, failure)
        if sorted(failed) != sorted(still) and not dry_run:
            cache.put('unconfigured', still)

    def _put_configured(self, records: list[Record], node: NodeAddresses,
                        failure: Failures) -> None:
        """Record that the pod side was configured, after it was."""
        outdated = [record for record in records
                    if record.configured != node.digest]
        if not outdated:
            return
        with failure.noted(), self._ledger.lock():
            for record in outdated:
                claims = self._records.claims(record.address)
                if claims and claims[0] == record:
                    self._records.put([dataclasses.replace(
                        record, configured=node.digest), *claims[1:]])
                elif not claims:
                    # It was unbound meanwhile, which found nothing yet.
                    with contextlib.suppress(exceptions.Break0Error):
                        podside.withdraw(record, self._options,
                                         lambda address: False)
