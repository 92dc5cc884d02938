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
from typing import Callable, Collection, Iterable, Iterator, NamedTuple

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.guard import table_of
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0 import log
from kuryr_break0 import missing
from kuryr_break0.missing import Missing
from kuryr_break0.model import best_metric
from kuryr_break0.model import Entry
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Record

LOG = log.get_logger(__name__)

#: Entries of a list that are read in a pod, whose own business it is how many
#: there are. What is beyond is set again, and deleted in time.
MOST = 512


class Differences(NamedTuple):
    """How a pod differs from its records.

    :ivar changed: whether it lacked what it needs
    :ivar missing: the addresses that its interface does not have
    """

    changed: bool
    missing: list[Missing]


class PodSide:
    """The interface of one pod, while this thread is in its namespace.

    :param records: those of the interface, all with the same namespace
    :raises InterfaceGone: if there is no such interface
    """

    def __init__(self, netlink: kernel.Netlink, records: Collection[Record],
                 options: config.Options) -> None:
        self._netlink = netlink
        self._records = records
        # Of an interface that was made again, earlier ones may be there.
        self._record = max(records, key=lambda record: record.bound_at)
        self._versions = {record.address.version for record in records}
        self._protocol = options.route_protocol
        ifname = self._record.owner.ifname
        self._table = table_of(ifname)
        link = netlink.link(ifname)
        if link is None:
            raise exceptions.InterfaceGone(netns=self._record.netns,
                                           ifname=ifname)
        self._link = link
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
                    return nft.add_source_rule(
                        self._table, self._record.owner.ifname, self._index,
                        self._mac)
                # An earlier kernel may have the hook, which only a try shows.
                return (kernel.read_release() >= (5, 16)
                        and not nft.has_source_rule(
                            self._table, self._index, self._mac))
        except exceptions.KernelRefused as err:
            LOG.debug('The pod %s can forge MAC addresses: %s',
                      self._record.owner_text, err)
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
            if err is not None and not (verb is Verb.DELETE and err.is_absent):
                raise err

    def addresses(self, of_others: bool = False) -> set[IPAddress]:
        """Return the addresses of the interface, or of the pod's others."""
        return {address for index, address in self._netlink.addresses()
                if (index != self._index) is of_others and not (
                    of_others and (address.is_link_local
                                   or address.is_loopback))}

    def missing(self) -> list[Missing]:
        """Return the recorded addresses that the interface does not have."""
        states = self._netlink.address_states()
        if len(states) >= MOST:
            return []  # there may be more
        return missing.find(states, self._link, self._records)

    def marked(self) -> list[Entry]:
        """List what carries our protocol number on the interface."""
        items: list[Entry] = [*self._netlink.host_routes_of(
            self._index, kernel.RT_TABLE_MAIN),
            *self._netlink.neighbours(self._index)]
        return [item for item in items if item.protocol == self._protocol]

    def wanted(self, node: NodeAddresses) -> Iterator[Entry]:
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
def entered(record: Record) -> Iterator[kernel.Netlink]:
    """Be in the namespace of a record, with a socket there."""
    with kernel.enter_namespace(str(record.netns), record.namespace), \
            kernel.Netlink(most=MOST) as netlink:
        yield netlink


def repair(records: Collection[Record], node: NodeAddresses,
           options: config.Options, dry_run: bool = False) -> Differences:
    """Compare a pod with what it needs, and change what differs.

    :param records: those of one interface, not empty
    """
    with entered(next(iter(records))) as netlink:
        side = PodSide(netlink, records, options)
        return Differences(side.repair(node, dry_run), side.missing())


def has_lost_interface(record: Record, options: config.Options) -> bool:
    """Return whether a namespace is there without the interface."""
    try:
        with entered(record) as netlink:
            PodSide(netlink, [record], options)
    except exceptions.InterfaceGone:
        return True
    except exceptions.Break0Error:
        pass  # nothing is known of it
    return False


def withdraw(record: Record, options: config.Options,
             is_bound: Callable[[IPAddress], bool] = lambda address: False,
             dry_run: bool = False) -> list[Entry]:
    """Take back what the pod side of an address was configured with.

    What another bound address of the interface needs stays.

    :param is_bound: whether an address of the interface is bound still
    :returns: what that is, but for the table of nftables
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


def _release(record: Record) -> None:
    """Delete the table of an interface, which is there without it as well."""
    with contextlib.suppress(exceptions.KernelRefused), kernel.Nft() as nft:
        nft.delete_table(table_of(record.owner.ifname))
