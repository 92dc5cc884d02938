# SPDX-License-Identifier: Apache-2.0

"""The pod side: what the namespace of a pod needs to reach its node.

A pod that had to ask for the node would be answered by break0 for IPv4 only,
and by the guard, if that can, for IPv6. Where the node is outside its subnets
it would go by its gateway, a way that the node with ``rp_filter`` = 1 takes no
packets from. So its namespace gets the MAC address of each address of the
node, and a route where needed. Both carry our protocol number there too.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Collection, Iterable, Iterator

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.guard import table_of
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0 import log
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Record

LOG = log.get_logger(__name__)

#: Entries of a list that are read in a pod, whose own business it is how many
#: there are. What is beyond is set again, and deleted in time.
MOST = 512


class PodSide:
    """The interface of one pod, while this thread is in its namespace.

    :param records: those of the interface, all with the same namespace
    :raises NetnsUnusable: if there is no such interface
    """

    def __init__(self, netlink: kernel.Netlink, records: Collection[Record],
                 options: config.Options) -> None:
        self._netlink = netlink
        self._record = next(iter(records))
        self._versions = {record.address.version for record in records}
        self._protocol = options.route_protocol
        self._table = table_of(self._record.owner.ifname)
        link = netlink.link(self._record.owner.ifname)
        if link is None:
            raise exceptions.NetnsUnusable(
                netns=self._record.netns,
                reason='has no interface %s' % self._record.owner.ifname)
        self._index = link.index
        # One with another MAC address may be the next of that name already.
        self._guarded = (options.guard != config.OFF
                         and link.mac == self._record.mac)

    def configure(self, node: NodeAddresses) -> None:
        """Set what the pod needs, whatever is there.

        The interface has no address yet when Kuryr has just made it; neither
        neighbours nor routes need one.

        :raises KernelRefused: the first error of its kernel
        """
        _apply(self._netlink, [
            (Verb.REPLACE, item) for item in self._wanted(node)])
        self._bind_source()

    def is_unguarded(self) -> bool:
        """Return whether the interface can send with any MAC address."""
        if not self._guarded:
            return False
        with kernel.Nft() as nft:
            return not nft.binds_source(self._table, self._index,
                                        self._source())

    def _bind_source(self) -> bool:
        """Let the interface send with its own MAC address only.

        Else the pod could take the MAC address and the address of another.
        With CAP_NET_ADMIN it can still undo that.

        :returns: whether that could be done
        """
        if not self._guarded:
            return False
        try:
            with kernel.Nft() as nft:
                nft.bind_source(self._table, self._record.owner.ifname,
                                self._index, self._source())
        except exceptions.KernelRefused as err:
            LOG.debug('The pod %s can forge MAC addresses: %s',
                      self._record.owner, err)
            return False
        return True

    def _source(self) -> bytes:
        return bytes.fromhex(str(self._record.mac).replace(':', ''))

    def changes(self, node: NodeAddresses) -> list[kernel.Change]:
        """Compare what is there with what the pod needs.

        :raises KernelRefused: if its kernel cannot be asked
        """
        neighbours = {each.dst: each for each
                      in self._netlink.neighbours(self._index)}
        routes = {route.dst: route for route in self._netlink.host_routes_of(
            self._index, kernel.RT_TABLE_MAIN)
            if route.protocol == self._protocol}
        changes: list[kernel.Change] = []
        hosts = self._hosts(node)
        for dst, route in routes.items():
            if dst not in hosts:
                changes.append((Verb.DELETE, route))
        for dst, each in neighbours.items():
            if (each.protocol == self._protocol
                    and (dst not in hosts or node.mac is None)):
                changes.append((Verb.DELETE, each))
        for item in self._wanted(node):
            present = (neighbours if isinstance(item, Neighbour)
                       else routes).get(item.dst)
            if present != item:
                changes.append((Verb.REPLACE, item))
        return changes

    def apply(self, changes: Iterable[kernel.Change]) -> None:
        """Make changes in the pod's namespace.

        :raises KernelRefused: the first error of its kernel
        """
        _apply(self._netlink, changes)

    def repair(self, node: NodeAddresses, dry_run: bool) -> bool:
        """Make it what the pod needs; whether there was anything to do.

        :raises KernelRefused: the first error of its kernel
        """
        changes = self.changes(node)
        unguarded = self.is_unguarded()
        if dry_run:
            # An earlier kernel may have the hook, which only a try can show.
            unguarded &= kernel.release() >= (5, 16)
            return bool(changes or unguarded)
        if not self._guarded:
            _release(self._record)
        self.apply(changes)
        return bool(unguarded and self._bind_source() or changes)

    def addresses(self) -> set[IPAddress]:
        """Return the addresses that the interface has."""
        return {address for index, address in self._netlink.addresses()
                if index == self._index}

    def others(self) -> set[IPAddress]:
        """Return the addresses of other interfaces of the pod."""
        return {address for index, address in self._netlink.addresses()
                if index != self._index and not address.is_link_local
                and not address.is_loopback}

    def marked(self) -> list[Item]:
        """List what carries our protocol number on the interface."""
        items: list[Item] = [*self._netlink.host_routes_of(
            self._index, kernel.RT_TABLE_MAIN),
            *self._netlink.neighbours(self._index)]
        return [item for item in items if item.protocol == self._protocol]

    def _hosts(self, node: NodeAddresses) -> list[IPAddress]:
        return [host for host in node.addresses
                if host.version in self._versions]

    def _wanted(self, node: NodeAddresses) -> Iterator[Item]:
        for host in self._hosts(node):
            if node.mac is not None:
                yield Neighbour(host, self._index, node.mac, self._protocol)
            # A route by another interface of the pod is as good.
            if not (any(host in subnet for subnet in self._record.subnets)
                    or self._netlink.is_on_link(host)):
                yield HostRoute(host, self._index, self._protocol,
                                kernel.RT_TABLE_MAIN,
                                metric=best_metric(host))


def configure(records: Collection[Record], node: NodeAddresses,
              options: config.Options) -> set[IPAddress]:
    """Configure a pod that has just been bound. It may be repeated.

    :param records: those of one interface, not empty
    :returns: the addresses of its other interfaces
    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    record = next(iter(records))
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        side = PodSide(netlink, records, options)
        side.configure(node)
        return side.others()


def repair(records: Collection[Record], node: NodeAddresses,
           options: config.Options, dry_run: bool = False) -> bool:
    """Compare a pod with what it needs, and change what differs.

    :param records: those of one interface, not empty
    :returns: whether something differed
    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    record = next(iter(records))
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        return PodSide(netlink, records, options).repair(node, dry_run)


def has_address(record: Record, options: config.Options) -> bool:
    """Return whether a sandbox still has the address of its record.

    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: if its kernel cannot be asked
    """
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        return record.address in PodSide(netlink, [record],
                                         options).addresses()


def withdraw(record: Record, options: config.Options,
             is_bound: Callable[[IPAddress], bool]) -> None:
    """Take back what the pod side of an address was configured with.

    What another bound address of the interface needs stays.

    :param is_bound: whether an address of the interface is bound still
    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        if kernel.index_of(record.owner.ifname) is None:
            _release(record)
            return
        side = PodSide(netlink, [record], options)
        needed = {address.version for address in side.addresses()
                  if is_bound(address)}
        if not needed:
            _release(record)
        side.apply((Verb.DELETE, item) for item in side.marked()
                   if item.dst.version not in needed)


def take_back(record: Record, options: config.Options,
              dry_run: bool = False) -> list[Item]:
    """Take away what carries our protocol number in a pod's namespace.

    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: the first error of its kernel
    """
    with kernel.entered(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        if not dry_run:
            _release(record)
        if kernel.index_of(record.owner.ifname) is None:
            return []
        side = PodSide(netlink, [record], options)
        items = side.marked()
        if not dry_run:
            side.apply((Verb.DELETE, item) for item in items)
        return items


def _release(record: Record) -> None:
    """Delete the table of an interface, which is there without it as well."""
    with contextlib.suppress(exceptions.KernelRefused), kernel.Nft() as nft:
        nft.delete_table(table_of(record.owner.ifname))


def _apply(netlink: kernel.Netlink,
           changes: Iterable[kernel.Change]) -> None:
    changes = list(changes)
    for (verb, _), err in zip(changes, netlink.change(changes)):
        if err is not None and not (verb is Verb.DELETE and err.absent):
            raise err
