# SPDX-License-Identifier: Apache-2.0

"""A fake kernel in memory, for the manager, the reconciler and the device.

The fake keeps the interfaces, addresses, routes and neighbours of a node, and
the states of namespaces, and its changes can fail on request. Functional tests
cover the behaviour of the real kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from typing import (Any, Collection, Iterable, Iterator, Optional,
                    Sequence)
import unittest
from unittest import mock

from kuryr_break0.break0 import guard
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import node
from kuryr_break0.kernel import values
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Neighbour
from kuryr_break0.model import Pair
from kuryr_break0.model import Tap


#: The destination, the table and the metric of a route.
RouteKey = tuple[IPAddress, int, int]


def route_key(route: HostRoute) -> RouteKey:
    return route.dst, route.table, route.metric or 0


class FakeKernel:
    """The kernel's state, and the functions of :mod:`kuryr_break0.kernel`.

    :ivar links: interfaces, by name
    :ivar host: host routes, by destination, table and metric; the kernel
        permits one route for each such key
    :ivar next_hops: next hops of routes that do not go through break0
    :ivar through_break0: next hops of routes that go through break0
    :ivar closed: names of the :ivar:`tables` that have chains
    :ivar namespaces: existing namespaces, by path
    :ivar fail: called before each change with the verb and the item of the
        change; returns the error number of the change, or None
    """

    def __init__(self) -> None:
        self.links: dict[str, kernel.Link] = {}
        self.owned: list[tuple[str, IPAddress]] = []
        self.host: dict[RouteKey, HostRoute] = {}
        self.next_hops: set[IPAddress] = set()
        self.through_break0: set[IPAddress] = set()
        self.known: dict[tuple[int, IPAddress], Neighbour] = {}
        self.sysctls: dict[str, int] = {}
        self.namespaces: dict[str, NamespaceId] = {}
        self.gone: set[NamespaceId] = set()
        self.macvlans_found: list[kernel.Macvlan] = []
        self.tables: dict[str, set[Pair]] = {}
        self.closed: set[str] = set()
        self.fail: Any = lambda verb, item: None
        self.next_index = 1

    def add_link(self, name: str, **fields: Any) -> kernel.Link:
        made = kernel.Link(**{
            'name': name, 'index': self.next_index, 'kind': None,
            'mode': None, 'lower': None, 'lower_namespace': None,
            'mtu': 1500, 'mac': '02:00:00:00:00:%02x' % self.next_index,
            'alias': None, 'multicast': False, 'up': True, 'loopback': False,
            'group': 0, 'carrier': True, 'vrf': None, 'port_of': None,
            'ethernet': True, 'protodown': False, **fields})
        self.next_index += 1
        self.links[name] = made
        return made

    def replace(self, link: kernel.Link, **fields: Any) -> None:
        self.links[link.name] = dataclasses.replace(self.links[link.name],
                                                    **fields)

    def set_route(self, route: HostRoute) -> None:
        """Set a route in place of the route with the same key."""
        self.host[route_key(route)] = route

    def routes_to(self, address: IPAddress, table: int = 254
                  ) -> list[HostRoute]:
        """Return the routes to an address, by ascending metric."""
        return sorted((route for route in self.host.values() if (
            route.dst, route.table) == (address, table)),
            key=lambda route: route.metric or 0)

    @property
    def pairs(self) -> list[Pair]:
        """Return the elements of all tables."""
        return [each for pairs in self.tables.values() for each in pairs]

    def lose(self, name: str) -> None:
        """Delete an interface and the routes and neighbours on it."""
        link = self.links.pop(name)
        self.host = {key: route for key, route in self.host.items()
                     if route.oif != link.index}
        self.known = {key: each for key, each in self.known.items()
                      if key[0] != link.index}
        # With the interface, the kernel deletes only the chain of the table;
        # the fake drops the whole table.
        self.tables.pop(guard.table_of(name), None)

    # Functions of the package

    def open_node_nft(self, exclusive: bool = False) -> FakeNft:
        return FakeNft(self)

    def find_program(self, name: str) -> Optional[str]:
        return '/usr/sbin/' + name

    def load(self, nft: str, text: str, *options: str) -> Optional[str]:
        """Load a table from nft's input; always succeeds."""
        table = text.split()[2]
        if '--check' not in options:
            if 'delete table' in text or table not in self.tables:
                self.tables[table] = set()
                self.closed.discard(table)
            if 'hook ingress' in text:
                self.closed.add(table)
        return None

    def count_host_routes(self, devices: Any) -> int:
        return sum(self.format_ifname(route.oif) in devices
                   for route in self.host.values())

    def create_macvlan(self, name: str, parent: kernel.Link,
                       mac: str) -> None:
        self.add_link(name, kind='macvlan', mode='bridge', mac=mac,
                      lower=parent.index, up=False, multicast=True)

    def find_ifindex(self, name: str) -> Optional[int]:
        found = self.links.get(name)
        return found.index if found is not None else None

    def format_ifname(self, ifindex: Optional[int]) -> str:
        return next((link.name for link in self.links.values()
                     if link.index == ifindex), 'if%s' % ifindex)

    def find_current_name(self, name: str, ifindex: Optional[int]) -> str:
        return next((link.name for link in self.links.values()
                     if link.index == ifindex), name)

    def has_interface(self, name: str) -> bool:
        return name in self.links

    def identify(self, path: Optional[str]) -> Optional[NamespaceId]:
        return self.namespaces.get(path or '')

    def identify_or_fail(self, path: str) -> NamespaceId:
        if path not in self.namespaces:
            raise FileNotFoundError(errno.ENOENT, 'not there', path)
        return self.namespaces[path]

    def judge(self, path: Optional[str], known: Optional[NamespaceId],
              tap: Optional[Tap] = None) -> kernel.Verdict:
        return kernel.Verdict(
            kernel.State.UNKNOWN if known is None else
            kernel.State.GONE if known in self.gone else kernel.State.LIVING)

    def list_macvlans(self, *where: Any) -> list[kernel.Macvlan]:
        return self.macvlans_found

    def find_source(self, address: IPAddress,
                    device: Optional[str] = None) -> Optional[IPAddress]:
        return next((own for name, own in self.owned
                     if own.version == address.version), None)

    def read_sysctl(self, path: str) -> Optional[int]:
        # By default, each sysctl has a value that break0 has to change.
        return self.sysctls.get(path, 0 if 'disable' in path else 9)

    def write_sysctl(self, path: str, value: int, directory: str) -> None:
        self.sysctls[path] = value

    def delete_connections(self, address: IPAddress) -> None:
        pass

    @contextlib.contextmanager
    def enter_namespace(self, netns: str, known: Any = None) -> Iterator[None]:
        raise exceptions.NetnsUnusable(netns=netns, reason='is not entered')
        yield

    def socket(self, most: int = 0) -> FakeNetlink:
        return FakeNetlink(self)


class FakeNetlink:
    """Answers like a :class:`kernel.Netlink`, from the fake kernel."""

    def __init__(self, fake: FakeKernel) -> None:
        self._fake = fake

    def __enter__(self) -> FakeNetlink:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def link(self, name: str) -> Optional[kernel.Link]:
        return self._fake.links.get(name)

    def links(self) -> list[kernel.Link]:
        return list(self._fake.links.values())

    def addresses(self) -> list[values.InterfaceAddress]:
        return [values.InterfaceAddress(self._fake.links[name].index, address)
                for name, address in self._fake.owned
                if name in self._fake.links]

    def routes(self, devices: Any = ()) -> kernel.Routes:
        return kernel.Routes(tuple(self._fake.host.values()),
                             frozenset(self._fake.next_hops),
                             frozenset(self._fake.through_break0))

    def host_routes_of(self, ifindex: int, table: int) -> list[HostRoute]:
        return [route for route in self._fake.host.values()
                if (route.oif, route.table) == (ifindex, table)]

    def next_hops(self, *args: Any) -> frozenset[IPAddress]:
        return frozenset(self._fake.next_hops)

    def neighbours(self, ifindex: int) -> list[Neighbour]:
        return [each for (index, _), each in self._fake.known.items()
                if index == ifindex]

    def list_unresolved(self, ifindex: int, addresses: Collection[IPAddress]
                        ) -> list[IPAddress]:
        return []

    def neighbour(self, ifindex: int, address: IPAddress
                  ) -> tuple[Optional[str], Optional[str]]:
        found = self._fake.known.get((ifindex, address))
        return (found.mac, 'permanent') if found else (None, None)

    def route_to(self, address: IPAddress) -> Optional[HostRoute]:
        return next(iter(self._fake.routes_to(address)), None)

    def set_link_up(self, link: kernel.Link) -> None:
        self._fake.replace(link, up=True, multicast=False)

    def set_protodown_off(self, link: kernel.Link) -> None:
        self._fake.replace(link, protodown=False)

    def set_alias(self, link: kernel.Link, alias: str) -> None:
        self._fake.replace(link, alias=alias)

    def set_mtu(self, link: kernel.Link, mtu: int) -> None:
        self._fake.replace(link, mtu=mtu)

    def set_mac(self, link: kernel.Link, mac: str) -> None:
        self._fake.replace(link, mac=mac)

    def add_address(self, link: kernel.Link, address: IPAddress) -> None:
        self._fake.owned.append((link.name, address))

    def delete_link(self, name: str) -> None:
        self._fake.links.pop(name, None)

    def change(self, changes: Sequence[kernel.Change]
               ) -> list[Optional[exceptions.KernelRefused]]:
        return [self._change(*each) for each in changes]

    def _change(self, verb: kernel.Verb,
                item: Any) -> Optional[exceptions.KernelRefused]:
        code = self._fake.fail(verb, item)
        if code:
            return exceptions.KernelRefused('change', 'it fails', code)
        if isinstance(item, Neighbour):
            place = item.ifindex, item.dst
            if verb is kernel.Verb.DELETE:
                gone = self._fake.known.pop(place, None)
                return None if gone else _refused(errno.ENOENT)
            self._fake.known[place] = item
            return None
        if verb is kernel.Verb.DELETE:
            matching = [
                route for route in self._fake.routes_to(item.dst, item.table)
                if item.metric in (None, route.metric)
                and item.oif in (None, route.oif)
                and item.protocol == route.protocol]
            if not matching:
                return _refused(errno.ESRCH)
            del self._fake.host[route_key(matching[0])]
        elif verb is kernel.Verb.ADD and route_key(item) in self._fake.host:
            return _refused(errno.EEXIST)
        else:
            self._fake.set_route(item)
        return None


def _refused(code: int) -> exceptions.KernelRefused:
    return exceptions.KernelRefused('change', 'so it is', code)


class FakeNft:
    """Answers like a :class:`kernel.Nft`, from the fake kernel's tables."""

    def __init__(self, fake: FakeKernel) -> None:
        self._fake = fake

    def add(self, table: str, pairs: Iterable[Pair]) -> None:
        if table in self._fake.tables:
            self._fake.tables[table] |= set(pairs)

    def delete(self, table: str, pairs: Iterable[Pair]) -> None:
        if table in self._fake.tables:
            self._fake.tables[table] -= set(pairs)

    def elements(self, table: str) -> set[Pair]:
        return set(self._fake.tables.get(table, ()))

    def rules(self, table: str) -> list[int]:
        return [1, 2] if self.has_table(table) and (
            table in self._fake.closed) else []

    def has_table(self, table: str) -> bool:
        return table in self._fake.tables

    def add_neighbour_answer(self, *args: Any) -> None:
        pass

    def delete_table(self, table: str) -> bool:
        return self._fake.tables.pop(table, None) is not None


def patchers(fake: FakeKernel) -> Iterator[Any]:
    """Yield the patches that replace the kernel by a fake kernel."""
    for name in ('count_host_routes', 'create_macvlan', 'find_current_name',
                 'has_interface', 'identify', 'identify_or_fail',
                 'find_ifindex', 'format_ifname', 'list_macvlans',
                 'open_node_nft', 'find_source', 'read_sysctl',
                 'write_sysctl', 'find_program',
                 'delete_connections', 'enter_namespace'):
        yield mock.patch.object(kernel, name, getattr(fake, name))
    yield mock.patch.object(kernel, 'Netlink', fake.socket)
    yield mock.patch.object(kernel.Judge, 'judge', fake.judge)
    yield mock.patch.object(node, 'find_current_name', fake.find_current_name)
    yield mock.patch.object(guard, '_load', fake.load)


class FakeKernelTestCase(unittest.TestCase):
    """Base class of tests that run against a fake kernel."""

    def setUp(self) -> None:
        super().setUp()
        self.fake = FakeKernel()
        for patcher in patchers(self.fake):
            patcher.start()
            self.addCleanup(patcher.stop)
