# SPDX-License-Identifier: Apache-2.0

"""Reads a snapshot of ledger and kernel by dumps, and changes nothing."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from typing import Any, Collection, Iterator, Mapping, Optional

from kuryr_break0.break0 import device
from kuryr_break0.break0 import devices
from kuryr_break0.break0.guard import Guard
from kuryr_break0.break0.guard import pairs
from kuryr_break0 import config
from kuryr_break0.engine import plan
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import claims as claims_
from kuryr_break0.ledger import Contents
from kuryr_break0.ledger.identity import ownership
from kuryr_break0.ledger.identity import read_boot_id
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model
from kuryr_break0 import policy

#: Seconds to wait for a bind or unbind to end.
PATIENCE = 1.0


def read(options: config.Options, ledger: Ledger, netlink: kernel.Netlink,
         patience: float = PATIENCE, ways: bool = True) -> Snapshot:
    """Return a snapshot of ledger and kernel.

    :param patience: seconds to wait for a bind or unbind to end
    :param ways: whether to check by look-ups that the kernel uses the routes
        through break0
    :raises Break0Error: if the ledger or the kernel cannot be read
    """
    contents, reading, is_steady = ledger.inspect(
        lambda: _Reading(options, ledger, netlink, ways), patience)
    return reading.snapshot(contents, is_steady)


class _Reading:
    """Reads the kernel; builds a snapshot of the kernel and the claims."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 netlink: kernel.Netlink, ways: bool) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger
        self._netlink = netlink
        self._identity = None
        # A bind or sync replaces a damaged identity.
        with contextlib.suppress(exceptions.LedgerUnavailable):
            self._identity = ledger.identity()
        self._links: dict[str, Optional[kernel.Link]] = {}
        self._addresses = netlink.addresses()
        names = {options.device, *devices.recorded(
            options, self._identity, netlink.links).values()}
        links = [link for link in map(self._link, names) if link is not None]
        indexes = [link.index for link in links]
        # List next hops through break0s separately: such a next hop is a pod,
        # for example a VPN gateway, and may be bound.
        self._routes = netlink.routes(indexes)
        self._neighbours = {0: [], **{index: netlink.neighbours(index)
                                      for index in indexes}}
        self._facts = policy.Facts(
            frozenset(address for _, address in self._addresses),
            self._routes.broadcast, self._routes.next_hops,
            self._routes.left_out, frozenset(ledger.list_recent_next_hops()))
        self._astray = dict(self._find_astray({
            link.index: link.vrf.ifindex if link.vrf else 0
            for link in links}) if ways else ())

    def _link(self, name: str) -> Optional[kernel.Link]:
        if name not in self._links:
            self._links[name] = self._netlink.link(name)
        return self._links[name]

    def _find_astray(self, devices: Mapping[int, int]
                     ) -> Iterator[tuple[model.IPAddress, tuple[str, str]]]:
        """Find addresses that the kernel does not reach by our route.

        With the default routing rules, only addresses in table local and
        addresses with several routes can be affected. A look-up of an address
        takes two requests, together about 0.03 ms. The first request has no
        source, like a new connection from the node. The second request has the
        source of our route, like an answer from the node.

        :param devices: the ifindex of the VRF of each break0, by the ifindex
            of break0; 0 without a VRF
        :returns: each address, with a text about the route that the kernel
            uses, and the arguments of ``ip route get`` that show this route
        """
        routes, options = self._routes.host, self._options
        ours = [route for route in routes if route.oif in devices
                and route.protocol == options.route_protocol]
        if options.route_table == kernel.RT_TABLE_MAIN and (
                self._netlink.has_default_rules()):
            count = collections.Counter(route.dst for route in routes)
            local = [each for each in self._routes.local
                     if each.num_addresses > 1]
            count.update(each.network_address for each in self._routes.local)
            ours = [route for route in ours if count[route.dst] > 1 or any(
                route.dst in network for network in local)]
        for route in ours:
            vrf = devices[route.oif or 0]
            for source in dict.fromkeys((None, route.src)):
                way = self._netlink.lookup(route.dst, source, vrf)
                if way is None or way.oif != route.oif:
                    yield route.dst, (
                        'the node has no route to it' if way is None
                        # The kernel merges the tables local and main, so
                        # it may return main as the table of a local route.
                        else 'it is a local address of the node' if way.type
                        == kernel.RTN_LOCAL else
                        'they leave through %s, by table %d' % (
                            kernel.format_ifname(way.oif), way.table),
                        '%s%s%s' % (route.dst, ' from %s' % source
                                    if source else '', ' vrf '
                                    + kernel.format_ifname(vrf)
                                    if vrf else ''))
                    break

    def snapshot(self, contents: Contents, is_steady: bool) -> Snapshot:
        self._contents = contents
        self._live: dict[model.IPAddress, model.Record] = {}
        self._rivals: dict[model.IPAddress, tuple[model.Record, ...]] = {}
        self._gone: list[model.Record] = []
        self._unjudged: dict[model.Record, str] = {}
        self._sort_claims()
        self._require_node()
        self._refused: dict[model.IPAddress, str] = {}
        for address, record in self._live.items():
            reason = self._policy.refusal(address, record.origin, self._facts)
            if reason is not None:
                self._refused[address] = reason
        parents = dict(self._parents())
        primary = self._link(self._options.device)
        return Snapshot(
            self._options, contents, is_steady, self._identity, parents,
            self._facts, self._routes, self._live, self._rivals,
            tuple(self._gone), self._unjudged, self._refused,
            None if any(parent.present == primary
                        for parent in parents.values()) else primary)

    def _require_node(self) -> None:
        """Check that this process is not in the namespace of a pod.

        If a user started this process in the namespace of a pod by ``ip netns
        exec``, all pods would be configured with the addresses of that pod as
        node addresses. Records of an earlier boot are not compared, because
        the identity of a namespace is unique only within a boot.

        :raises NotTheNode: if this process is in the namespace of a pod
        """
        if self._identity and self._identity.boot != read_boot_id():
            return
        own = kernel.identify(kernel.OWN_NETNS)
        for record in self._live.values():
            if own and record.namespace and record.namespace.is_same(own):
                raise exceptions.NotTheNode(owner=record.owner_text)

    def _sort_claims(self) -> None:
        judge = kernel.Judge()
        verdicts: dict[Any, kernel.Verdict] = {}
        for address, claims in self._contents.claims.items():
            living: list[model.Record] = []
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
                self._live[address], *rivals = living
                if rivals:
                    self._rivals[address] = tuple(rivals)

    def _parents(self) -> Iterator[tuple[str, Parent]]:
        options = self._options
        used: dict[str, dict[model.IPAddress, model.Record]] = {}
        for address, record in self._live.items():
            used.setdefault(record.parent, {})[address] = record
        names = devices.Names(options, self._identity, self._link,
                              self._netlink.links, used)
        new, link = used.keys() - names.by_parent.keys(), self._link(
            options.device)
        if names.primary is None and new:
            names.primary = min(new, key=lambda name: min(
                record.bound_at for record in used[name].values()))
        # If neither a record nor an alias names the parent of the break0 with
        # the configured name, the parent is its lower interface.
        primary = names.primary or (device.lower_name(link) if link else None)
        for name in sorted({*used, *names.by_parent,
                            *filter(None, [primary])}):
            live = used.get(name, {})
            parent = self._parent(name, names.of(name), live)
            if live or parent.present is not None or name == options.parent:
                yield name, parent

    def _parent(self, name: str, device_name: str,
                live: dict[model.IPAddress, model.Record]) -> Parent:
        options, identity = self._options, self._identity
        made = device.Device(options, device_name, name, identity)
        parent, link = self._link(name), self._link(device_name)
        conflict: Optional[exceptions.Break0Error] = None
        if parent is None:
            conflict = exceptions.ParentNotFound(parent=name)
        elif live and options.parent not in (None, name):
            conflict = exceptions.ParentMismatch(configured=options.parent,
                                                 actual=name)
        else:
            try:
                if link is not None:
                    made.require_ours(link, parent)
                elif live:
                    device.require_fit(parent)
            except (exceptions.DeviceConflict,
                    exceptions.ParentUnfit) as err:
                conflict = err
        usable = None if conflict is not None else link
        index = usable.index if usable is not None else 0  # never an ifindex
        if index not in self._neighbours:
            self._neighbours[index] = self._netlink.neighbours(index)
        neighbours = self._neighbours[index]
        routes = {route.dst: route for route in self._routes.host
                  if route.oif == index}
        desired = {} if conflict is not None and parent is not None else (
            self._desired(device_name, index, live))
        guard: Optional[str] = None
        entries: Optional[set[model.Pair]] = None
        differences: tuple[tuple[str, str], ...] = ()
        node = None
        if usable is not None and parent is not None:
            guard, entries = self._guard(usable, parent)
            differences = (*self._earlier_name(name, device_name), *(
                (each.kind, each.text) for each in made.differences(
                    usable, parent, self._addresses,
                    any(address.version == 6 for address in live))))
            node = self._policy.node_addresses(
                self._addresses, parent.index,
                {route.src for some in desired.values()
                 for route in model.of_kind(model.HostRoute, some)},
                usable.mac, usable.name)
        items: dict[model.IPAddress, tuple[model.Item, ...]] = {**desired}
        # A recorded sibling may be gone, and another pod may have its MAC
        # address now.
        admitted = [] if entries is None else [
            dataclasses.replace(record, siblings=()) if record.siblings
            else record for record in live.values()
            if record.address not in self._refused]
        for pair in pairs(admitted):
            items[pair.dst] = *items.get(pair.dst, ()), pair
        changes = plan.compute(
            items, (*self._routes.host, *neighbours, *(entries or ())),
            device=index, protocol=options.route_protocol,
            withdrawn=self._withdrawn(name, neighbours),
            claimed=self._contents.claims,
            unreadable=self._contents.unreadable,
            is_refilled=guard is not None and entries is not None)
        return Parent(
            name=name, device=device_name, parent=parent, present=link,
            link=usable, conflict=conflict,
            ownership=ownership(usable, identity, options.state_dir),
            differences=differences, guard=guard if live else None,
            is_guarded=entries is not None, live=live, desired=desired,
            plan=changes, routes=routes,
            neighbours={each.dst: each for each in neighbours},
            addresses=tuple(address for at, address in self._addresses
                            if at == index), node=node,
            astray={address: self._astray[address]
                    for address in self._astray.keys() & desired.keys()})

    def _earlier_name(self, name: str, device_name: str
                      ) -> Iterator[tuple[str, str]]:
        """Yield a difference if the parent of a break0 was renamed.

        A sync repairs the difference: it records the present name.
        """
        for parent, recorded in (self._identity.devices.items()
                                 if self._identity else ()):
            if recorded == device_name and parent != name:
                yield 'name', 'its parent %s is called %s now' % (
                    parent, name)

    def _guard(self, link: kernel.Link, parent: kernel.Link
               ) -> tuple[Optional[str], Optional[set[model.Pair]]]:
        """Return the problem and the entries of a guard.

        :returns: the problem, None if there is none; and the entries, None if
            the table does not exist
        """
        guard = Guard(self._options, self._ledger, link.name)
        problem = guard.problem(link, self._policy.solicited(
            self._addresses, parent.index, link.name))
        is_there = guard.is_loaded() if problem is None else guard.is_there()
        return problem, guard.entries() if is_there else None

    def _desired(self, device_name: str, index: int,
                 live: Mapping[model.IPAddress, model.Record]
                 ) -> dict[model.IPAddress, tuple[model.Entry, ...]]:
        desired = {}
        # The node uses the same source for all addresses of a subnet.
        sources: dict[Any, Optional[model.IPAddress]] = {}
        for address, record in live.items():
            if address in self._refused or not (
                    index == 0 or self._policy.has_family(address,
                                                          device_name)):
                continue
            key = next((subnet for subnet in record.subnets
                        if address in subnet), address)
            try:
                src = sources[key]
            except KeyError:
                src = sources[key] = self._policy.source(record, device_name)
            desired[address] = self._policy.items(record, index, src)
        return desired

    def _withdrawn(self, parent: str, neighbours: Collection[model.Neighbour]
                   ) -> set[model.IPAddress]:
        """Return the addresses that must not have items on a parent.

        These are refused addresses, addresses with a living claim on another
        parent, and addresses of gone sandboxes. If the neighbour of a gone
        sandbox's address has a MAC address that no gone claim has, the result
        omits the address, because the items may belong to an unrecorded pod.
        """
        withdrawn = {address for address, record in self._live.items()
                     if record.parent != parent}.union(self._refused)
        gone: dict[model.IPAddress, list[model.Record]] = {}
        for record in self._gone:
            if record.address not in self._live:
                gone.setdefault(record.address, []).append(record)
        macs = {each.dst: each.mac for each in neighbours} if gone else {}
        return withdrawn.union(
            address for address, claims in gone.items()
            if claims_.can_own_items(claims, macs.get(address)))
