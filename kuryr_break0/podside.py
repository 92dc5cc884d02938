# SPDX-License-Identifier: Apache-2.0

"""The pod side: what the namespace of a pod needs to reach its node.

A pod that had to ask for the node would be answered by break0 for IPv4 only,
and by the guard, if that can, for IPv6. Where the node is outside its subnets
it would go by its gateway, a way that the node with ``rp_filter`` = 1 takes no
packets from. So its namespace gets the MAC address of each address of the
node, and a route where needed. Both carry our protocol number there too.

The functions raise NetnsUnusable if a namespace cannot be entered, and
KernelRefused with the first error of its kernel.
"""

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
from kuryr_break0 import exceptions
from kuryr_break0.failures import Failures
from kuryr_break0.guard import table_of
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger.records import MAX_SIBLINGS
from kuryr_break0 import log
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

#: Entries of a list that are read in a pod, whose own business it is how many
#: there are. What is beyond is set again, and deleted in time.
MOST = 512
#: Pods whose namespaces one sync enters to compare the pod side, beside those
#: that are known to differ. Each takes about half a millisecond.
ENTERED = 128


class PodSide:
    """The interface of one pod, while this thread is in its namespace.

    :param records: those of the interface, all with the same namespace
    :raises InterfaceGone: if there is no such interface
    """

    def __init__(self, netlink: kernel.Netlink, records: Collection[Record],
                 options: config.Options) -> None:
        self._netlink = netlink
        self._record = next(iter(records))
        self._versions = {record.address.version for record in records}
        self._protocol = options.route_protocol
        ifname = self._record.owner.ifname
        self._table = table_of(ifname)
        link = netlink.link(ifname)
        if link is None:
            raise exceptions.InterfaceGone(netns=self._record.netns,
                                           ifname=ifname)
        self._index = link.index
        self._mac = bytes.fromhex(link.mac.replace(':', ''))
        # One with another MAC address may be the next of that name already.
        self._guarded = (options.guard != config.OFF
                         and link.mac == self._record.mac)

    def configure(self, node: NodeAddresses) -> None:
        """Set what the pod needs, whatever is there.

        The interface has no address yet when Kuryr has just made it; neither
        neighbours nor routes need one.
        """
        self.apply((Verb.REPLACE, item) for item in self.wanted(node))
        self._bind_source()

    def _bind_source(self, dry_run: bool = False) -> bool:
        """Let the interface send with its own MAC address only.

        Else the pod could take the MAC address and the address of another.
        With CAP_NET_ADMIN it can still undo that.

        :returns: whether that was to be done, and could be
        """
        if not self._guarded:
            return False
        try:
            with kernel.Nft() as nft:
                if not dry_run:
                    return nft.bind_source(
                        self._table, self._record.owner.ifname, self._index,
                        self._mac)
                # An earlier kernel may have the hook, which only a try shows.
                return kernel.release() >= (5, 16) and not nft.binds_source(
                    self._table, self._index, self._mac)
        except exceptions.KernelRefused as err:
            LOG.debug('The pod %s can forge MAC addresses: %s',
                      self._record.whose, err)
            return False

    def repair(self, node: NodeAddresses, dry_run: bool) -> bool:
        """Make it what the pod needs; whether there was anything to do."""
        present, wanted = self.marked(), list(self.wanted(node))
        hosts = {item.dst for item in wanted}
        changes = [(Verb.DELETE, item) for item in present
                   if item.dst not in hosts]
        changes += [(Verb.REPLACE, item) for item in wanted
                    if item not in present]
        if not dry_run:
            if not self._guarded:
                _release(self._record)
            self.apply(changes)
        return self._bind_source(dry_run) or bool(changes)

    def apply(self, changes: Iterable[kernel.Change]) -> None:
        """Make changes in the pod's namespace."""
        changes = list(changes)
        for (verb, _), err in zip(changes, self._netlink.change(changes)):
            if err is not None and not (verb is Verb.DELETE and err.absent):
                raise err

    def addresses(self, of_others: bool = False) -> set[IPAddress]:
        """Return the addresses of the interface, or of the pod's others."""
        return {address for index, address in self._netlink.addresses()
                if (index != self._index) is of_others and not (
                    of_others and (address.is_link_local
                                   or address.is_loopback))}

    def marked(self) -> list[Item]:
        """List what carries our protocol number on the interface."""
        items: list[Item] = [*self._netlink.host_routes_of(
            self._index, kernel.RT_TABLE_MAIN),
            *self._netlink.neighbours(self._index)]
        return [item for item in items if item.protocol == self._protocol]

    def wanted(self, node: NodeAddresses) -> Iterator[Item]:
        """Return what it needs, but for routes where it has a way."""
        for host in node.addresses:
            if host.version not in self._versions:
                continue
            yield Neighbour(host, self._index, node.mac, self._protocol)
            # A route by another interface of the pod is as good.
            if not (any(host in subnet for subnet in self._record.subnets)
                    or self._netlink.is_on_link(host)):
                yield HostRoute(host, self._index, self._protocol,
                                kernel.RT_TABLE_MAIN,
                                metric=best_metric(host))


@contextlib.contextmanager
def _entered(record: Record) -> Iterator[kernel.Netlink]:
    """Be in the namespace of a record, with a socket there."""
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        yield netlink


def repair(records: Collection[Record], node: NodeAddresses,
           options: config.Options, dry_run: bool = False) -> bool:
    """Compare a pod with what it needs, and change what differs.

    :param records: those of one interface, not empty
    :returns: whether something differed
    """
    with _entered(next(iter(records))) as netlink:
        return PodSide(netlink, records, options).repair(node, dry_run)


def has_lost_interface(record: Record, options: config.Options) -> bool:
    """Return whether a namespace is there without the interface."""
    try:
        with _entered(record) as netlink:
            PodSide(netlink, [record], options)
    except exceptions.InterfaceGone:
        return True
    except exceptions.Break0Error:
        pass  # nothing is known of it
    return False


def withdraw(record: Record, options: config.Options,
             is_bound: Callable[[IPAddress], bool] = lambda address: False,
             dry_run: bool = False) -> list[Item]:
    """Take back what the pod side of an address was configured with.

    What another bound address of the interface needs stays.

    :param is_bound: whether an address of the interface is bound still
    :returns: what that is, but for the table of nftables
    """
    with _entered(record) as netlink:
        side = None
        needed: set[int] = set()
        if kernel.index_of(record.owner.ifname) is not None:
            side = PodSide(netlink, [record], options)
            needed = {address.version for address in side.addresses()
                      if is_bound(address)}
        if not (needed or dry_run):
            _release(record)
        if side is None:
            return []
        items = [item for item in side.marked()
                 if item.dst.version not in needed]
        if not dry_run:
            side.apply((Verb.DELETE, item) for item in items)
        return items


def _release(record: Record) -> None:
    """Delete the table of an interface, which is there without it as well."""
    with contextlib.suppress(exceptions.KernelRefused), kernel.Nft() as nft:
        nft.delete_table(table_of(record.owner.ifname))


class Pods:
    """The pod sides of a node."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._records = ledger.records

    def node_addresses(self, netlink: kernel.Netlink, break0: Break0,
                       parent: str,
                       sources: Collection[Optional[IPAddress]]
                       ) -> NodeAddresses:
        """Return what pods must know of the node.

        Its addresses are read again if it turns out to use another one.
        """
        cache = self._ledger.cache
        cached: Optional[list[tuple[int, IPAddress]]] = None
        with contextlib.suppress(TypeError, ValueError):
            cached = [(int(at), ipaddress.ip_address(address)) for at, address
                      in cache.fresh('addresses') or ()]
        if not cached or {src for src in sources if src} - {
                address for _, address in cached}:
            cached = [*netlink.addresses()]
            cache.put('addresses', [[at, str(address)]
                                    for at, address in cached])
        return self._policy.node_addresses(
            cached, kernel.index_of(parent), sources, break0.mac,
            break0.name)

    def from_successor(self, claims: Claims,
                       is_gone: Callable[[Record], bool]) -> Claims:
        """Return the claims from the newest that still has the address."""
        for place, claim in enumerate(claims):
            if is_gone(claim):
                continue
            try:
                with _entered(claim) as netlink:
                    if claim.address not in PodSide(
                            netlink, [claim], self._options).addresses():
                        continue
            except exceptions.Break0Error as err:
                LOG.debug('The claim of %s counts: %s', claim.whose, err)
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
            with _entered(records[0]) as netlink:
                side = PodSide(netlink, records, self._options)
                side.configure(node)
                others = side.addresses(of_others=True)
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
        start = cache.number('entered') % max(len(others), 1)
        turn = (others[start:] + others[:start])[:ENTERED]
        if len(others) > ENTERED and not dry_run:
            cache.put('entered', [(start + ENTERED) % len(others)])
        failed = set(cache.get('unconfigured') or ())
        still: list[str] = []
        for records, node in (*outdated, *turn):
            owner = records[0].owner
            try:
                changes = repair(records, node, self._options, dry_run)
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
                    self._ledger.journal.add(Done.POD)
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
                        withdraw(record, self._options)
