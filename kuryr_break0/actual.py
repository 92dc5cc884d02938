# SPDX-License-Identifier: Apache-2.0

"""Reads ledger and kernel at one moment, by dumps. Changes nothing."""

from __future__ import annotations

from typing import Any, Collection, Iterable, Iterator, Mapping, Optional

from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0.device import Device
from kuryr_break0 import devices
from kuryr_break0 import exceptions
from kuryr_break0.guard import Guard
from kuryr_break0.guard import Pairs
from kuryr_break0.guard import pairs
from kuryr_break0.guard import unclaimed_pairs
from kuryr_break0 import kernel
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import NodeAddresses
from kuryr_break0.model import Origin
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted
from kuryr_break0 import plan
from kuryr_break0 import policy
from kuryr_break0.policy import Policy
from kuryr_break0.snapshot import Parent
from kuryr_break0.snapshot import Snapshot

#: Seconds to wait for a bind or unbind to end.
PATIENCE = 1.0


def read(options: config.Options, ledger: Ledger, netlink: kernel.Netlink,
         patience: float = PATIENCE,
         known: Optional[Contents] = None) -> Snapshot:
    """Read ledger and kernel at one moment. Changes nothing.

    :param patience: seconds to wait for a bind or unbind to end
    :param known: what the ledger had a moment ago; see ``inspection``
    :raises Break0Error: if any of them cannot be read
    """
    contents, kernel_view, is_steady = ledger.inspect(
        lambda: _KernelView(options, ledger, netlink), patience, known)
    return _Reading(options, ledger, contents, kernel_view,
                    is_steady).snapshot()


class _KernelView:
    """What the kernel holds, and what the devices of the ledger are."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 netlink: kernel.Netlink) -> None:
        try:
            self.identity = ledger.identity()
        except exceptions.LedgerUnavailable:
            self.identity = None  # it is damaged, and will be created again
        self._netlink = netlink
        self.links = netlink.links
        self._links: dict[str, Optional[kernel.Link]] = {}
        self.addresses = netlink.addresses()
        found = {options.device, *devices.recorded(
            options, self.identity, netlink.links).values()}
        self.indexes = [link.index for link in map(self.link, found)
                        if link is not None]
        # A next hop through a break0 is a pod, as one that serves a VPN.
        self.routes = netlink.routes(self.indexes)
        self.next_hops_seen = frozenset(ledger.next_hops_seen())
        self._neighbours = {index: netlink.neighbours(index)
                            for index in self.indexes}

    def link(self, name: str) -> Optional[kernel.Link]:
        if name not in self._links:
            self._links[name] = self._netlink.link(name)
        return self._links[name]

    def neighbours(self, index: int) -> list[Neighbour]:
        if index not in self._neighbours:
            self._neighbours[index] = self._netlink.neighbours(index)
        return self._neighbours[index]

    def addresses_of(self, index: int) -> tuple[IPAddress, ...]:
        return tuple(address for at, address in self.addresses
                     if at == index)


class _Reading:
    """Makes a snapshot of what was read."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 contents: Contents, view: _KernelView,
                 is_steady: bool) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._contents = contents
        self._view = view
        self._is_steady = is_steady
        self._own = frozenset(address for _, address in view.addresses)
        self._elsewhere = policy.elsewhere(view.addresses,
                                           view.routes.sources)
        self._live: dict[IPAddress, Record] = {}
        self._rivals: dict[IPAddress, tuple[Record, ...]] = {}
        self._gone: list[Record] = []
        self._unjudged: dict[Record, str] = {}
        self._refused: dict[IPAddress, str] = {}

    def snapshot(self) -> Snapshot:
        self._sort_claims()
        for address, record in self._live.items():
            reason = self._policy.not_allowed(address) or (
                self._policy.against(
                    address, record.origin is Origin.DISCOVERED, self._own,
                    self._view.routes, self._view.next_hops_seen))
            if reason is not None:
                self._refused[address] = reason
        parents = dict(self._parents())
        primary = self._view.link(self._options.device)
        return Snapshot(
            self._options, self._contents, self._is_steady,
            self._view.identity, parents, self._own, self._elsewhere,
            self._view.routes, self._live, self._rivals, tuple(self._gone),
            self._unjudged, self._refused,
            None if any(parent.present == primary
                        for parent in parents.values()) else primary)

    def _sort_claims(self) -> None:
        judge = kernel.Judge()
        verdicts: dict[Any, kernel.Verdict] = {}
        for address, claims in self._contents.claims.items():
            living = []
            for claim in claims:
                key = claim.place
                if key not in verdicts:
                    verdicts[key] = judge.judge(*key)
                state, reason = verdicts[key]
                if state is kernel.State.GONE:
                    self._gone.append(claim)
                    continue
                living.append(claim)
                if (state is kernel.State.UNKNOWN
                        and (claim.namespace or claim.tap)):
                    self._unjudged[claim] = reason
            if living:
                self._live[address] = living[0]
            if len(living) > 1:
                self._rivals[address] = tuple(living[1:])

    def _parents(self) -> Iterator[tuple[str, Parent]]:
        options, view = self._options, self._view
        used: dict[str, dict[IPAddress, Record]] = {}
        for address, record in self._live.items():
            used.setdefault(record.parent, {})[address] = record
        names = devices.Names(options, view.identity, view.link, view.links,
                              used)
        new, link = used.keys() - names.known.keys(), view.link(options.device)
        if names.primary is None and new:
            names.primary = min(new, key=lambda name: min(
                record.bound_at for record in used[name].values()))
        # One that was not made by us is that of the interface that it is on.
        primary = names.primary or (device.lower_name(link) if link else None)
        for name in sorted({*used, *names.known, *filter(None, [primary])}):
            live = used.get(name, {})
            found = self._parent(name, names.of(name), live)
            if live or found.present is not None or name == options.parent:
                yield name, found

    def _parent(self, name: str, device_name: str,
                live: dict[IPAddress, Record]) -> Parent:
        options, view = self._options, self._view
        identity = view.identity
        made = Device(options, device_name, name, identity)
        parent, link = view.link(name), view.link(device_name)
        conflict: Optional[exceptions.Break0Error] = None
        if parent is None:
            conflict = exceptions.ParentNotFound(parent=name)
        elif options.parent not in (None, name):
            conflict = exceptions.ParentMismatch(configured=options.parent,
                                                 actual=name)
        elif link is not None:
            try:
                made.require_ours(link, parent)
            except exceptions.DeviceConflict as err:
                conflict = err
        usable = None if conflict is not None else link
        index = usable.index if usable is not None else 0
        desired = {} if conflict is not None and parent is not None else (
            self._desired(device_name, index, live))
        neighbours = view.neighbours(index) if usable is not None else []
        routes = {route.dst: route for route in view.routes.host
                  if route.oif == index and usable is not None}
        difference = plan.compute(
            desired, view.routes.host, neighbours, device=index,
            protocol=options.route_protocol, takeover=options.takeover,
            withdrawn=self._withdrawn(name, neighbours),
            elsewhere={*self._contents.claims, *self._contents.unreadable})
        guard, missing, extra = self._guard(
            usable, parent, live, [
                record for address, record in live.items()
                if address not in self._refused
                and address not in difference.blocked],
            routes.values(), neighbours)
        return Parent(
            name, device_name, parent, link, usable, conflict,
            device.owned_by_other(usable, identity) if usable else None,
            (*self._earlier_name(name, device_name), *(
                each.text for each in made.differences(
                    usable, parent, view.addresses_of(index))))
            if usable is not None and parent is not None else (),
            guard, missing, extra, live, desired, difference, routes,
            {each.dst: each for each in neighbours},
            view.addresses_of(index) if usable is not None else (),
            self._node_addresses(parent, usable, desired))

    def _earlier_name(self, name: str, device_name: str) -> Iterator[str]:
        """Say that the ledger knows the parent of a break0 by another name.

        Until it knows the new one, as by a sync.
        """
        for parent, known in (self._view.identity.devices.items()
                              if self._view.identity else ()):
            if known == device_name and parent != name:
                yield 'its parent %s is called %s now' % (parent, name)

    def _guard(self, link: Optional[kernel.Link],
               parent: Optional[kernel.Link], live: Collection[IPAddress],
               allowed: Iterable[Record], routes: Iterable[HostRoute],
               neighbours: Collection[Neighbour]
               ) -> tuple[Optional[str], Pairs, Pairs]:
        """Return what is wrong, what is missing, and what is too much.

        Where no pods are, no table has to be there.
        """
        if link is None or parent is None:
            return None, {}, {}
        guard = Guard(self._options, self._ledger, link.name)
        problem = guard.problem(link, self._policy.solicited(
            self._own, self._view.addresses_of(parent.index), link.name))
        if problem is not None or not guard.is_loaded():
            return problem if live else None, {}, {}
        return None, *guard.difference(
            pairs(allowed),
            unclaimed_pairs(routes, neighbours, self._options.route_protocol,
                            self._contents.claims))

    def _desired(self, device_name: str, index: int,
                 live: Mapping[IPAddress, Record]
                 ) -> dict[IPAddress, Wanted]:
        desired = {}
        # All addresses of a subnet are reached from the same one.
        sources: dict[Any, Optional[IPAddress]] = {}
        for address, record in live.items():
            if address in self._refused:
                continue
            key = next((subnet for subnet in record.subnets
                        if address in subnet), address)
            if key not in sources:
                sources[key] = self._policy.source(record, device_name)
            wanted = self._policy.wanted(record, device_name, index,
                                         sources[key])
            if wanted is not None or index == 0:
                desired[address] = wanted or Wanted(self._policy.route(
                    address, index, sources[key]))
        return desired

    def _withdrawn(self, parent: str, neighbours: Collection[Neighbour]
                   ) -> set[IPAddress]:
        """Return the addresses that are nobody's any more on a parent.

        Such is one whose record is on another parent by now.

        Not one whose neighbour has another MAC address than its record: a
        pod has it that could not be recorded, or another ledger has.
        """
        macs = {each.dst: each.mac for each in neighbours}
        withdrawn = {address for address, record in self._live.items()
                     if address in self._refused or record.parent != parent}
        gone: dict[IPAddress, set[Optional[str]]] = {}
        for record in self._gone:
            if record.address not in self._live:
                gone.setdefault(record.address, set()).add(record.mac)
        for address, known in gone.items():
            if None in known or macs.get(address) in {None, *known}:
                withdrawn.add(address)
        return withdrawn

    def _node_addresses(self, parent: Optional[kernel.Link],
                        link: Optional[kernel.Link],
                        desired: Mapping[IPAddress, Wanted]
                        ) -> Optional[NodeAddresses]:
        if link is None or parent is None:
            return None
        return self._policy.node_addresses(
            self._own, self._view.addresses_of(parent.index),
            {wanted.route.src for wanted in desired.values()},
            self._elsewhere, link.mac, link.name)
