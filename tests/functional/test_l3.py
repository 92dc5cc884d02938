# SPDX-License-Identifier: Apache-2.0

"""A pod's addresses and routes, as set by break0 and by Kuryr."""

from __future__ import annotations

import copy
import ipaddress
from typing import Any, Optional
from unittest import mock
import uuid

from kuryr_kubernetes.cni.binding import base as b_base
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes import objects
import os_vif
from os_vif.objects import instance_info
from os_vif.objects import route as osv_route

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kuryr import patches
from kuryr_break0.kuryr import vif as break0_vif
from tests.functional import base
from tests.support import kuryr
from tests.support import lab

MAC = 'fa:16:3e:00:00:71'
POD4, POD6 = '100.75.30.71', 'fd00:30::71'
FAR4 = '100.75.40.71'
SUBNETS = [lab.LAN + '/24', lab.LAN6 + '/64', lab.OTHER_LAN + '/24']


class L3TestCase(base.LabTestCase):

    maxDiff = 4000

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        k_config.CONF([], project='kuryr', default_config_files=[])
        config.register(k_config.CONF)
        for group, name, value in (
                ('binding', 'link_iface', lab.PARENT),
                (config.GROUP, 'pod_binding', config.AUTO)):
            k_config.CONF.set_override(name, value, group=group)
            self.addCleanup(k_config.CONF.clear_override, name, group=group)
        objects.register_locally_defined_vifs()
        os_vif.initialize()
        # A replacement of _configure_l3 stays until Kuryr configures a VIF.
        # The driver alone configures no VIF, so an earlier test may have left
        # a replacement in this process.
        b_base._configure_l3 = patches._configure_l3

    def connect(self, vif: Any, name: str, is_default: bool = True,
                prepare: tuple[str, ...] = ()) -> Optional[str]:
        """Bind a pod in a child; return the name of the error, or None."""
        self.lab.add_netns(name)
        for command in prepare:
            self.lab.run(*command.split(), netns=name)
        info = instance_info.InstanceInfo(uuid=str(uuid.uuid4()), name=name)
        refusal = '/run/refusal-' + name

        def connect() -> None:
            try:
                b_base.connect(vif, info, 'eth0', netns='/run/netns/' + name,
                               is_default_gateway=is_default,
                               container_id='c' * 12)
            except Exception as err:
                with open(refusal, 'w') as file:
                    file.write(type(err).__name__)

        self.assertEqual(0, base.wait_for(base.in_child(connect)))
        try:
            with open(refusal) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def pod(self, name: str) -> dict[str, Any]:
        """Return a pod's routes, interfaces and disable_ipv6 sysctls.

        Indices, counters and lifetimes are omitted, since they differ.
        """
        self.lab.settle()
        found: dict[str, Any] = {}
        for family in ('-4', '-6'):
            found['routes ' + family] = sorted((
                {key: value for key, value in route.items()
                 if key not in ('expires',)} for route in self.lab.ip(
                    family, 'route', 'show', 'table', 'all', netns=name)
                if not (route.get('protocol') == '176')), key=str)
        for link in self.lab.ip('address', netns=name):
            link = copy.deepcopy(link)
            for key in ('ifindex', 'link_index', 'link_netnsid', 'txqlen',
                        'promiscuity', 'allmulti'):
                link.pop(key, None)
            # IPDB sets the addresses in the order of a Python set.
            link['addr_info'].sort(key=str)
            found[link['ifname']] = link
        found['disable_ipv6'] = self.lab.run(
            'sysctl', '-a', '--pattern', 'disable_ipv6', netns=name).stdout
        return found

    def compare(self, *addresses: str, is_default: bool = True,
                routes: tuple[tuple[str, str], ...] = (),
                prepare: tuple[str, ...] = ()) -> dict[str, Any]:
        """Bind a pod by Kuryr and a pod by break0, and expect equal pods."""
        stock = kuryr.macvlan_vif(*addresses, mac=MAC, subnets=SUBNETS)
        for subnet in stock.network.subnets.objects:
            for cidr, gateway in routes:
                if ipaddress.ip_network(cidr).version == (
                        subnet.cidr.version):
                    subnet.routes.objects.append(osv_route.Route(
                        cidr=cidr, gateway=gateway))
        ours = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', stock.obj_to_primitive())
        pods = []
        for name, vif in (('stock', stock), ('ours', ours)):
            def is_bound() -> bool:
                refused = self.connect(vif, name, is_default, prepare)
                found.append((refused, self.pod(name)))
                self.lab.del_netns(name)
                self.lab.until_free(MAC)
                # IPDB sometimes fails with a RuntimeError.
                return refused != 'RuntimeError'

            found: list[tuple[Optional[str], Any]] = []
            lab.until(is_bound)
            pods.append(found[-1])
        self.assertEqual(*pods)
        self.assertIsNone(pods[1][0])
        return pods[1][1]


class TestSameAsKuryr(L3TestCase):

    def test_one_family(self) -> None:
        pod = self.compare(POD4)
        self.assertEqual(POD4, pod['eth0']['addr_info'][0]['local'])
        self.compare(POD6)

    def test_both_families(self) -> None:
        pod = self.compare(POD4, POD6)
        self.assertEqual(2, sum(route['dst'] == 'default' for family in
                                ('routes -4', 'routes -6')
                                for route in pod[family]))

    def test_several_subnets(self) -> None:
        """All addresses of several subnets are set.

        The test does not run Kuryr, which fails in some processes: the success
        of Kuryr depends on the order of iteration of IPDB's set of addresses.
        """
        vif = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', kuryr.macvlan_vif(
                POD4, FAR4, POD6, mac=MAC, subnets=SUBNETS
            ).obj_to_primitive())
        self.assertIsNone(self.connect(vif, 'ours'))
        pod = self.pod('ours')
        self.assertEqual(
            {(POD4, 24), (FAR4, 24), (POD6, 64)},
            {(each['local'], each['prefixlen'])
             for each in pod['eth0']['addr_info']
             if each['scope'] == 'global'})
        # Kuryr also takes the first gateway of a family as the default.
        self.assertEqual(
            [lab.LAN], [route['gateway'] for route in pod['routes -4']
                        if route['dst'] == 'default'])

    def test_not_the_default_gateway(self) -> None:
        pod = self.compare(POD4, POD6, is_default=False)
        self.assertNotIn("'dst': 'default'", str(pod))

    def test_routes(self) -> None:
        self.compare(POD4, POD6, routes=(
            ('10.9.0.0/16', lab.LAN), ('10.8.0.1/32', lab.LAN),
            ('fd00:9::/48', lab.LAN6)))

    def test_default_route_that_is_there(self) -> None:
        self.compare(POD4, prepare=(
            'ip link add other type veth peer name other2',
            'ip link set other addrgenmode none',
            'ip link set other2 addrgenmode none',
            'ip link set other address 02:00:00:00:00:01',
            'ip link set other2 address 02:00:00:00:00:02',
            'ip link set other up', 'ip link set other2 up',
            'ip address add 10.1.1.1/24 dev other',
            'ip route add default via 10.1.1.2'))

    def test_ipv6_is_disabled(self) -> None:
        self.compare(POD4, POD6, prepare=(
            'sysctl -w net.ipv6.conf.all.disable_ipv6=1',
            'sysctl -w net.ipv6.conf.default.disable_ipv6=1'))


class TestErrors(L3TestCase):

    def test_gateway_that_cannot_be_reached(self) -> None:
        stock = kuryr.macvlan_vif(POD4, mac=MAC)
        subnet, = stock.network.subnets.objects
        subnet.gateway = '10.1.1.1'
        ours = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', stock.obj_to_primitive())
        self.assertEqual('NetlinkError', self.connect(stock, 'stock'))
        # kuryr-daemon answers PodNotConnected with "try again later".
        self.assertEqual('PodNotConnected', self.connect(ours, 'ours'))

    def test_again_after_a_first_try(self) -> None:
        vif = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', kuryr.macvlan_vif(
                POD4, POD6, mac=MAC, subnets=SUBNETS).obj_to_primitive())
        self.assertIsNone(self.connect(vif, 'ours'))
        before = self.pod('ours')
        with kernel.enter_namespace('/run/netns/ours'), \
                kernel.Netlink() as netlink:
            netlink.configure('eth0', [
                ipaddress.ip_interface(POD4 + '/24')], [
                    (ipaddress.ip_network('0.0.0.0/0'),
                     ipaddress.ip_address(lab.LAN))])
            with self.assertRaises(exceptions.KernelRefused):
                netlink.configure('nope', [], [])
        self.assertEqual(before, self.pod('ours'))

    def test_another_vif_comes_first(self) -> None:
        """The next call of _configure_l3 ends a replacement.

        The call uses the replacement only for the VIF of the replacement.
        """
        stock = kuryr.macvlan_vif(POD4, mac=MAC)
        ours = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
            None, '1.0', stock.obj_to_primitive())
        for order, expected in (
                ([ours, ours, stock], ([ours, stock], [ours])),
                ([stock, ours], ([stock, ours], []))):
            by_kuryr: list[object] = []
            by_break0: list[object] = []
            with mock.patch.object(patches, '_configure_l3',
                                   lambda *args: by_kuryr.append(args[0])), \
                    mock.patch.object(b_base, '_configure_l3',
                                      patches._configure_l3):
                patches.replace_configure_l3(
                    lambda *args: by_break0.append(args[0]), ours)
                for each in order:
                    b_base._configure_l3(each, 'eth0', '/run/netns/no', True)
            self.assertEqual(expected, (by_kuryr, by_break0))
