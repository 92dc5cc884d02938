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
import functools
import math
import os
import time
from typing import Any, Callable, Iterable, Iterator, Optional

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0.config import IPAddress
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from kuryr_break0 import netlink
from kuryr_break0.plan import compute
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Plan

LOG = logging.getLogger(__name__)

#: Seconds for which what was seen of the node is good: its next hops, for
#: which all of its routes are read, and that break0 is what it should be.
#: That it is there and up, the kernel says to each pod.
FRESH = 30
#: Entries that one ADD or DEL looks at for sandboxes that are gone. More than
#: the 110 pods that kubelet allows on a node by default.
LOOKED_AT = 128
#: Changes that a sync makes before it lets others have the lock.
CHANGES_AT_ONCE = 16
#: What the kernel answers to a route by an interface that is down or gone.
DEVICE_LOST = (errno.ENETDOWN, errno.ENODEV)
#: Seconds within which a route that was taken over is not taken again.
TRUCE = 60


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
        bare = False
        with self._locked(), netlink.Kernel() as kernel:
            sources = {}
            for address in addresses:
                with failure.noted():
                    sources[address] = self._source(kernel, address, parent)
            for address in sources:
                # An unwritable ledger must not cost the pod its route.
                with failure.logged():
                    self._ledger.put(Entry(address, owner, parent, mac,
                                           netns, _netns_id(netns)))
            with failure.noted():
                self._require_parent(parent)
                index, bare = self._device(kernel, parent)
                for address, src in sources.items():
                    with failure.noted():
                        bare |= self._set_route(
                            kernel, parent, self._route(address, index, src))
                        LOG.info('Bound %s to %s for %s, source %s', address,
                                 self._options.device, owner,
                                 src or 'by device')
        if bare:
            # It was created or brought up, so those of the others are gone.
            with failure.logged():
                self.sync()
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
                    if index is not None:
                        # The next pod of this address has another MAC.
                        kernel.forget_neighbour(address, index)
                    self._ledger.remove(address)
                    LOG.info('Unbound %s from %s for %s%s', address,
                             self._options.device, owner,
                             '' if deleted else ' (it had no route)')
        failure.raise_first()

    def sync(self, dry_run: bool = False) -> Plan:
        """Make break0 and the routes what the ledger says.

        What is read is read without the lock, so each change is decided
        again under it, by the entry that its address has then.

        :param dry_run: change nothing
        :returns: what there was to do
        :raises Break0Error: the first that hindered it; what else there is
            to do is done
        """
        entries, unreadable = self._ledger.read()
        gone = [entry for entry in entries if entry.sandbox_gone]
        live = [entry for entry in entries if not entry.sandbox_gone]
        failure = _Failures()
        with netlink.Kernel() as kernel:
            if live and not dry_run:
                with failure.noted(), self._locked():
                    device.ensure(kernel, self._options, live[-1].parent)
            index = netlink.index_of(self._options.device)
            if index is None:
                failure.raise_first()
                index = 0  # the kernel's number for none
            desired = {}
            for entry in live:
                with failure.logged():
                    src = self._source(kernel, entry.address, entry.parent)
                    desired[entry.address] = self._route(entry.address, index,
                                                         src)
            actual = kernel.host_routes()
            keep = unreadable | self._unclaimed(
                {route.dst for route in actual
                 if self._is_ours(route, index)}
                - {entry.address for entry in entries}, dry_run)
            plan = compute(desired, actual, device=index,
                           protocol=self._options.route_protocol,
                           takeover=self._options.takeover, keep=keep)
            for route in plan.foreign:
                LOG.error('%s', self._foreign(route))
            if not dry_run:
                self._apply(kernel, plan, gone, failure)
        failure.raise_first()
        return plan

    def prune(self) -> None:
        """Unbind some addresses whose sandbox is gone.

        Of a DEL for a pod that the API has forgotten, Kuryr tells nobody, so
        each ADD and DEL looks for such, at a cost that does not grow with
        the pods: the next one goes on where this one ends.

        :raises Break0Error: the first that hindered one of them
        """
        addresses = self._ledger.addresses()
        position = (self._ledger.recall('pruned', math.inf) or [0])[0]
        if len(addresses) > LOOKED_AT:
            self._ledger.remember('pruned', [
                (position + LOOKED_AT) % len(addresses)])
            addresses = (addresses + addresses)[position:][:LOOKED_AT]
        failure = _Failures()
        for address in addresses:
            with failure.noted():
                entry = self._ledger.get(address)
                if entry is not None and entry.sandbox_gone:
                    LOG.info('The sandbox %s of %s is gone', entry.owner,
                             address)
                    self.unbind(entry.owner, [address])
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
                routed = {route.dst for route in kernel.host_routes()
                          if self._is_ours(route, link.index)
                          and route.table == self._options.route_table}
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

    def _device(self, kernel: netlink.Kernel,
                parent: str) -> tuple[int, bool]:
        """Make sure of break0; its ifindex, and whether it has no routes.

        An ifindex is not used again, so the interface that has it is the
        one that was looked at.
        """
        index = netlink.index_of(self._options.device)
        if index is not None and self._seen(index, parent) == (
                self._ledger.recall('device', FRESH)):
            return index, False
        link, bare = device.ensure(kernel, self._options, parent)
        self._ledger.remember('device', self._seen(link.index, parent))
        return link.index, bare

    def _seen(self, index: int, parent: str) -> list[Any]:
        return [index, netlink.index_of(parent), self._options.mac,
                *map(str, self._options.addr)]

    def _set_route(self, kernel: netlink.Kernel, parent: str,
                   route: HostRoute) -> bool:
        """Set a pod's route; whether break0 had lost all of them.

        :raises ForeignRoute: if there is one that is to be left alone
        """
        bare = False
        try:
            added = kernel.add_route(route)
        except exceptions.KernelRefused as err:
            if err.errno not in DEVICE_LOST:
                raise
            # break0 is down, or has just gone.
            link, bare = device.ensure(kernel, self._options, parent)
            route = dataclasses.replace(route, oif=link.index)
            added = kernel.add_route(route)
        if not added:
            present = kernel.route_to(route.dst)
            # One that is not the one in use is only to be seen in a dump.
            in_the_way = ([present] if present is not None
                          and present.table == route.table else
                          [each for each in kernel.host_routes()
                           if each.dst == route.dst])
            plan = compute({route.dst: route}, in_the_way,
                           device=route.oif or 0, protocol=route.protocol,
                           takeover=self._options.takeover)
            if not plan.replace and plan.foreign:
                raise self._foreign(plan.foreign[0])
            for foreign in plan.foreign:
                self._take_over(foreign)
            kernel.replace_route(route)
            if route.oif is not None:
                # It was an earlier pod's, which had another MAC.
                kernel.forget_neighbour(route.dst, route.oif)
        return bare

    def _apply(self, kernel: netlink.Kernel, plan: Plan, gone: list[Entry],
               failure: _Failures) -> None:
        taken = {route.dst: route for route in plan.foreign}

        def replace(route: HostRoute) -> None:
            if self._ledger.get(route.dst) is not None:
                if route.dst in taken:
                    self._take_over(taken[route.dst])
                kernel.replace_route(route)
                LOG.info('Set the route of %s', route.dst)

        def delete(route: HostRoute) -> None:
            entry = self._ledger.get(route.dst)
            if (entry is None or entry.sandbox_gone
                    or route.table != self._options.route_table):
                kernel.delete_route(route)
                LOG.info('Deleted the route of %s', route.dst)

        def forget(entry: Entry) -> None:
            if self._ledger.get(entry.address) == entry:
                self._ledger.remove(entry.address)
                LOG.info('The sandbox %s of %s is gone', entry.owner,
                         entry.address)

        changes: list[Callable[[], None]] = [
            *(functools.partial(replace, route) for route in plan.replace),
            *(functools.partial(delete, route) for route in plan.delete),
            *(functools.partial(forget, entry) for entry in gone)]
        for start in range(0, len(changes), CHANGES_AT_ONCE):
            with self._locked():
                for change in changes[start:start + CHANGES_AT_ONCE]:
                    with failure.noted():
                        change()
                    if failure.device_lost:
                        return  # the others would fail alike

    def _is_ours(self, route: HostRoute, index: int) -> bool:
        return (route.oif == index
                and route.protocol == self._options.route_protocol)

    def _unclaimed(self, addresses: set[IPAddress],
                   dry_run: bool) -> set[IPAddress]:
        """Those that have not been without an entry for long enough."""
        now = time.time()
        before = dict(self._ledger.recall('unclaimed', math.inf) or [])
        since = {str(address): before.get(str(address), now)
                 for address in addresses}
        if since != before and not dry_run:
            self._ledger.remember('unclaimed', sorted(since.items()))
        return {address for address in addresses
                if now - since[str(address)] < self._options.gc_grace}

    def _foreign(self, route: HostRoute) -> exceptions.ForeignRoute:
        return exceptions.ForeignRoute(
            address=route.dst, oif=route.oif, protocol=route.protocol,
            reason='it is left alone, unless [break0] takeover is set')

    def _take_over(self, route: HostRoute) -> None:
        """Note that a route of others is about to be replaced.

        :raises ForeignRoute: if it has just been replaced already
        """
        now = time.time()
        recent = {address: when for address, when in
                  self._ledger.recall('takeovers', TRUCE) or []
                  if now - when < TRUCE}
        if str(route.dst) in recent:
            raise exceptions.ForeignRoute(
                address=route.dst, oif=route.oif, protocol=route.protocol,
                reason='somebody has set it again after it was taken over, '
                       'so it is left alone for a minute')
        recent[str(route.dst)] = now
        self._ledger.remember('takeovers', sorted(recent.items()))
        LOG.warning('Taking over the route of %s on interface %s with '
                    'protocol %s', route.dst, route.oif, route.protocol)

    def _route(self, address: IPAddress, index: int,
               src: Optional[IPAddress] = None) -> HostRoute:
        return HostRoute(address, index,
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

    @property
    def device_lost(self) -> bool:
        return (isinstance(self._first, exceptions.KernelRefused)
                and self._first.errno in DEVICE_LOST)

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
