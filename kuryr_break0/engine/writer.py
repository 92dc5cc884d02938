# SPDX-License-Identifier: Apache-2.0

"""Writes the items of addresses to the kernel, for transitions of claims."""

from __future__ import annotations

import errno
import functools
from typing import (Callable, Collection, Iterable, Iterator, NamedTuple,
                    Optional)

from kuryr_break0.break0.devices import Break0
from kuryr_break0.break0.devices import Devices
from kuryr_break0.break0.guard import Guard
from kuryr_break0.break0.guard import pairs
from kuryr_break0.break0 import pods
from kuryr_break0 import config
from kuryr_break0.engine.apply import Applied
from kuryr_break0.engine.apply import apply
from kuryr_break0.engine.apply import Work
from kuryr_break0.engine import routes
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import claims as claims_
from kuryr_break0.ledger.claims import Claims
from kuryr_break0.ledger.claims import Transition
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: A function with the arguments of LOG.info, which may delay the log line.
LogInfo = Callable[..., None]


class _Found(NamedTuple):
    """The routes that a bind has found.

    :ivar sources: the source address of each route to set; None lets the
        kernel choose
    :ivar existing: the addresses that have a route with the same metric
    :ivar blocked: the addresses that have a route of another program
    """

    sources: dict[model.IPAddress, Optional[model.IPAddress]]
    existing: set[model.IPAddress]
    blocked: set[model.IPAddress]


class Writer:
    """Sets and deletes items on the break0 devices of the ledger."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 devices: Devices, pods: pods.Pods) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger
        self._devices = devices
        self._pods = pods

    def withdraw(self, netlink: kernel.Netlink, address: model.IPAddress,
                 devices: Iterable[str], dropped: Collection[model.Record],
                 after: Claims = (), mac: Optional[str] = None) -> bool:
        """Delete the items of an address on break0 devices.

        If the neighbour has a MAC address that no claim has, the route and the
        neighbour stay, because an unrecorded pod can need them. If no claim
        was dropped, the route and the neighbour are deleted only if the
        neighbour has the MAC address ``mac``.

        :returns: whether a route was deleted
        :raises KernelRefused: if the kernel refuses a change
        """
        macs = {each for claim in dropped for each in claim.macs}
        if mac is not None and not dropped:
            macs.add(mac.lower())
        deleted = False
        for name in devices:
            index = kernel.find_ifindex(name)
            if index is None:
                continue
            items: list[model.Item] = [model.Pair.of(address, each)
                                       for each in macs or (None,)]
            present, kind = netlink.neighbour(index, address)
            permanent = present if kind == 'permanent' else None
            route = self._policy.route(address, index)._replace(metric=None)
            if (claims_.can_own_items((*dropped, *after), permanent)
                    if dropped else permanent in macs):
                # Delete the neighbour too. Otherwise packets for the next pod
                # with the address would go to this pod's MAC address.
                items += [route, model.Neighbour(address, index, '', None)]
            elif permanent is not None and macs:
                LOG.warning('Keeping %s on %s: the address belongs to %s, '
                            'which has no record yet', address, name,
                            permanent)
            applied = apply(netlink, self._guard(name),
                            [Work(address, unset=tuple(items))])
            if applied.guard_error is not None:
                LOG.error('%s', applied.guard_error)
            for err in applied.errors.values():
                raise err
            deleted |= route in applied.items
        return deleted

    def set(self, netlink: kernel.Netlink, records: Collection[model.Record],
            transitions: dict[model.IPAddress, Transition],
            failure: failures.Failures, log_info: LogInfo
            ) -> Optional[Break0]:
        """Set the items of the addresses of one interface.

        Addresses are refused before the guard is changed, so that the guard
        admits no refused address. The whole routing table is read only after
        the error EEXIST.
        """
        if not records:
            return None
        first = next(iter(records))
        break0 = self._devices.get(netlink, first.parent)
        found = self._look_up_routes(netlink, break0, records, failure)
        for address, transition in transitions.items():
            if address in found.blocked or any(
                    claim.parent != first.parent
                    for claim in transition.before):
                kept = set() if address in found.blocked else {break0.name}
                with failure.collect(address):
                    self.withdraw(
                        netlink, address, self._devices.without_others(
                            netlink,
                            self._devices.names(recorded=True) - kept),
                        transition.before, transition.after)
        break0 = self._apply_bind(
            netlink, break0, first.parent, functools.partial(
                self._works, records, transitions, found,
                frozenset(failure.failed)), failure)
        bound = [record for record in records
                 if record.address in found.sources
                 and record.address not in failure.failed]
        for record in bound:
            log_info('Bound %s to %s for %s, source %s', record.address,
                     break0.name, record.owner_text,
                     found.sources[record.address] or 'chosen by the kernel')
        if first.netns is not None and bound:
            siblings = self._pods.configure(
                bound, self._pods.node_addresses(
                    netlink, break0, first.parent,
                    set(found.sources.values())))
            self._apply(netlink, break0, [
                Work(address, tuple(items)) for address, items
                in model.by_address(pairs(siblings)).items()], failure)
        # Before the bind, the node may have asked the LAN for the pods' MAC
        # addresses. If so, the kernel may still hold packets to the pods.
        self._guard(break0.name).release(
            netlink, kernel.find_ifindex(first.parent),
            {record.address: record.mac for record in bound})
        return break0

    def _look_up_routes(self, netlink: kernel.Netlink, break0: Break0,
                        records: Iterable[model.Record],
                        failure: failures.Failures) -> _Found:
        """Choose a source address for each route; look up present routes."""
        found = _Found({}, set(), set())
        for record in records:
            address = record.address
            with failure.collect(address):
                if not self._policy.has_family(address, break0.name):
                    LOG.debug('IPv6 is disabled on %s, so %s is not reachable '
                              'through it', break0.name, address)
                    continue
                route = self._policy.route(
                    address, break0.index,
                    self._policy.source(record, break0.name))
                # Look up the route: NLM_F_EXCL does not detect a route with
                # another metric.
                present = netlink.route_to(address)
                try:
                    routes.require_free(route, filter(None, [present]))
                except exceptions.ForeignRoute:
                    found.blocked.add(address)
                    raise
                found.sources[address] = route.src
                if present and (present.table, present.metric) == (
                        route.table, route.metric):
                    found.existing.add(address)
        return found

    def _works(self, records: Iterable[model.Record],
               transitions: dict[model.IPAddress, Transition], found: _Found,
               failed: Collection[model.IPAddress], break0: Break0
               ) -> Iterator[Work]:
        """Yield the works that set the items of the addresses.

        :param failed: the addresses that the guard must not admit
        """
        admitted = model.by_address(pairs(
            record for record in records if record.address not in failed))
        earlier = model.by_address(pairs([
            *(record for record in records if record.address in failed),
            *(claim for transition in transitions.values()
              for claim in transition.before)]))
        for record in records:
            address = record.address
            items: list[model.Item] = [*admitted.get(address, ())]
            unset: list[model.Item] = [
                each for each in earlier.get(address, ())
                if each not in items]
            if address in found.sources:
                items += self._policy.items(record, break0.index,
                                            found.sources[address])
                if record.mac is None:  # delete an earlier pod's neighbour
                    unset.append(model.Neighbour(
                        address, break0.index, '', None))
            yield Work(address, tuple(items), tuple(unset), record,
                       is_new=address not in found.existing)

    def _apply_bind(self, netlink: kernel.Netlink, break0: Break0,
                    parent: str, works: Callable[[Break0], Iterable[Work]],
                    failure: failures.Failures) -> Break0:
        """Apply the works of a bind.

        If break0 is down or gone, or if a route exists already, try again.

        :param works: returns the works for a break0
        :returns: the break0, or the new break0 if it was down or gone
        """
        applied = self._apply(netlink, break0, works(break0), failure)
        if applied.is_device_lost:
            break0 = self._devices.renew(netlink, break0, parent)
            applied = self._apply(netlink, break0, works(break0), failure)
        retried = []
        for each in applied.works:
            err = applied.errors.get(each.address)
            with failure.collect(each.address):
                if err is not None and err.errno == errno.EEXIST:
                    # The existing route may be unused. Unlike a look-up, a
                    # dump contains unused routes too.
                    route, = model.of_kind(model.HostRoute, each.set)
                    routes.require_free(route, [
                        other for other in netlink.routes().host
                        if other.dst == each.address])
                    retried.append(each._replace(is_new=False))
                elif err is not None:
                    raise err
        applied = self._apply(netlink, break0, retried, failure)
        for address, err in applied.errors.items():
            failure.add(err, address)
        return break0

    def _apply(self, netlink: kernel.Netlink, break0: Break0,
               works: Iterable[Work], failure: failures.Failures) -> Applied:
        """Apply works.

        If ``[break0] guard`` is on and the guard fails, each address fails.
        Otherwise the error of the guard is only logged.
        """
        applied = apply(netlink, self._guard(break0.name), list(works))
        err = applied.guard_error
        if isinstance(err, exceptions.GuardUnavailable):
            failure.add(err, *(work.address for work in applied.works))
        elif err is not None:
            LOG.warning('The guard of %s does not admit %s: %s', break0.name,
                        ', '.join(str(work.address)
                                  for work in applied.works), err)
        return applied

    def _guard(self, device: str) -> Guard:
        return Guard(self._options, self._ledger, device)
