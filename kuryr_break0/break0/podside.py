# SPDX-License-Identifier: Apache-2.0

"""The pod side: neighbours and routes in a pod that lead to its node.

Without these entries, a pod asks for the MAC addresses of the node addresses.
break0 answers ARP requests, but only the guard can answer neighbour
solicitations. If the node is outside the subnets of the pod, the pod sends
packets for the node to the gateway of the pod. A node with ``rp_filter`` = 1
drops the packets that arrive from the gateway. So the namespace of the pod
gets a permanent neighbour for each node address, and a route to each node
address that is not on the link. These neighbours and routes have our protocol
number.

The functions raise NetnsUnusable if a namespace cannot be entered, and
KernelRefused with the first error of the kernel in a namespace.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Collection, Iterable, Iterator, NamedTuple

from kuryr_break0.break0.guard import table_of
from kuryr_break0.break0 import missing
from kuryr_break0.break0.missing import Missing
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: Maximum entries that one dump in a pod reads, because a pod can add any
#: number of entries. If a required entry is beyond this number, each repair
#: sets the entry again. A stale entry beyond this number stays until the dump
#: reaches the entry.
MAX_ENTRIES = 512


class Differences(NamedTuple):
    """The differences between a pod and its records.

    :ivar changed: whether the pod side differed
    :ivar missing: the recorded addresses that the interface does not have
    """

    changed: bool
    missing: list[Missing]


class PodSide:
    """The interface of one pod, while this thread is in its namespace.

    :param records: records of the interface, all with the same namespace
    :param unreadable: addresses with an unreadable record. If the interface
        has such an address, a repair keeps the entries of its IP version
    :raises InterfaceGone: if there is no such interface
    """

    def __init__(self, netlink: kernel.Netlink,
                 records: Collection[model.Record], options: config.Options,
                 unreadable: Collection[model.IPAddress] = ()) -> None:
        self._netlink = netlink
        self._records = records
        self._unreadable = unreadable
        # Older records may describe a deleted interface of the same name.
        self.record = max(records, key=lambda record: record.bound_at)
        self._versions = {record.address.version for record in records}
        self._protocol = options.route_protocol
        ifname = self.record.owner.ifname
        self._table = table_of(ifname)
        link = netlink.link(ifname)
        if link is None:
            raise exceptions.InterfaceGone(netns=self.record.netns,
                                           ifname=ifname)
        self.link = link
        self._index = link.index
        self._mac = bytes.fromhex(link.mac.replace(':', ''))
        # If the interface has another MAC address than the record, it may be a
        # later interface with the same name.
        self._guarded = (options.guard != config.OFF
                         and link.mac == self.record.mac)

    def configure(self, node: model.NodeAddresses) -> None:
        """Set all neighbours and routes, without reading the present ones.

        The interface may have no address yet, because Kuryr assigns it after
        the bind. Neighbours and routes do not need an address.
        """
        self.apply((Verb.REPLACE, item) for item in self.desired(node))
        self._bind_source()

    def _bind_source(self, dry_run: bool = False) -> bool:
        """Add the rule that drops frames with another source MAC address.

        The rule keeps a pod from using the MAC address and the address of
        another pod. A pod with CAP_NET_ADMIN can delete the rule.

        :returns: whether the rule was missing and could be added
        """
        if not self._guarded:
            return False
        try:
            with kernel.Nft() as nft:
                if not dry_run:
                    return nft.add_source_rule(
                        self._table, self.record.owner.ifname, self._index,
                        self._mac)
                # Linux has the egress hook since 5.16. An older kernel may
                # have a backport, but only an attempt would show this.
                return (kernel.read_release() >= (5, 16)
                        and not nft.has_source_rule(
                            self._table, self._index, self._mac))
        except exceptions.KernelRefused as err:
            LOG.debug('The pod %s can forge MAC addresses: %s',
                      self.record.owner_text, err)
            return False

    def lacks_source_rule(self) -> bool:
        """Return whether the source MAC rule is missing and could be added."""
        return self._bind_source(dry_run=True)

    def changes(self, node: model.NodeAddresses
                ) -> list[tuple[Verb, model.Entry]]:
        """Return the changes that configure the pod side."""
        present, desired = self.marked(), list(self.desired(node))
        hosts = {item.dst for item in desired}
        doubtful = {address.version for address in (
            self.addresses() if self._unreadable else ())
            if address in self._unreadable} - self._versions
        return [*((Verb.DELETE, item) for item in present
                  if item.dst not in hosts
                  and item.dst.version not in doubtful),
                *((Verb.REPLACE, item) for item in desired
                  if item not in present)]

    def repair(self, node: model.NodeAddresses, dry_run: bool) -> bool:
        """Repair the pod side; return whether it differed."""
        changes = self.changes(node)
        if not dry_run:
            if not self._guarded:
                _release(self.record)
            self.apply(changes)
        return self._bind_source(dry_run) or bool(changes)

    def apply(self, changes: Iterable[kernel.Change]) -> None:
        """Apply changes in the pod's namespace.

        Deleting a missing item is no error.

        :raises KernelRefused: the first other error
        """
        changes = list(changes)
        for (verb, _), err in zip(changes, self._netlink.change(changes)):
            if err is not None and not (verb is Verb.DELETE and err.is_absent):
                raise err

    def addresses(self, of_others: bool = False) -> set[model.IPAddress]:
        """Return the addresses of the interface.

        :param of_others: return the addresses of the pod's other interfaces
            instead, except link-local and loopback addresses
        """
        return {address for index, address in self._netlink.addresses()
                if (index != self._index) is of_others and not (
                    of_others and (address.is_link_local
                                   or address.is_loopback))}

    def missing(self, pause: float = missing.PAUSE) -> list[Missing]:
        """Return the recorded addresses that the interface does not have.

        :param pause: as for :func:`kuryr_break0.break0.missing.find`
        """
        states = self._netlink.address_states()
        if len(states) >= MAX_ENTRIES:
            return []  # the list may be incomplete
        return missing.find(states, self.link, self._records, pause)

    def marked(self) -> list[model.Entry]:
        """List the neighbours and routes with our protocol number."""
        items: list[model.Entry] = [*self._netlink.host_routes_of(
            self._index, kernel.RT_TABLE_MAIN),
            *self._netlink.neighbours(self._index)]
        return [item for item in items if item.protocol == self._protocol]

    def desired(self, node: model.NodeAddresses) -> Iterator[model.Entry]:
        """Return the neighbours and routes that the pod needs.

        A node address on the link of any interface of the pod needs no route.
        """
        for host in node.addresses:
            if host.version not in self._versions:
                continue
            yield model.Neighbour(host, self._index, node.mac, self._protocol)
            if not (any(host in subnet for subnet in self.record.subnets)
                    or self._netlink.is_on_link(host)):
                yield model.HostRoute(host, self._index, self._protocol,
                                      kernel.RT_TABLE_MAIN,
                                      metric=model.best_metric(host))


@contextlib.contextmanager
def entered(record: model.Record) -> Iterator[kernel.Netlink]:
    """Enter the namespace of a record; yield a socket in that namespace."""
    with kernel.enter_namespace(str(record.netns), record.namespace), \
            kernel.Netlink(most=MAX_ENTRIES) as netlink:
        yield netlink


def repair(records: Collection[model.Record], node: model.NodeAddresses,
           options: config.Options, dry_run: bool = False,
           unreadable: Collection[model.IPAddress] = ()) -> Differences:
    """Compare the entries of a pod with the required ones, and correct them.

    :param records: records of one interface, at least one
    :param unreadable: as for :class:`PodSide`
    """
    with entered(next(iter(records))) as netlink:
        side = PodSide(netlink, records, options, unreadable)
        return Differences(side.repair(node, dry_run), side.missing())


def withdraw(record: model.Record, options: config.Options,
             is_bound: Callable[[model.IPAddress], bool] = (
                 lambda address: False),
             dry_run: bool = False) -> list[model.Entry]:
    """Delete the entries that configured the pod side of an address.

    An entry stays if another bound address of the interface needs it.

    :param is_bound: returns whether an address of the interface is still bound
    :returns: the deleted entries, without the nftables table
    """
    with entered(record) as netlink:
        side = None
        needed: set[int] = set()
        if kernel.find_ifindex(record.owner.ifname) is not None:
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


def _release(record: model.Record) -> None:
    """Delete the nftables table of an interface.

    The kernel does not delete the table with the interface.
    """
    with contextlib.suppress(exceptions.KernelRefused), kernel.Nft() as nft:
        nft.delete_table(table_of(record.owner.ifname))
