# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import struct
import threading
import time
from typing import Any, Optional
from unittest import mock

from kuryr_break0.engine import problems
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import nft
from kuryr_break0 import ledger
from kuryr_break0.ledger import cache
from kuryr_break0.ledger import records
from kuryr_break0.model import Origin
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.support import lab

POD6 = 'fd00:30::71'
MAC = '02:00:00:00:00:01'
OTHER_MAC = '02:00:00:00:00:02'


class TestReachability(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_pod('pod', POD)

    def assert_reachable(self, expected: bool) -> None:
        self.assertEqual(
            (expected, expected),
            (self.lab.ping(POD), self.lab.ping(lab.NODE, 'pod')))

    def test_unbound_pod_is_out_of_reach(self) -> None:
        # The control of all tests here: without a bind, the kernel separates
        # the node from the pod.
        self.assert_reachable(False)
        self.assertTrue(self.lab.ping(lab.LAN, 'pod'))

    def test_unnumbered(self) -> None:
        self.bind()
        self.assert_reachable(True)
        self.assertTrue(self.lab.ping(lab.LAN, 'pod'))

    def test_with_any_rp_filter(self) -> None:
        self.bind()
        for value in (0, 1, 2):
            for name in ('all', 'break0', 'eth0'):
                kernel.write_sysctl('ipv4/conf/%s/rp_filter' % name, value)
            with self.subTest(rp_filter=value):
                self.assert_reachable(True)

    def test_numbered_as_in_the_original_recipe(self) -> None:
        self.bind(addr=['100.75.30.7'])
        self.assert_reachable(True)
        self.assertTrue(self.lab.ping('100.75.30.7', 'pod'))
        addresses = [(each['local'], each['prefixlen'])
                     for link in self.lab.ip('address', 'show', 'break0')
                     for each in link['addr_info']]
        self.assertEqual([('100.75.30.7', 32)], addresses)
        self.assertNotIn('prefsrc', self.lab.routes()[POD])

    def test_unbound_again(self) -> None:
        self.bind()
        self.unbind()
        self.assert_reachable(False)
        self.assertEqual({}, self.lab.routes())
        self.assertEqual(set(), self.bound())

    def test_only_the_bound_pod(self) -> None:
        self.lab.add_pod('other', OTHER_POD)
        self.bind()
        self.assert_reachable(True)
        self.assertFalse(self.lab.ping(OTHER_POD))


class TestRoutes(base.LabTestCase):

    def test_the_attributes_of_a_route(self) -> None:
        self.bind()
        route = self.lab.routes()[POD]
        self.assertEqual(
            ('176', 'link', lab.NODE, 'main'),
            tuple(route[key] for key in ('protocol', 'scope', 'prefsrc',
                                         'table')))
        self.assertNotIn('gateway', route)

    def test_table_and_protocol_are_options(self) -> None:
        self.bind(route_table=1000, route_protocol=200)
        route = self.lab.routes()[POD]
        self.assertEqual(('200', '1000'), (route['protocol'], route['table']))
        self.unbind(route_table=1000, route_protocol=200)
        self.assertEqual({}, self.lab.routes())

    def test_no_source_on_a_parent_without_address(self) -> None:
        self.lab.run('ip', 'address', 'flush', 'dev', lab.PARENT)
        self.bind()
        self.assertNotIn('prefsrc', self.lab.routes()[POD])

    def test_source_is_of_the_parent_not_of_another_interface(self) -> None:
        # The node reaches another subnet by its second NIC. The pods are on
        # the parent and expect the parent's address as source.
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        self.lab.run('ip', 'address', 'add', '192.0.2.1/24', 'dev', 'eth1')
        self.lab.run('ip', 'link', 'set', 'eth1', 'up')
        self.lab.run('ip', 'route', 'replace', 'default', 'via', '192.0.2.2')
        self.bind('10.20.0.5')
        self.assertEqual(lab.NODE, self.lab.routes()['10.20.0.5']['prefsrc'])

    def test_bind_again_is_the_same(self) -> None:
        self.bind()
        before = self.lab.routes()
        self.bind()
        self.assertEqual(before, self.lab.routes())

    def test_another_route_of_break0_is_replaced(self) -> None:
        # The original recipe sets such a route with ip.
        self.bind(OTHER_POD)
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'break0')
        self.bind()
        self.assertEqual('176', self.lab.routes()[POD]['protocol'])

    def test_a_foreign_route_is_left_alone(self) -> None:
        self.bind(OTHER_POD)
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'lo')
        with self.assertRaisesRegex(exceptions.ForeignRoute, POD):
            self.bind()
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertEqual({POD}, set(self.lab.routes('lo')))

    def test_a_foreign_route_of_another_metric(self) -> None:
        self.lab.add_ipv6()
        self.bind(OTHER_POD)
        self.lab.run('ip', 'link', 'add', 'dummy0', 'type', 'veth',
                     'peer', 'name', 'dummy1')
        self.lab.run('ip', 'link', 'set', 'dummy0', 'up')
        for address, route in (
                (POD, 'dev lo metric 100'),
                (POD, 'via %s metric 100' % lab.LAN),
                (POD, 'metric 100 nexthop via %s nexthop dev dummy0'
                 % lab.LAN),
                ('blackhole ' + POD, 'metric 100'),
                ('unreachable ' + POD, 'metric 100'),
                (POD6, 'dev lo'),
                (POD6, 'dev lo metric 2'),
                (POD6, 'nexthop via %s nexthop via fe80::9 dev dummy0'
                 % lab.LAN6),
                ('blackhole ' + POD6, ''),
                ('unreachable ' + POD6, ''),
                ('prohibit ' + POD6, '')):
            with self.subTest(address=address, route=route):
                self.lab.run('ip', 'route', 'add', *address.split(),
                             *route.split())
                address = address.split()[-1]
                before = self.host_routes(address)
                error: Any = exceptions.ForeignRoute
                if before[0]['type'] == 'prohibit':
                    error = exceptions.AddressRefused
                with self.assertRaisesRegex(error, address):
                    self.bind(address)
                self.assertEqual(before, self.host_routes(address))
                self.assertIsNone(self.neighbour(address))
                if error is exceptions.ForeignRoute:
                    # A sync keeps and reports the foreign route.
                    with self.assertLogs('kuryr_break0', 'ERROR') as logs:
                        self.assertEqual([address], [
                            str(each.dst) for each
                            in self.manager().sync().foreign])
                    self.assertIn('%s has a foreign route' % address,
                                  '\n'.join(logs.output))
                    self.assertFalse(self.manager().sync())
                    self.assertEqual(before, self.host_routes(address))
                    self.assertRegex(self.problems()[0],
                                     'it has a route of another program')
                # Without the foreign route the address can be bound.
                self.unbind(address)
                self.assertEqual(before, self.host_routes(address))
                self.lab.run('ip', '-6' if ':' in address else '-4', 'route',
                             'flush', 'exact', address)
                self.bind(address)
                self.assertIn(address, self.lab.routes())
                self.unbind(address)

    def host_routes(self, address: str) -> list[Any]:
        """Return the routes to a single address, except local routes."""
        return [route for route in self.lab.ip(
            '-6' if ':' in address else '-4', 'route', 'show', 'table', 'all',
            'exact', address) if route.get('type') != 'local']

    def neighbour(self, address: str) -> Optional[str]:
        return next((each['lladdr'] for each in self.lab.ip(
            'neigh', 'show', 'dev', 'break0') if each['dst'] == address),
            None)

    def test_a_route_of_a_network_is_overridden(self) -> None:
        # Calico sets such a blackhole for the node's block of addresses.
        self.lab.add_ipv6()
        for route in ('blackhole 100.75.30.64/26', 'unreachable 10.9.0.0/16',
                      'blackhole fd00:30:0:0:1::/80',
                      'unreachable default metric 5000'):
            self.lab.run('ip', *(('-6',) if 'default' in route else ()),
                         'route', 'add', *route.split())
        pods = (POD, '10.9.0.1', 'fd00:30:0:0:1::1', 'fd09::1')
        self.bind(*pods)
        self.assertEqual(set(map(ipaddress.ip_address, pods)),
                         set(map(ipaddress.ip_address, self.lab.routes())))

    def test_a_route_that_comes_later_takes_no_part(self) -> None:
        self.lab.add_pod('pod', POD)
        self.bind()
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'lo', 'metric', '100')
        self.assertFalse(self.manager().sync().foreign)
        self.assertEqual([], self.problems())
        self.bind()
        self.assertTrue(self.lab.ping(POD))
        # When a sync has to set our route again, the foreign route exists
        # already.
        self.lab.run('ip', 'link', 'del', 'break0')
        self.assertEqual(1, len(self.manager().sync().foreign))
        self.assertEqual({}, self.lab.routes())

    def test_a_route_of_another_table(self) -> None:
        # A rule of another program selects the table; ours is in main.
        self.bind(OTHER_POD)
        self.lab.run('ip', 'rule', 'add', 'from', 'all', 'lookup', '1000')
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'lo', 'table', '1000')
        self.bind()
        self.assertIn(POD, self.lab.routes())
        self.assertFalse(self.manager().sync().foreign)
        # [break0] route_table may name the same table.
        with self.assertRaises(exceptions.ForeignRoute):
            self.bind(route_table=1000)
        self.lab.run('ip', 'route', 'add', '100.75.30.73', 'dev', 'lo',
                     'table', '1000', 'metric', '9')
        with self.assertRaises(exceptions.ForeignRoute):
            self.bind('100.75.30.73', route_table=1000)

    def test_unbind_an_unbound_address(self) -> None:
        self.unbind()  # break0 does not exist
        self.bind(OTHER_POD)
        self.unbind()
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))

    def test_unbind_after_the_route_has_gone(self) -> None:
        self.bind()
        self.lab.run('ip', 'route', 'del', POD)
        self.unbind()
        self.assertEqual(set(), self.bound())

    def test_a_route_of_another_protocol_stays(self) -> None:
        self.bind()
        self.lab.run('ip', 'route', 'replace', POD, 'dev', 'break0',
                     'proto', 'static')
        self.unbind()
        self.assertEqual('static', self.lab.routes()[POD]['protocol'])

    def test_a_route_by_another_device_stays(self) -> None:
        self.bind()
        self.lab.run('ip', 'route', 'replace', POD, 'dev', 'lo',
                     'proto', '176')
        self.unbind()
        self.assertIn(POD, self.lab.routes('lo'))

    def test_several_addresses(self) -> None:
        self.bind(POD, OTHER_POD)
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))
        self.unbind(POD, OTHER_POD)
        self.assertEqual({}, self.lab.routes())

    def test_for_a_bad_address_alone_nothing_is_made(self) -> None:
        with self.assertRaises(exceptions.AddressRefused):
            self.bind(lab.NODE)
        self.assertIsNone(self.lab.link('break0'))

    def test_one_bad_address_does_not_hinder_the_others(self) -> None:
        with self.assertRaises(exceptions.AddressRefused):
            self.bind(lab.NODE, POD)
        self.assertEqual({POD}, set(self.lab.routes()))

    def test_a_next_hop_through_break0_is_not_discovered(self) -> None:
        """Bind refuses a discovered next hop, as sync does."""
        self.bind(OTHER_POD)
        self.lab.run('ip', 'route', 'add', '10.9.0.0/16', 'via', POD,
                     'dev', 'break0', 'onlink')
        self.manager().sync()
        with self.assertRaisesRegex(exceptions.AddressRefused,
                                    'a next hop of a route through break0'):
            self.manager().bind(OWNER, base.addresses(POD), parent=lab.PARENT,
                                mac=MAC, origin=Origin.DISCOVERED)
        self.bind()

    @mock.patch.object(cache, 'MAX_AGE', 3600)
    def test_cost_does_not_grow_with_the_pods(self) -> None:
        netns = self.lab.add_pod('pod', POD, mac=MAC)

        def messages() -> list[str]:
            """Return type and flags of each message of a bind and unbind."""
            sent: list[str] = []

            class CountingSocket(socket.socket):

                def send(self, data: Any, *args: Any) -> int:
                    start = 0
                    while start < len(data):
                        length, kind, flags = struct.unpack_from(
                            'IHH', data, start)
                        sent.append('%d %#x' % (kind, flags))
                        start += length + 3 & ~3
                    return super().send(data, *args)

            with mock.patch.object(socket, 'socket', CountingSocket), \
                    mock.patch.object(nft, '_kept', threading.local()):
                # Requests on the node: route lookup; guard entry; neighbour
                # and route. Requests in the pod: its interface; lookup that
                # shows whether the node is on-link; neighbour for the node;
                # nftables table; other interfaces' addresses; whether the
                # node was resolved on the LAN.
                self.bind(netns=netns, mac_of_pod=MAC)
                # Requests on the node: whether break0 is ours; neighbour;
                # guard entry; route and neighbour. Requests in the pod: its
                # interface; addresses; nftables table; our routes and
                # neighbours.
                self.unbind()
            return sent

        self.bind(OTHER_POD)
        messages()  # fills the caches
        few = messages()
        # Only the last change of each request is acknowledged. A batch of
        # nftables begins and ends with a message of its own.
        self.assertEqual(
            ['26 0x1', '16 0x1', '2572 0x405', '17 0x1', '28 0x501',
             '24 0x605',
             '18 0x1', '26 0x1', '28 0x505', '2564 0x1', '16 0x1',
             '2560 0x601', '2563 0x401', '2566 0xc05', '17 0x1', '22 0x301',
             '30 0x1',
             '18 0x1', '30 0x1', '16 0x1', '2574 0x5', '17 0x1', '25 0x1',
             '29 0x5',
             '18 0x1', '22 0x301', '2561 0x1', '16 0x1', '2562 0x5', '17 0x1',
             '26 0x301', '26 0x301', '30 0x301', '29 0x5'], few)
        batch = ''.join('route add %(to)s dev break0 proto 176\n'
                        'neigh add %(to)s dev break0 lladdr %(mac)s\n' %
                        {'to': '10.0.%d.%d' % divmod(number, 250), 'mac': MAC}
                        for number in range(1000))
        with open('/run/batch', 'w') as file:
            file.write(batch)
        self.lab.run('ip', '-batch', '/run/batch')
        self.assertEqual(few, messages())

    def test_others_wait_once(self) -> None:
        netns = self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(OTHER_POD)
        with mock.patch.object(ledger.Ledger, 'lock', autospec=True,
                               side_effect=ledger.Ledger.lock) as lock:
            self.bind(netns=netns, mac_of_pod=MAC)
            lock.assert_called_once()
            lock.reset_mock()
            self.unbind()
            lock.assert_called_once()


class TestOwnership(base.LabTestCase):

    def test_another_owner_cannot_unbind(self) -> None:
        self.bind()
        self.unbind(owner=OTHER_OWNER)
        self.assertIn(POD, self.lab.routes())
        self.assertEqual({POD}, self.bound())

    def test_an_address_belongs_to_its_last_owner(self) -> None:
        self.bind()
        self.bind(owner=OTHER_OWNER)
        self.unbind(owner=OWNER)
        self.assertIn(POD, self.lab.routes())
        self.unbind(owner=OTHER_OWNER)
        self.assertEqual({}, self.lab.routes())

    def test_another_interface_is_another_owner(self) -> None:
        self.bind()
        self.unbind(owner=base.Owner(OWNER.container_id, 'eth1'))
        self.assertIn(POD, self.lab.routes())


class TestReuse(base.LabTestCase):
    """A new pod has the address of an old one and another MAC address."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(owner=OWNER, mac_of_pod=MAC)
        self.assertTrue(self.lab.ping(POD))
        # Delete the interface explicitly: the kernel deletes a namespace with
        # a delay.
        self.lab.run('ip', 'link', 'del', lab.PARENT, netns='pod')
        self.lab.del_netns('pod')

    def next_pod(self) -> None:
        self.lab.add_pod('next', POD, mac=OTHER_MAC)
        self.bind(owner=OTHER_OWNER, mac_of_pod=OTHER_MAC)

    def test_after_its_unbind(self) -> None:
        self.unbind()
        self.next_pod()
        self.assertTrue(self.lab.ping(POD, cold=False))

    def test_without_an_unbind(self) -> None:
        self.next_pod()
        self.assertTrue(self.lab.ping(POD, cold=False))

    def test_the_kernel_alone_goes_on_with_the_old_one(self) -> None:
        # The control of the other two tests.
        self.lab.add_pod('next', POD, mac=OTHER_MAC)
        self.assertFalse(self.lab.ping(POD, cold=False))


class TestConnectionTracking(base.LabTestCase):
    """The node tracks connections, as with kube-proxy."""

    RULES = """
    table ip tracked {
        chain output {
            type nat hook output priority 0
            ip daddr 10.96.0.1 dnat to %s
        }
    }""" % POD

    def setUp(self) -> None:
        super().setUp()
        self.bind(owner=OWNER)
        self.bind(OTHER_POD, owner=OTHER_OWNER)
        rules = os.path.join('/run', 'rules')
        with open(rules, 'w') as file:
            file.write(self.RULES)
        self.lab.run('nft', '-f', rules)
        # By default the kernel forgets a tracked ping after 30 seconds.
        kernel.write_sysctl('netfilter/nf_conntrack_icmp_timeout', 3600)
        self.lab.add_pod('pod', POD)
        self.lab.add_pod('other', OTHER_POD)
        for address in (POD, OTHER_POD, '10.96.0.1'):
            self.assertTrue(self.lab.ping(address))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertEqual(3, self.tracked(POD))

    def tracked(self, address: str) -> int:
        """Return the number of tracked connections of an address."""
        with open('/proc/net/nf_conntrack') as file:
            return sum(any(field.endswith('=' + address)
                           for field in line.split()) for line in file)

    def test_an_unbind_ends_them(self) -> None:
        self.unbind()
        self.assertEqual(0, self.tracked(POD))
        self.assertEqual(1, self.tracked(OTHER_POD))

    def test_another_owner_does_not_get_them(self) -> None:
        self.bind(owner=OTHER_OWNER)
        self.assertEqual(0, self.tracked(POD))

    def test_the_same_owner_keeps_them(self) -> None:
        self.bind(owner=OWNER)
        self.assertEqual(3, self.tracked(POD))

    def test_the_end_of_an_earlier_owner_leaves_them(self) -> None:
        self.bind(owner=OTHER_OWNER, netns='/run/netns/other')
        self.bind(owner=OWNER, netns='/run/netns/pod')
        self.assertTrue(self.lab.ping('10.96.0.1'))
        self.bind(owner=OWNER, netns='/run/netns/pod')
        self.assertEqual(1, self.tracked(POD))
        self.unbind(owner=OTHER_OWNER)
        self.assertEqual(1, self.tracked(POD))
        self.unbind(owner=OWNER)
        self.assertEqual(0, self.tracked(POD))

    def test_connections_of_a_gone_owner_are_deleted(
            self) -> None:
        self.lab.run('ip', 'address', 'add', POD + '/24', 'dev', 'eth0',
                     netns='other')
        self.bind(owner=OTHER_OWNER, netns='/run/netns/other')
        self.bind(owner=OWNER, netns='/run/netns/pod')
        self.assertTrue(self.lab.ping('10.96.0.1'))
        self.lab.del_netns('pod')

        def is_removed() -> bool:
            self.manager().sync()
            return self.snapshot().live[base.addresses(POD)[0]].owner == (
                OTHER_OWNER)

        with self.assertLogs('kuryr_break0', 'INFO') as logs:
            lab.until(is_removed)
        self.assertIn('removed its claim on ' + POD, str(logs.output))
        self.assertEqual(0, self.tracked(POD))


class TestRefused(base.LabTestCase):

    def assert_refused(self, address: str, reason: str,
                       **overrides: object) -> None:
        with self.subTest(address=address):
            with self.assertRaises(exceptions.AddressRefused) as caught:
                self.bind(address, **overrides)
            self.assertIn(address, str(caught.exception))
            self.assertIn(reason, str(caught.exception))
            self.assertEqual({}, self.lab.routes())
            self.assertEqual(set(), self.bound())

    def test_not_a_host(self) -> None:
        for address, reason in (('224.0.0.9', 'multicast'),
                                ('ff02::1', 'multicast'),
                                ('0.0.0.0', 'unspecified'),
                                ('::', 'unspecified'),
                                ('127.0.0.2', 'loopback'),
                                ('::1', 'loopback'),
                                ('169.254.169.254', 'link-local'),
                                ('fe80::1', 'link-local'),
                                ('255.255.255.255', 'reserved'),
                                ('240.0.0.1', 'reserved'),
                                ('0.1.2.3', 'reserved'),
                                ('::ffff:644b:1e47', 'IPv4-mapped')):
            self.assert_refused(address, reason)

    def test_broadcast_of_the_nodes_subnet(self) -> None:
        self.assert_refused('100.75.30.255', 'not a host address')

    def test_of_the_node(self) -> None:
        self.lab.run('ip', 'address', 'add', '192.0.2.1/32', 'dev', 'lo')
        self.lab.run('ip', 'address', 'add', 'fd00::51/64', 'dev',
                     lab.PARENT, 'nodad')
        for address in (lab.NODE, '192.0.2.1', 'fd00::51'):
            self.assert_refused(address, 'the node itself')

    def test_next_hops(self) -> None:
        self.lab.run('ip', 'route', 'add', '192.0.2.0/24',
                     'nexthop', 'via', '100.75.30.2',
                     'nexthop', 'via', '100.75.30.3')
        self.lab.run('ip', 'address', 'add', 'fd00::51/64', 'dev',
                     lab.PARENT, 'nodad')
        self.lab.run('ip', 'route', 'add', 'default', 'via', 'fd00::1')
        self.lab.run('ip', 'route', 'add', '198.51.100.0/24',
                     'via', 'inet6', 'fd00::2', 'dev', lab.PARENT)
        self.lab.run('ip', 'route', 'add', '203.0.113.0/24', 'via',
                     '100.75.30.4', 'table', '77')
        kernel.write_sysctl('ipv4/nexthop_compat_mode', 0)
        for nexthop in ('1 via 100.75.30.5 dev eth0', '2 via fd00::3 dev eth0',
                        '3 via fd00::4 dev eth0', '4 group 2/3'):
            self.lab.run('ip', 'nexthop', 'add', 'id', *nexthop.split())
        self.lab.run('ip', 'route', 'add', '10.9.0.0/24', 'nhid', '1')
        self.lab.run('ip', 'route', 'add', 'fd09::/64', 'nhid', '4')
        for address in (lab.LAN, '100.75.30.2', '100.75.30.3',
                        '100.75.30.4', '100.75.30.5', 'fd00::1', 'fd00::2',
                        'fd00::3', 'fd00::4'):
            self.assert_refused(address, 'a next hop')

    def test_too_many_at_once(self) -> None:
        many = ['10.0.%d.%d' % (each // 250, each % 250 + 1)
                for each in range(1000)]
        with self.assertRaises(exceptions.InputRefused):
            self.bind(POD, *many)
        self.bind(POD, OTHER_POD)
        # The DEL of the refused pod must hold the lock for its bound addresses
        # only.
        with self.assertLogs('kuryr_break0.engine.transaction',
                             'INFO') as logs:
            self.unbind(*many, POD)
        self.assertEqual(1, len(logs.output), logs.output)
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))

    def test_a_pod_that_is_a_next_hop(self) -> None:
        self.bind(POD, 'fd00:30::71')
        self.lab.run('ip', 'route', 'add', '192.0.2.0/24', 'via', POD)
        self.lab.run('ip', 'route', 'add', 'fd02::/64', 'via', 'fd00:30::71')
        self.bind(OTHER_POD, owner=OTHER_OWNER)
        self.lab.run('ip', 'route', 'add', '198.51.100.0/24',
                     'nexthop', 'via', POD, 'nexthop', 'via', OTHER_POD)
        self.lab.run('ip', 'nexthop', 'add', 'id', '1', 'via', POD, 'dev',
                     'break0')
        self.assertFalse(self.manager().sync())
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind(POD, 'fd00:30::71')
        self.assertLessEqual({POD, 'fd00:30::71'}, set(self.lab.routes()))

    def test_outside_the_allowed(self) -> None:
        allowed = {'allowed_cidrs': ['100.75.30.64/26', 'fd00:1::/64']}
        self.assert_refused('10.96.0.1', 'allowed_cidrs', **allowed)
        self.assert_refused('100.75.30.60', 'allowed_cidrs', **allowed)
        self.bind(POD, 'fd00:1::5', **allowed)
        self.assertEqual({POD, 'fd00:1::5'}, set(self.lab.routes()))


class TestLedgerAndLock(base.LabTestCase):

    def test_an_unwritable_state_dir_costs_no_route(self) -> None:
        with open('/run/occupied', 'w'):
            pass
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.bind(state_dir='/run/occupied')
        self.assertIn(POD, self.lab.routes())
        self.assertIn('/run/occupied', '\n'.join(logs.output))
        # Without a record, the MAC address identifies the pod's route.
        self.bind(state_dir='/run/occupied', mac_of_pod=MAC)
        manager = self.manager(state_dir='/run/occupied')
        manager.unbind(OWNER, base.addresses(POD), mac=OTHER_MAC)
        self.assertIn(POD, self.lab.routes())
        manager.unbind(OWNER, base.addresses(POD), mac=MAC)
        self.assertEqual({}, self.lab.routes())

    def test_the_first_bind_after_a_boot(self) -> None:
        self.bind(POD)
        # The state directory survives the boot. The old claim of POD must not
        # make the new bind yield.
        found = ledger.Ledger('/run/kuryr-break0')
        identity = found.ensure_identity()
        found.put_identity(dataclasses.replace(identity, boot='earlier'))
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager().bind(OTHER_OWNER, base.addresses(POD, OTHER_POD),
                            parent=lab.PARENT, yielding=True)
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.assertEqual({OTHER_OWNER}, {
            claim.owner for claims in self.snapshot().contents.claims.values()
            for claim in claims})
        self.assertFalse(self.manager().sync())
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))

    def test_the_state_dir_is_for_root_alone(self) -> None:
        self.bind()
        self.assertEqual(0o700,
                         os.stat('/run/kuryr-break0').st_mode & 0o777)

    def test_waiting_ends(self) -> None:
        ready, tell = os.pipe()

        def hold() -> None:
            with self.manager()._ledger.lock():
                os.write(tell, b'x')
                time.sleep(1000)

        pid = base.in_child(hold)
        self.addCleanup(os.close, ready)
        self.addCleanup(os.close, tell)
        os.read(ready, 1)
        # A bind works without the lock; an unbind needs it.
        impatient = mock.patch.object(
            ledger.Ledger.__init__, '__defaults__', (1,))
        impatient.start()
        self.addCleanup(impatient.stop)
        with self.assertLogs('kuryr_break0.engine.transaction',
                             'ERROR') as logs:
            self.bind()
        self.assertIn('/run/kuryr-break0/lock', '\n'.join(logs.output))
        self.assertIn(POD, self.lab.routes())
        self.assertEqual({POD}, self.bound())
        with self.assertRaises(exceptions.LockTimeout):
            self.unbind()
        self.assertIn(POD, self.lab.routes())
        os.kill(pid, 9)
        base.wait_for(pid)
        self.bind()  # the kernel releases the lock of a killed process
        self.assertIn(POD, self.lab.routes())

    def test_killed_after_any_step_of_bind(self) -> None:
        # If a live pod's route had no record, nothing would ever delete the
        # route.
        for owner, name in ((records.Records, 'put'),
                            (kernel.Netlink, 'change')):
            original = getattr(owner, name)

            def then_die(*args: object, original: Any = original) -> None:
                original(*args)
                base.die()

            with self.subTest(after=name):
                with mock.patch.object(owner, name, then_die):
                    pid = base.in_child(self.bind)
                self.assertEqual(-9, base.wait_for(pid))
                self.assertEqual({POD}, self.bound())
                self.unbind()
                self.assertEqual({}, self.lab.routes())


class TestStatus(base.LabTestCase):

    def test_without_break0(self) -> None:
        self.assertEqual({}, self.snapshot().parents)
        self.assertEqual([], self.problems())

    def test_in_sync_and_not(self) -> None:
        self.bind(POD, OTHER_POD)
        self.assertEqual([], self.problems())
        self.lab.run('ip', 'route', 'del', POD)
        self.lab.run('ip', 'route', 'add', '100.75.30.73', 'dev', 'break0',
                     'proto', '176')
        seen = self.snapshot()
        self.assertEqual({POD, OTHER_POD}, set(map(str, seen.live)))
        self.assertEqual(
            {POD: 'its route is missing',
             '100.75.30.73': 'no container claims it'},
            {str(address): problem for address, problem
             in problems.by_address(problems.find(seen)).items()})
