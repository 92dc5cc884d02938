# SPDX-License-Identifier: Apache-2.0

"""Objects read by netlink, compared with the output of ``ip``."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import ipaddress
import json
import os
import resource
import signal
import socket
import struct
import time
from typing import Any, Callable, Iterator
from unittest import mock

from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import netlink as netlink_module
from kuryr_break0.kernel import wire
from kuryr_break0.model import HostRoute
from kuryr_break0.model import Neighbour
from tests.functional import base
from tests.support import lab


class TestRoutes(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.index = kernel.find_ifindex(lab.PARENT)

    def read(self, *routes: str) -> kernel.Routes:
        """Add routes and return all routes of the kernel."""
        for route in routes:
            self.lab.run('ip', 'route', 'add', *route.split())
        with kernel.Netlink() as netlink:
            return netlink.routes()

    def test_host_routes(self) -> None:
        found = self.read(
            '10.1.0.1 dev eth0 proto 77 src %s' % lab.NODE,
            '10.1.0.2 dev eth0 table 1000 metric 5',
            '10.1.0.3 via 100.75.30.9',
            'blackhole 10.1.0.4',
            '10.1.0.5 dev eth0 scope global mtu 1400',
            '10.1.0.0/25 dev eth0',
            'fd01::1 dev eth0 proto 78',
            'fd01::2 via fd00:30::9',
            'unreachable fd01::3').host
        # Table 255 has the kernel's local and broadcast routes.
        routes = [route for route in found if route.table != 255]
        self.assertEqual({
            HostRoute(ipaddress.ip_address(dst), oif, protocol, table,
                      ipaddress.ip_address(src) if src else None, metric,
                      direct)
            for dst, oif, protocol, table, src, metric, direct in (
                ('10.1.0.1', self.index, 77, 254, lab.NODE, 0, True),
                ('10.1.0.2', self.index, 3, 1000, None, 5, True),
                ('10.1.0.3', self.index, 3, 254, None, 0, False),
                ('10.1.0.4', None, 3, 254, None, 0, False),
                ('10.1.0.5', self.index, 3, 254, None, 0, False),
                ('fd01::1', self.index, 78, 254, None, 1024, True),
                ('fd01::2', self.index, 3, 254, None, 1024, False),
                ('fd01::3', 1, 3, 254, None, 1024, False))}, set(routes))
        for route in routes:
            with self.subTest(route=route):
                with kernel.Netlink() as netlink:
                    found = netlink.route_to(route.dst)
                # The kernel uses no route of another table.
                self.assertEqual(route if route.table == 254 else None,
                                 found)

    def test_next_hops(self) -> None:
        self.lab.run('ip', 'link', 'add', 'veth0', 'type', 'veth',
                     'peer', 'name', 'veth1')
        for name in ('veth0', 'veth1'):
            self.lab.run('ip', 'link', 'set', name, 'up')
        self.read(
            '10.2.0.0/24 via 100.75.30.9',
            '10.3.0.0/24 via inet6 fe80::9 dev eth0',
            '10.4.0.0/24 nexthop via 100.75.30.10 weight 1 '
            'nexthop via inet6 fe80::10 dev eth0 weight 2',
            '10.5.0.1 dev veth0', '10.6.0.0/24 via 10.5.0.1',
            '10.7.0.0/24 via 10.5.0.1 dev veth0 table 1000',
            'fd02::/64 nexthop via fe80::11 dev eth0 '
            'nexthop via fe80::12 dev veth1',
            'fd03::/64 via fe80::13 dev veth0',
            '10.8.0.0/24 nexthop via 100.75.30.11 '
            'nexthop via inet6 fe80::14 dev veth0')
        # The routes name only the ID of the nexthop object.
        kernel.write_sysctl('ipv4/nexthop_compat_mode', 0)
        for nexthop in ('1 via 100.75.30.12 dev eth0', '2 via fe80::15 dev '
                        'veth0', '3 via fe80::16 dev veth1', '4 group 2/3',
                        '5 via 100.75.30.13 fdb', '6 blackhole'):
            self.lab.run('ip', 'nexthop', 'add', 'id', *nexthop.split())
        self.read('10.9.0.0/24 nhid 1', 'fd04::/64 nhid 4',
                  '10.10.0.0/24 nhid 6')
        others = {lab.LAN, lab.LAN6, '100.75.30.9', '100.75.30.10',
                  'fe80::9', 'fe80::10', 'fe80::11', 'fe80::12',
                  '100.75.30.11', '100.75.30.12', 'fe80::16'}
        at_veth0 = {'10.5.0.1', 'fe80::13', 'fe80::14', 'fe80::15'}
        gone = (2 ** 20, 'gone')
        with mock.patch.object(kernel.Netlink, '_set_option'):
            of_an_old_kernel = kernel.Netlink()
        self.addCleanup(of_an_old_kernel.__exit__)
        with kernel.Netlink() as netlink, mock.patch.object(
                socket, 'if_nameindex', return_value=[
                    gone, *socket.if_nameindex()]):
            for device, expected in (('none', others | at_veth0),
                                     ('veth0', others)):
                index = kernel.find_ifindex(device) or 0
                self.assertEqual(
                    at_veth0 if index else set(),
                    set(map(str, netlink.routes([index]).left_out)))
                for found in (netlink.next_hops([index]),
                              of_an_old_kernel.next_hops([index]),
                              netlink.routes([index]).next_hops):
                    self.assertEqual(expected, set(map(str, found)))
            # The dumps set NETLINK_GET_STRICT_CHK. With this option the kernel
            # refuses IPv6 look-ups, so a look-up has to unset the option.
            self.assertIsNotNone(
                netlink.lookup(ipaddress.ip_address('fd03::1')))

    def test_on_link(self) -> None:
        self.read('10.2.0.0/24 via 100.75.30.9', '10.5.0.0/24 dev eth0',
                  'prohibit 10.6.0.0/24')
        with kernel.Netlink() as netlink:
            for address, expected in (
                    ('100.75.30.99', True), ('10.5.0.1', True),
                    ('10.2.0.1', False), ('10.6.0.1', False),
                    ('192.0.2.1', False), (lab.NODE, False)):
                with self.subTest(address=address):
                    self.assertIs(expected, netlink.is_on_link(
                        ipaddress.ip_address(address)))

    def test_addresses(self) -> None:
        self.lab.run('ip', 'address', 'add', '10.7.0.1', 'peer', '10.7.0.2',
                     'dev', lab.PARENT)
        self.lab.settle()
        with kernel.Netlink() as netlink:
            found = netlink.addresses()
        self.assertEqual(
            sorted((link['ifindex'], each['local'])
                   for link in self.lab.ip('address', 'show')
                   for each in link['addr_info']),
            sorted((index, str(address)) for index, address in found))
        self.assertIn((self.index, ipaddress.ip_address('10.7.0.1')), found)

    def test_addresses_by_their_flags(self) -> None:
        # An address stays tentative while its interface is down.
        self.lab.run('ip', 'link', 'add', 'veth0', 'type', 'veth',
                     'peer', 'name', 'veth1')
        self.lab.settle()
        self.lab.run('ip', 'address', 'add', 'fd07::1/64', 'dev', 'veth0')
        with kernel.Netlink() as netlink:
            found = netlink.address_states()
            self.assertEqual(netlink.addresses(),
                             [each[:2] for each in found])
        self.assertEqual(
            [(kernel.find_ifindex('veth0'), ipaddress.ip_address('fd07::1'))],
            [each[:2] for each in found
             if each.flags & wire.IFA_F_TENTATIVE])
        self.assertFalse(any(each.flags & wire.IFA_F_DADFAILED
                             for each in found))

    def test_neighbours(self) -> None:
        for neighbour in ('10.1.0.1 lladdr 02:00:00:00:00:01 proto 77',
                          'fd01::1 lladdr 02:00:00:00:00:02',
                          '10.1.0.2 lladdr 02:00:00:00:00:03 nud reachable'):
            self.lab.run('ip', 'neigh', 'add', *neighbour.split(), 'dev',
                         lab.PARENT)
        self.lab.run('ip', 'neigh', 'add', '10.1.0.9', 'dev', 'lo',
                     'lladdr', '02:00:00:00:00:09')
        assert self.index is not None
        with kernel.Netlink() as netlink:
            found = netlink.neighbours(self.index)
        self.assertEqual({
            Neighbour(ipaddress.ip_address('10.1.0.1'), self.index,
                      '02:00:00:00:00:01', 77),
            Neighbour(ipaddress.ip_address('fd01::1'), self.index,
                      '02:00:00:00:00:02', None)}, set(found))


class TestNeighbours(base.LabTestCase):

    def test_unresolved(self) -> None:
        index = kernel.find_ifindex(lab.PARENT) or 0
        for count in 1, 40:  # read by look-ups, and by a dump
            asked = base.addresses(*(
                '100.75.30.%d' % (100 + number) for number in range(count)))
            for address in asked:
                self.lab.run('ip', 'neigh', 'replace', str(address), 'dev',
                             lab.PARENT, 'nud', 'incomplete')
            others = base.addresses(*('100.75.30.%d' % (200 + number)
                                      for number in range(count)))
            for address in others[:1]:
                self.lab.run('ip', 'neigh', 'replace', str(address), 'dev',
                             lab.PARENT, 'lladdr', '02:00:00:00:00:01')
            with self.subTest(count), kernel.Netlink() as netlink:
                self.assertCountEqual(asked[:count // 2 + 1],
                                      netlink.list_unresolved(index, {
                                          *asked[:count // 2 + 1], *others}))


class TestChange(base.LabTestCase):

    def garbage(self, netlink: kernel.Netlink, count: int) -> int:
        """Set routes and neighbours; return the number of garbage objects.

        :param count: number of routes, and of neighbours
        """
        index = kernel.find_ifindex(lab.PARENT) or 0
        changes: list[kernel.Change] = []
        for number in range(count):
            address = ipaddress.ip_address('10.1.0.%d' % number)
            changes += [
                (kernel.Verb.REPLACE,
                 Neighbour(address, index, '02:00:00:00:00:01', 77)),
                (kernel.Verb.REPLACE,
                 HostRoute(address, index, 77, 254,
                           ipaddress.ip_address(lab.NODE)))]
        gc.collect()
        gc.disable()
        try:
            self.assertEqual([None] * len(changes), netlink.change(changes))
            return gc.collect()
        finally:
            gc.enable()

    def test_garbage_does_not_grow_with_the_requests(self) -> None:
        # Each request leaves one answer as garbage, for any number of
        # changes.
        with kernel.Netlink() as netlink:
            self.garbage(netlink, 1)
            self.assertEqual(self.garbage(netlink, 1),
                             self.garbage(netlink, 60))


class TestNamespaceEvents(base.LabTestCase):

    def test_life_of_a_namespace(self) -> None:
        path = self.lab.add_netns('one')
        identity = kernel.identify(path)
        assert identity is not None
        with contextlib.closing(kernel.NamespaceEvents()) as events:
            number = kernel.examine_namespace(
                kernel.NamespaceLocation(path, identity)).number
            self.assertEqual({number}, events.get().numbered)
            self.lab.run('ip', 'link', 'set', 'lo', 'down', netns='one')
            self.assertEqual({number}, events.get().changed)
            self.lab.del_netns('one')
            lab.until(lambda: events.get().ended == {number})

    def test_macvlans_of_namespaces_without_a_number(self) -> None:
        self.lab.add_netns('one')
        with contextlib.closing(kernel.NamespaceEvents()) as events:
            self.lab.run('ip', 'link', 'add', 'mv', 'link', lab.PARENT,
                         'netns', 'one', 'type', 'macvlan')
            changes = events.get()
            self.assertEqual((set(), True), (changes.changed,
                                             changes.is_stacked))
            # A change in this namespace explains the event of the parent.
            for command in ('add mv link eth0 type macvlan', 'del mv',
                            'set eth0 promisc on'):
                self.lab.run('ip', 'link', *command.split())
                changes = events.get()
                self.assertEqual((True, False), (changes.interfaces,
                                                 changes.is_stacked), command)


class TestHostile(base.LabTestCase):

    def test_an_answer_that_is_not_of_the_kernel(self) -> None:
        """A forged answer of a pod with CAP_NET_ADMIN is ignored."""
        # ENODEV, in answer to the second request
        forged = netlink_module.HEADER.pack(36, 2, 0, 2, 0) + struct.pack(
            '=i16x', -errno.ENODEV)
        with kernel.Netlink() as netlink, socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW, 0) as other:
            self.assertIsNotNone(netlink.link('lo'))
            with contextlib.suppress(ConnectionRefusedError):
                other.sendto(forged, netlink._socket.getsockname())
            self.assertIsNotNone(netlink.link(lab.PARENT))

    @contextlib.contextmanager
    def no_descriptors(self) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_without_descriptors(self) -> None:
        """Running out of descriptors is not taken for a missing object."""
        self.lab.run('ip', 'link', 'add', 'veth7', 'type', 'veth')
        with kernel.Netlink() as netlink:
            with self.no_descriptors():
                with self.assertRaises(exceptions.KernelRefused) as caught:
                    netlink.next_hops()
                netlink.delete_link('veth7')
                with self.assertRaises(exceptions.SystemRefused):
                    kernel.read_sysctl('ipv6/conf/all/disable_ipv6')
                with self.assertRaises(exceptions.SystemRefused):
                    kernel.find_ifindex(lab.PARENT)
                self.assertTrue(kernel.has_interface(lab.PARENT))
                self.assertFalse(kernel.has_interface('veth7'))
                self.assertIsNone(kernel.find_ifindex('veth7'))
            self.assertTrue(caught.exception.is_exhausted)
            self.assertIsNone(kernel.read_sysctl('ipv6/conf/none/mtu'))
            self.assertIsNone(netlink.link('veth7'))
            for name in ('veth0', '', 'x' * 16, '\udcff' * 16, '\ud800'):
                netlink.delete_link(name)  # no such interface exists

    def test_a_parent_that_cannot_be_named(self) -> None:
        path = self.lab.add_pod('pod', base.POD)
        for code, expected in ((errno.EMFILE, exceptions.SystemRefused),
                               (errno.ENXIO, None)):
            with mock.patch.object(socket, 'if_indextoname',
                                   side_effect=OSError(code, 'of the test')):
                if expected is None:  # the parent has just been deleted
                    self.assertEqual([], kernel.list_macvlans_in(path))
                    continue
                with self.assertRaises(expected):
                    kernel.list_macvlans_in(path)
        self.assertEqual(1, len(kernel.list_macvlans_in(path)))

    def test_names_that_are_not_utf_8(self) -> None:
        """Names of interfaces and processes need not be UTF-8."""
        self.lab.run('ip', 'link', 'add', '\udcff', 'type', 'veth',
                     'peer', 'name', 'x')
        self.lab.run('ip', 'link', 'set', '\udcff', 'up')
        for device in ('\udcff', lab.PARENT):
            self.lab.run('ip', 'route', 'add', '10.7.0.%d' % len(
                device), 'dev', device)
        self.assertEqual(1, kernel.count_host_routes([lab.PARENT]))
        self.assertEqual(1, kernel.count_host_routes(['\udcff']))

        def contained() -> None:
            assert kernel.unshare()
            with open('/proc/self/comm', 'wb') as file:
                file.write(b'\xff')
            time.sleep(1000)

        pid = base.in_child(contained)
        try:
            lab.until(lambda: '/proc/%d' % pid in {
                each.process for each in kernel.find_namespaces(['/proc'])})
        finally:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)

    def test_a_container_that_changes_all_the_time(self) -> None:
        path = self.lab.add_pod('pod', base.POD)
        with mock.patch.object(kernel.Netlink, '_ask',
                               return_value=([], False)) as asked, \
                mock.patch.object(time, 'sleep') as slept, \
                self.assertRaises(exceptions.KernelRefused):
            kernel.list_macvlans_in(path)
        self.assertEqual(netlink_module.FEW_TRIES, asked.call_count)
        slept.assert_not_called()


TABLE = 'pod'


class TestDumps(base.LabTestCase):
    """Dumps of objects that a pod changes at the same time."""

    #: More rules than fit into the first part of the kernel's answer.
    RULES = 1500

    def setUp(self) -> None:
        super().setUp()
        self.reads = self.dumps = 0

    def load(self, *program: str, lines: list[str]) -> None:
        with open('/run/lines', 'w') as file:
            file.writelines(line + '\n' for line in lines)
        self.lab.run(*program, '/run/lines')

    def add_rules(self, count: int) -> None:
        self.load('nft', '-f', lines=[
            'add table netdev ' + TABLE, 'add chain netdev %s mine' % TABLE,
            *['add rule netdev %s mine counter' % TABLE] * count])

    def handles(self) -> list[int]:
        return [each['rule']['handle'] for each in json.loads(self.lab.run(
            'nft', '-j', 'list', 'table', 'netdev', TABLE).stdout)['nftables']
            if 'rule' in each]

    def heard(self, opened: Any, after: Callable[[], object]) -> None:
        """Call a function after each read of a socket."""
        real = opened._socket

        def send(data: bytes) -> None:
            self.dumps += 1
            self.reads = 0
            real.send(data)

        def receive(size: int) -> bytes:
            data: bytes = real.recv(size)
            self.reads += 1
            after()
            return data

        opened._socket = mock.Mock(wraps=real, recv=receive, send=send)

    def insert(self) -> None:
        """Shift all rules by one, so that a dump reads one rule twice."""
        self.lab.run('nft', 'insert', 'rule', 'netdev', TABLE, 'mine',
                     'counter')

    def test_rules_that_change_meanwhile(self) -> None:
        self.add_rules(self.RULES)
        with kernel.Nft() as nft, mock.patch.object(
                netlink_module.random, 'uniform', max), mock.patch.object(
                netlink_module.time, 'sleep') as sleep:
            self.heard(nft, lambda: (self.dumps, self.reads) == (1, 1)
                       and self.insert())
            found = nft.rules(TABLE)
        self.assertEqual(self.RULES + 1, len(found))
        self.assertEqual(self.handles(), found)
        # One interruption delays a repair by at most the first pause.
        sleep.assert_called_once_with(netlink_module.DUMP_PAUSE_FIRST)

    def test_rules_that_change_each_time(self) -> None:
        self.add_rules(self.RULES)
        with kernel.Nft() as nft, mock.patch.multiple(
                netlink_module, DUMP_TRIES=3, DUMP_PAUSE=0), \
                self.assertRaises(exceptions.KernelRefused) as caught:
            self.heard(nft, lambda: self.reads == 1 and self.insert())
            nft.rules(TABLE)
        self.assertEqual(errno.EINTR, caught.exception.errno)
        self.assertIn('changed during each read', str(caught.exception))

    def test_addresses_that_change_each_time(self) -> None:
        # Each change deletes the first address and adds another one. The
        # kernel continues a dump by the position in the list, and so skips an
        # address.
        self.lab.run('ip', 'link', 'add', 'many', 'type', 'veth')
        self.load('ip', '-batch', lines=[
            'address add 10.1.%d.%d/32 dev many' % divmod(number, 250)
            for number in range(1500)])
        changes = iter(range(1500))

        def change() -> None:
            if self.reads == 1:
                number = next(changes)
                for verb, high in ('del', 1), ('add', 2):
                    self.lab.run('ip', 'address', verb, '10.%d.%d.%d/32' % (
                        high, *divmod(number, 250)), 'dev', 'many')

        with kernel.Netlink() as netlink:
            before = set(netlink.addresses())
            self.heard(netlink, change)
            found = netlink.addresses()
            self.assertEqual(len(set(found)), len(found))
            self.assertEqual(set(), before - {*found})
        # An incomplete dump must fail: a pod whose address is missing from the
        # dump would lose its route.
        with kernel.Netlink(most=2 ** 14) as netlink:
            self.heard(netlink, change)
            with self.assertRaises(exceptions.KernelRefused) as caught:
                netlink.addresses()
        self.assertEqual(errno.EINTR, caught.exception.errno)

    def assert_bounded(self, opened: Any, count: int,
                       dump: Callable[[], list[Any]]) -> None:
        """Expect a dump to stop at its limit, and the socket to work after."""
        with self.subTest(dump=dump):
            self.assertEqual(count, len(dump()))
            with mock.patch.object(opened, '_most', 10):
                self.heard(opened, lambda: None)
                self.assertLessEqual(len(dump()), 20)  # 10 per family
                self.assertLessEqual(self.reads, 2)
            self.assertEqual(count, len(dump()))

    def test_dumps_of_a_full_namespace_are_bounded(self) -> None:
        index = kernel.find_ifindex(lab.PARENT) or 0
        self.load('ip', '-batch', lines=[
            line % (number // 250, number % 250, lab.PARENT)
            for number in range(3000) for line in (
                'route add 10.1.%d.%d dev %s table 1000',
                'neigh add 10.1.%d.%d lladdr 02:00:00:00:00:01 dev %s')])
        self.add_rules(self.RULES)
        with kernel.Netlink() as netlink, kernel.Nft() as nft:
            self.assert_bounded(netlink, 3000, functools.partial(
                netlink.host_routes_of, index, 1000))
            self.assert_bounded(netlink, 3000, functools.partial(
                netlink.neighbours, index))
            self.assert_bounded(nft, self.RULES, functools.partial(
                nft.rules, TABLE))


class TestEvents(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.settle()  # an address that becomes usable is an event

    def add_routes(self, count: int) -> None:
        with open('/run/batch', 'w') as batch:
            for number in range(count):
                batch.write('route add 10.1.%d.%d dev eth0\n' % divmod(
                    number, 250))
        self.lab.run('ip', '-batch', batch.name)

    def test_a_burst(self) -> None:
        # SO_RCVBUFFORCE needs CAP_NET_ADMIN of the machine. In a user
        # namespace the buffer is at most twice rmem_max.
        with kernel.Events() as events:
            room = events._socket.getsockopt(socket.SOL_SOCKET,
                                             socket.SO_RCVBUF)
            self.add_routes(2000)
            heard = [each.kind for _ in range(20) for each in events.get()]
        has_room = room > 2000 * 1024
        self.assertEqual(not has_room, 'lost' in heard)
        self.assertEqual(has_room, heard.count('route') == 2000)

    def test_events_lost_before_the_queue_was_empty(self) -> None:
        # The kernel reports the loss once, and drops further events until the
        # queue is empty.
        with kernel.Events() as events:
            events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF,
                                      2 ** 18)
            self.add_routes(5000)
            first = events.get()
            self.assertEqual('lost', first[0].kind)
            self.assertGreater(len(first), 100)
            self.lab.run('ip', 'route', 'add', '10.2.0.1', 'dev', 'eth0')
            rest = [each for _ in range(20) for each in events.get()]
            self.assertNotIn('10.2.0.1', {str(each.dst) for each in rest})
            self.assertEqual(1, [each.kind for each in rest].count('lost'))
            self.assertEqual('lost', rest[-1].kind)
            self.lab.run('ip', 'route', 'add', '10.2.0.2', 'dev', 'eth0')
            self.assertEqual(['10.2.0.2'], [
                str(each.dst) for each in events.get()
                if each.kind == 'route'])
