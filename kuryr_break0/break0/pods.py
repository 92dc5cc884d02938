# SPDX-License-Identifier: Apache-2.0

"""Configures the pod sides of a node.

A bind configures the pod side of one interface. Each sync compares and repairs
the pod sides of the node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import itertools
import logging
from typing import Any, Collection, Iterable, NamedTuple, Optional

from kuryr_break0.break0.devices import Break0
from kuryr_break0.break0.missing import Missing
from kuryr_break0.break0.missing import Sightings
from kuryr_break0.break0 import podside
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger.claims import Claims
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SIBLINGS
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: Maximum number of pod sides that one sync compares, in addition to the
#: outdated pod sides. Each comparison takes about 0.5 ms.
ENTERED = 128


class Repairs(NamedTuple):
    """The result of comparing pod sides.

    :ivar changed: owners of the pod sides that were changed; in a dry run,
        of the pod sides that differ
    :ivar released: addresses that two comparisons found replaced by other
        addresses; see :class:`kuryr_break0.break0.missing.Sightings`
    :ivar missing: other recorded addresses that the interface lacks
    """

    changed: list[model.Owner]
    released: list[Missing]
    missing: list[Missing]


class Pods:
    """The pod sides of a node."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger
        self._records = ledger.records

    def node_addresses(self, netlink: kernel.Netlink, break0: Break0,
                       parent: str,
                       sources: Collection[Optional[model.IPAddress]]
                       ) -> model.NodeAddresses:
        """Return the node addresses that the pods on a parent must know.

        The addresses of the node are cached. They are read again if the cache
        lacks one of the sources.

        :param netlink: socket in the namespace of the node
        :param sources: source addresses of the pods' routes
        """
        cache = self._ledger.cache
        cached: Optional[list[tuple[int, model.IPAddress]]] = None
        with contextlib.suppress(TypeError, ValueError):
            cached = [(int(at), ipaddress.ip_address(address)) for at, address
                      in cache.get_recent('addresses') or ()]
        if not cached or {src for src in sources if src} - {
                address for _, address in cached}:
            cached = [*netlink.addresses()]
            cache.put('addresses', [[at, str(address)]
                                    for at, address in cached])
        return self._policy.node_addresses(
            cached, kernel.find_ifindex(parent), sources, break0.mac,
            break0.name)

    def from_successor(self, claims: Claims) -> Claims:
        """Return the successor and all older claims, without newer claims.

        The successor is the newest claim with an interface that still has
        the address. If an interface cannot be read, it counts as having it.

        :param claims: the claims on one address, the newest first
        :returns: an empty tuple if there is no successor
        """
        for place, claim in enumerate(claims):
            if is_gone(claim):
                continue
            try:
                with podside.entered(claim) as netlink:
                    if claim.address not in podside.PodSide(
                            netlink, [claim], self._options).addresses():
                        continue
            except exceptions.Break0Error as err:
                LOG.debug('Using the claim of %s, because its interface '
                          'cannot be read: %s', claim.owner_text, err)
            return claims[place:]
        return ()

    def configure(self, records: list[model.Record], node: model.NodeAddresses
                  ) -> list[model.Record]:
        """Configure the pod side of one interface, then update its records.

        A failure is only logged, because the next sync repairs it. Until then,
        IPv4 works by ARP if the node is in the pod's subnet.

        :param records: records of the interface, at least one
        :returns: records that need new guard entries, because the sandbox has
            other interfaces on the parent
        """
        try:
            with podside.entered(records[0]) as netlink:
                side = podside.PodSide(netlink, records, self._options)
                side.configure(node)
                foreign = side.addresses(of_others=True)
        except exceptions.Break0Error as err:
            LOG.warning('The sandbox %s is not configured to reach the node '
                        'yet: %s', records[0].owner, err)
            cache = self._ledger.cache  # the next sync does not log it again
            cache.put('unconfigured', [*(cache.get('unconfigured') or ()),
                                       str(records[0].owner)])
            return []
        siblings = self._siblings(records[0], foreign)
        macs = tuple(dict.fromkeys(each.mac for each in siblings
                                   if each.mac is not None))
        changes: list[tuple[model.Record, dict[str, Any]]] = [
            (record, {'configured': node.digest, 'siblings': macs})
            for record in records]
        mac = records[0].mac
        if mac is not None:
            changes += [(each, {'siblings': (*each.siblings, mac)})
                        for each in siblings if mac not in each.siblings]
        for record, fields in changes:
            try:
                self._records.update_newest(record, **fields)
            except exceptions.LedgerUnavailable as err:
                LOG.debug('%s', err)
        return [dataclasses.replace(record, **fields)
                for record, fields in changes] if siblings else []

    def _siblings(self, record: model.Record,
                  addresses: Iterable[model.IPAddress]) -> list[model.Record]:
        """Return the records of the sandbox's other interfaces on the parent.

        :param addresses: addresses of these interfaces; an address without a
            record for the sandbox is ignored
        """
        siblings = []
        for address in itertools.islice(addresses, MAX_SIBLINGS):
            with contextlib.suppress(exceptions.LedgerUnavailable):
                other = self._records.get(address)
                if other is not None and other.parent == record.parent and (
                        other.namespace == record.namespace):
                    siblings.append(other)
        return siblings

    def repair(self, interfaces: Iterable[tuple[list[model.Record],
                                                model.NodeAddresses]],
               failure: failures.Failures, dry_run: bool,
               unreadable: Collection[model.IPAddress] = ()) -> Repairs:
        """Repair all outdated pod sides, and at most ENTERED other pod sides.

        A pod side is outdated if its record has another digest than the node
        addresses, or if an earlier sync found one of its addresses replaced by
        another address. The next call continues with the next pod sides, so
        that every pod side is compared in turn.

        :param interfaces: records of each interface, with the node addresses
            that its pod must know
        :param unreadable: addresses with an unreadable record
        """
        cache = self._ledger.cache
        repairs = Repairs([], [], [])
        sightings = Sightings(cache)
        outdated: list[tuple[list[model.Record], model.NodeAddresses]] = []
        current: list[tuple[list[model.Record], model.NodeAddresses]] = []
        for records, node in interfaces:
            (outdated if any(record.configured != node.digest for record
                             in records) or sightings.has(records)
             else current).append((records, node))
        start = cache.get_number('entered') % max(len(current), 1)
        turn = (current[start:] + current[:start])[:ENTERED]
        if len(current) > ENTERED and not dry_run:
            cache.put('entered', [(start + ENTERED) % len(current)])
        failed = set(cache.get('unconfigured') or ())
        still: list[str] = []
        for records, node in (*outdated, *turn):
            owner = records[0].owner
            try:
                changed, lacked = podside.repair(
                    records, node, self._options, dry_run, unreadable)
            except exceptions.Break0Error as err:
                still.append(str(owner))
                if str(owner) not in failed:  # log once, not in each sync
                    LOG.warning('The sandbox %s cannot be configured to '
                                'reach the node: %s', owner, err)
                continue
            released = sightings.note(records, lacked)
            repairs.released.extend(released)
            repairs.missing.extend(each for each in lacked
                                   if each not in released)
            if changed:
                repairs.changed.append(owner)
                LOG.log(logging.DEBUG if dry_run else logging.INFO,
                        'Configured %s for %s to reach the node',
                        ', '.join(str(record.address) for record in records),
                        owner)
            if not dry_run:
                if changed:
                    self._ledger.journal.add(Done.POD)
                self._put_configured(records, node, failure)
        if not dry_run:
            sightings.keep(record for records, _ in (*outdated, *current)
                           for record in records)
            if sorted(failed) != sorted(still):
                cache.put('unconfigured', still)
        return repairs

    def withdraw(self, record: model.Record) -> None:
        """Remove the pod side of an address, unless its namespace is gone.

        A failure is only logged.
        """
        def is_bound(address: model.IPAddress) -> bool:
            newest = self._records.get(address)
            return newest is not None and newest.owner == record.owner

        try:
            if kernel.judge_state(*record.place) is not kernel.State.GONE:
                podside.withdraw(record, self._options, is_bound)
        except exceptions.Break0Error as err:
            LOG.debug('The sandbox %s keeps its routes and neighbours for the '
                      'node: %s', record.owner_text, err)

    def _put_configured(self, records: list[model.Record],
                        node: model.NodeAddresses,
                        failure: failures.Failures) -> None:
        """Record that the pod side was configured.

        If an address was unbound meanwhile, remove its pod side.
        """
        outdated = [record for record in records
                    if record.configured != node.digest]
        if not outdated:
            return
        with failure.collect(), self._ledger.lock():
            for record in outdated:
                if not self._records.update_newest(record,
                                                   configured=node.digest):
                    # The address was unbound before its pod side was
                    # configured, so the unbind removed no pod side.
                    with contextlib.suppress(exceptions.Break0Error):
                        podside.withdraw(record, self._options)


def is_gone(claim: model.Record) -> bool:
    """Return whether the sandbox of a claim is proven not to exist."""
    return kernel.judge_state(*claim.place) is kernel.State.GONE
