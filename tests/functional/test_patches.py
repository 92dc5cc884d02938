# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import socket
import subprocess
import sys
import textwrap
from unittest import mock

from kuryr_kubernetes.cni.binding import base as b_base
import pyroute2

from kuryr_break0.kernel import ipdb
from kuryr_break0.kuryr import patches
from tests.functional import base
from tests.functional.base import POD
from tests.functional import driver_base
from tests.support import lab


class TestView(driver_base.DriverTestCase):

    def test_interfaces_and_addresses_equal_the_node(self) -> None:
        self.lab.add_ipv6()
        self.lab.settle()
        # IPDB offers interfaces as attributes. These names are no identifiers,
        # are numbers, or are attributes of IPDB itself.
        names = ['a.b@c', '17', 'routes', 'x' * 15, 'é', '-', 'None']
        for number, name in enumerate(names):
            self.lab.run('ip', 'link', 'add', 'name', name, 'type', 'veth',
                         'peer', 'name', 'peer-%d' % number)
        self.connect()
        with patches.read_interfaces_only(), b_base.get_ipdb() as ipdb:
            found = {name: (link['index'], link['mtu'], link['flags'],
                            {address for address, _ in link['ipaddr']})
                     for name, link in ipdb.by_name.items()}
        self.assertEqual({'lo', 'eth0', 'break0', *names} | {
            'peer-%d' % number for number in range(len(names))}, set(found))
        for link in self.lab.ip('address', 'show'):
            index, mtu, _, addresses = found[link['ifname']]
            self.assertEqual(
                (link['ifindex'], link['mtu'],
                 {each['local'] for each in link['addr_info']}),
                (index, mtu, addresses))

    def test_neither_routes_nor_neighbours(self) -> None:
        self.connect()
        with b_base.get_ipdb() as ipdb:
            index = ipdb.interfaces['break0'].index
            self.assertIn(POD, ipdb.neighbours[index])
            self.assertIn(POD + '/32', ipdb.routes)
        with patches.read_interfaces_only(), b_base.get_ipdb() as ipdb:
            self.assertNotIn(POD, ipdb.neighbours.get(index, ()))
            self.assertFalse(hasattr(ipdb, 'routes'))
            self.assertFalse(hasattr(ipdb, 'rules'))

    def test_the_ipdb_of_a_pod_is_whole(self) -> None:
        self.connect()
        b_base._configure_l3(self.vif, 'eth0', self.netns, True)
        with patches.read_interfaces_only(), \
                b_base.get_ipdb(self.netns) as ipdb:
            self.assertIs(pyroute2.IPDB, type(ipdb))
            self.assertIn(lab.LAN, [route.gateway for route in ipdb.routes])

    def test_it_is_undone(self) -> None:
        stock = b_base.get_ipdb
        with self.assertRaises(ZeroDivisionError), \
                patches.read_interfaces_only():
            self.assertIsNot(stock, b_base.get_ipdb)
            with patches.read_interfaces_only():
                self.assertIsNot(stock, b_base.get_ipdb)
            self.assertIsNot(stock, b_base.get_ipdb)
            raise ZeroDivisionError
        self.assertIs(stock, b_base.get_ipdb)
        self.connect()
        self.disconnect()
        self.assertIs(stock, b_base.get_ipdb)

    def test_the_parent_that_kubelet_listens_on(self) -> None:
        # Kuryr finds this parent by its addresses.
        driver_base.set_options(self, 'binding', link_iface='')
        self.lab.run('ip', 'link', 'add', 'a-first', 'type', 'veth',
                     'peer', 'name', 'a-second')
        self.lab.run('ip', 'link', 'set', 'a-second', 'up')
        self.lab.run('ip', 'link', 'set', 'a-first', 'up')
        self.lab.run('ip', 'address', 'add', '10.9.0.1/24', 'dev', 'a-first')
        with socket.create_server(('10.9.0.1', 10250)):
            self.connect()
        self.assertEqual(self.lab.link('a-first')['ifindex'],
                         self.pod_links()['eth0']['link_index'])


class TestNotAsExpected(driver_base.DriverTestCase):
    """Without our patches, Kuryr binds more slowly, but loses no pod."""

    def test_pyroute2_has_changed(self) -> None:
        with mock.patch.object(ipdb, 'ipdb_interfaces', object()), \
                self.assertLogs('kuryr_break0.kernel', 'DEBUG') as logs:
            self.connect()
        self.assertIn("no attribute 'spec'", logs.output[0])
        self.assertIn(POD, self.lab.routes())

    def test_kuryr_has_changed(self) -> None:
        other = mock.Mock(wraps=b_base.get_ipdb)
        with mock.patch.object(b_base, 'get_ipdb', other):
            self.connect()
            self.assertIs(other, b_base.get_ipdb)
        self.assertIn(mock.call(), other.mock_calls)
        self.assertIn(POD, self.lab.routes())


class TestCost(driver_base.DriverTestCase):

    PROGRAM = '''
        from kuryr_break0.kernel import ipdb
        from kuryr_break0.kuryr import vif as break0_vif
        from kuryr_break0.ledger import cache
        from kuryr_kubernetes.cni.binding import base as b_base
        from kuryr_kubernetes import config
        import os
        import sys
        from tests.support import kuryr
        cache.MAX_AGE = 0  # as after a while without an ADD
        config.CONF([], project='kuryr', default_config_files=[])
        config.CONF.set_override('link_iface', 'eth0', group='binding')
        vif = kuryr.macvlan_vif(
            '100.75.30.71', 'fd00:30::71', mac='fa:16:3e:00:00:01',
            subnets=['100.75.30.0/24', 'fd00:30::/64'])
        if sys.argv[1] == 'break0':
            vif = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
                None, '1.0', vif.obj_to_primitive())
            ipdb.preload()  # as kuryr-daemon does it
        os.write(2, b'begins')  # sys.stderr waits for the end of the line
        for work in (b_base.connect, b_base.disconnect):
            work(vif, None, 'eth0', netns='/run/netns/pod',
                 container_id='c' * 32)
    '''

    def trace(self, driver: str) -> str:
        """Return the traced system calls of an ADD and a DEL of a pod."""
        return subprocess.run(
            ['strace', '--follow-forks', '--decode-fds=socket', '--output',
             '/dev/stdout', '--trace=recvfrom,recvmsg,execve,write',
             sys.executable, '-W', 'ignore', '-c',
             textwrap.dedent(self.PROGRAM), driver],
            check=True, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL).stdout.split('"begins"', 1)[1]

    def read(self, driver: str) -> int:
        """Return the number of netlink bytes read in an ADD and a DEL."""
        return sum(map(int, re.findall(
            r'recv(?:from|msg).*NETLINK.* = (\d+)$', self.trace(driver),
            re.MULTILINE)))

    def test_no_program_is_run(self) -> None:
        # pyroute2 runs a program to find the C library.
        self.assertIn('execve(', self.trace('stock'))
        self.bind('10.75.0.1', owner=base.OTHER_OWNER)  # nft loads the guard
        self.assertNotIn('execve(', self.trace('break0'))

    def test_the_read_amount_does_not_grow_with_the_pods(self) -> None:
        self.lab.add_ipv6()
        self.lab.settle()
        self.read('break0')  # creates break0
        before = {each: self.read(each) for each in ('stock', 'break0')}
        self.bind(*('%s%d' % (net, host) for host in range(1, 251)
                    for net in ('10.75.0.', 'fd00:75::')),
                  owner=base.OTHER_OWNER, mac_of_pod='fa:16:3e:00:00:02')
        self.assertEqual(500, len(self.lab.routes()))
        growth = {each: self.read(each) - before[each]
                  for each in ('stock', 'break0')}
        self.assertGreater(growth['stock'], before['stock'])
        # The remaining growth depends on the time at which events arrive.
        self.assertLess(growth['break0'], growth['stock'] / 10)
