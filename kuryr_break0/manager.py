# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What there is to do for a pod, and for the node."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from typing import Any, Iterable, Iterator, Optional

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)

#: Seconds for which what was seen of the node is good: its next hops, for
#: which all of its routes are read, and that break0 is what it should be.
#: That it is there and up, the kernel says to each pod.
FRESH = 30


@dataclasses.dataclass(frozen=True)
class AddressStatus:
    """An address that a pod of this node has, or that has a route.

    :ivar owner: None for a route that belongs to no recorded sandbox
    """

    address: IPAddress
    owner: Optional[Owner]
    routed: bool

    @property
    def in_sync(self) -> bool:
        return self.routed and self.owner is not None


@dataclasses.dataclass(frozen=True)
class Status:
    """break0 and the addresses behind it, as they are now.

    :ivar link: None if there is no such interface
    """

    link: Optional[netlink.Link]
    link_addresses: tuple[IPAddress, ...]
    addresses: tuple[AddressStatus, ...]

    @property
    def in_sync(self) -> bool:
        return (all(address.in_sync for address in self.addresses)
                and (self.link is None or self.link.up))


class Break0Manager:
    """Keeps break0, and one host route through it per pod of this node.

    Nothing is kept in memory: every request may be a process of its own, and
    several at once are kept apart by the lock of the ledger.
    """

    def __init__(self, options: config.Options) -> None:
        self._options = options
        self._ledger = Ledger(options.state_dir, options.lock_timeout)

    def bind(self, owner: Owner, addresses: Iterable[IPAddress], *,
             parent: str, mac: Optional[str] = None,
             netns: Optional[str] = None) -> None:
        """Make the addresses of a sandbox reachable through break0.

        Each belongs to this owner from now on, whose it was before. The
        ledger is written first: killed at any instruction, what is left is a
        record without a route, never a live pod without a record.

        :param parent: the interface that the pod's macvlan is on
        :param mac: MAC address of the pod's interface
        :param netns: path of the pod's namespace
        :raises Break0Error: the first that hindered one of the addresses;
            the others are bound all the same
        """
        failure = _Failures()
        with self._locked(), netlink.Kernel() as kernel:
            sources = {}
            for address in addresses:
                with failure.noted():
                    sources[address] = self._source(kernel, address, parent)
            for address in sources:
                # An unwritable ledger must not cost the pod its route.
                with failure.logged():
                    self._ledger.put(Entry(address, owner, mac, netns,
                                           _netns_id(netns)))
            with failure.noted():
                self._require_parent(parent)
                index = self._device(kernel, parent)
                for address, src in sources.items():
                    with failure.noted():
                        self._replace_route(
                            kernel, parent, self._route(address, index, src))
                        LOG.info('Bound %s to %s for %s, source %s', address,
                                 self._options.device, owner,
                                 src or 'by device')
        failure.raise_first()

    def unbind(self, owner: Owner, addresses: Iterable[IPAddress]) -> None:
        """Take back what :meth:`bind` did for these addresses.

        Those that belong to another owner by now are left to it, since a
        DEL can come late. What is not there is fine. The ledger is written
        last.

        :raises Break0Error: the first that hindered one of the addresses;
            the others are unbound all the same
        """
        failure = _Failures()
        with self._locked(), netlink.Kernel() as kernel:
            index = netlink.index_of(self._options.device)
            for address in addresses:
                with failure.noted():
                    entry = self._ledger.get(address)
                    if entry is not None and entry.owner != owner:
                        LOG.info('%s stays bound: it belongs to %s, not to '
                                 '%s any more', address, entry.owner, owner)
                        continue
                    deleted = index is not None and kernel.delete_route(
                        self._route(address, index))
                    self._ledger.remove(address)
                    LOG.info('Unbound %s from %s for %s%s', address,
                             self._options.device, owner,
                             '' if deleted else ' (it had no route)')
        failure.raise_first()

    def status(self) -> Status:
        """Look at break0, the ledger and the routes; changes nothing.

        :raises Break0Error: if any of them cannot be read
        """
        entries = {entry.address: entry.owner
                   for entry in self._ledger.entries()}
        with netlink.Kernel() as kernel:
            link = kernel.link(self._options.device)
            routed: set[IPAddress] = set()
            link_addresses: list[IPAddress] = []
            if link is not None:
                routed = {route.dst for route in kernel.host_routes(
                    link.index, self._options.route_protocol,
                    self._options.route_table)}
                link_addresses = kernel.addresses(link.index)
        return Status(link, tuple(link_addresses), tuple(
            AddressStatus(address, entries.get(address), address in routed)
            for address in sorted(
                entries.keys() | routed,
                key=lambda address: (address.version, int(address)))))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._ledger.lock())
            except exceptions.LedgerUnavailable as err:
                # Without its directory there is no ledger to keep right,
                # and a pod is worth more than the lock.
                LOG.error('Working without a lock. %s', err)
            yield

    def _require_parent(self, parent: str) -> None:
        configured = self._options.parent
        if configured is None or configured == parent:
            return
        if netlink.index_of(configured) is None:
            raise exceptions.ParentNotFound(parent=configured)
        raise exceptions.ParentMismatch(configured=configured, actual=parent)

    def _source(self, kernel: netlink.Kernel, address: IPAddress,
                parent: str) -> Optional[IPAddress]:
        """Choose what the node speaks to a pod from; None: break0's own.

        :raises AddressRefused: if it cannot be the address of a pod
        """
        reason = config.not_a_host(address)
        allowed = self._options.allowed_cidrs
        if reason is None and allowed and not any(
                address in network for network in allowed):
            reason = 'outside [break0] allowed_cidrs'
        if reason is None:
            reason = self._taken(kernel, address)
        if reason is not None:
            raise exceptions.AddressRefused(
                address=address, device=self._options.device,
                reason='it is ' + reason)
        if any(own.version == address.version for own in self._options.addr):
            return None
        return netlink.source_for(address, parent)

    def _taken(self, kernel: netlink.Kernel,
               address: IPAddress) -> Optional[str]:
        """What else of this node an address is; None if nothing."""
        try:
            if netlink.source_for(address) == address:
                return 'an address of the node itself'
        except PermissionError:
            return 'not of a host, by the routes of the node'
        next_hops = self._ledger.recall('next_hops', FRESH)
        if next_hops is None:
            next_hops = sorted(map(str, kernel.next_hops()))
            self._ledger.remember('next_hops', next_hops)
        if str(address) in next_hops:
            return 'a next hop of a route of the node'
        return None

    def _device(self, kernel: netlink.Kernel, parent: str) -> int:
        """Make sure of break0; its ifindex.

        An ifindex is not used again, so the interface that has it is the
        one that was looked at.
        """
        index = netlink.index_of(self._options.device)
        if index is not None and self._seen(index, parent) == (
                self._ledger.recall('device', FRESH)):
            return index
        link = device.ensure(kernel, self._options, parent)
        self._ledger.remember('device', self._seen(link.index, parent))
        return link.index

    def _seen(self, index: int, parent: str) -> list[Any]:
        return [index, netlink.index_of(parent), self._options.mac,
                *map(str, self._options.addr)]

    def _replace_route(self, kernel: netlink.Kernel, parent: str,
                       route: netlink.HostRoute) -> None:
        try:
            kernel.replace_route(route)
        except exceptions.KernelRefused as err:
            if err.errno not in (errno.ENETDOWN, errno.ENODEV):
                raise
            # break0 is down, or has just gone.
            link = device.ensure(kernel, self._options, parent)
            kernel.replace_route(dataclasses.replace(route, oif=link.index))

    def _route(self, address: IPAddress, index: int,
               src: Optional[IPAddress] = None) -> netlink.HostRoute:
        return netlink.HostRoute(address, index,
                                 self._options.route_protocol,
                                 self._options.route_table, src)


class _Failures:
    """Goes on after an error, and raises the first one in the end."""

    def __init__(self) -> None:
        self._first: Optional[exceptions.Break0Error] = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except exceptions.Break0Error as err:
            if self._first is None:
                self._first = err
            else:
                LOG.error('%s', err)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        try:
            yield
        except exceptions.Break0Error as err:
            LOG.error('%s', err)

    def raise_first(self) -> None:
        if self._first is not None:
            raise self._first


def _netns_id(netns: Optional[str]) -> Optional[tuple[int, int]]:
    if netns is None:
        return None
    try:
        stat = os.stat(netns)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
