# SPDX-License-Identifier: Apache-2.0

"""Tests Kuryr's pods with IPv4 and IPv6, several subnets and interfaces."""

from __future__ import annotations

import json

from tests.e2e.base import DaemonTestCase
from tests.support import kuryr
from tests.support import lab

POD = '100.75.30.71'
POD6 = 'fd00:30::71'
FAR = '100.75.40.71'
FAR6 = 'fd00:40::71'
NEAR_SUBNETS = ['100.75.30.0/24', 'fd00:30::/64']
FAR_SUBNETS = ['100.75.40.0/24', 'fd00:40::/64']


class TestPaths(DaemonTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.node.lab.add_ipv6()
        self.node.lab.add_other_subnet()
        with open('/proc/sys/net/ipv4/conf/all/rp_filter', 'w') as file:
            file.write('1')
        self.node.start_daemon()

    def assert_paths(self, pod: kuryr.Pod, *addresses: str) -> None:
        """Assert that node and pod reach each other at each address."""
        self.node.lab.settle()
        self.assertLessEqual(set(addresses), set(self.node.lab.routes()))
        for address in addresses:
            node = lab.NODE6 if ':' in address else lab.NODE
            with self.subTest(address=address):
                self.assertTrue(self.node.lab.ping(address), 'to the pod')
                self.assertTrue(self.node.lab.ping(node, pod.name),
                                'from the pod')

    def live(self, vif: object, *addresses: str, **extra: object) -> None:
        """Run a pod by kuryr-cni, from ADD to DEL, and check its paths."""
        pod = self.node.add_pod('pod', vif=vif, extra_vifs=extra)
        done = self.node.cni(pod, 'ADD')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual('0.3.1', json.loads(done.stdout)['cniVersion'])
        self.assert_paths(pod, *addresses)
        done = self.node.cni(pod, 'DEL')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual({}, self.node.lab.routes())

    def test_dual_stack(self) -> None:
        self.live(kuryr.macvlan_vif(POD, POD6, subnets=NEAR_SUBNETS),
                  POD, POD6)

    def test_dual_stack_in_another_subnet(self) -> None:
        self.live(kuryr.macvlan_vif(FAR, FAR6, subnets=FAR_SUBNETS),
                  FAR, FAR6)

    def test_ipv6_alone(self) -> None:
        self.live(kuryr.macvlan_vif(POD6, subnets=NEAR_SUBNETS[1:]), POD6)

    def test_several_addresses_in_several_subnets(self) -> None:
        self.live(kuryr.macvlan_vif(
            POD, '100.75.30.72', POD6, FAR, FAR6,
            subnets=NEAR_SUBNETS + FAR_SUBNETS),
            POD, '100.75.30.72', POD6, FAR, FAR6)

    def test_an_additional_interface(self) -> None:
        self.live(kuryr.macvlan_vif(POD, POD6, subnets=NEAR_SUBNETS),
                  POD, POD6, FAR, FAR6,
                  eth1=kuryr.macvlan_vif(FAR, FAR6, subnets=FAR_SUBNETS))
