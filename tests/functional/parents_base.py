# SPDX-License-Identifier: Apache-2.0

"""The base of tests with two parents."""

from __future__ import annotations

from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import POD
from tests.support import lab

POD6 = 'fd00:30::71'
NODE1, NODE1_6 = '100.75.60.51', 'fd00:60::51'
POD1, POD1_6 = '100.75.60.71', 'fd00:60::71'
MAC, MAC1 = 'fa:16:3e:00:00:01', 'fa:16:3e:00:00:02'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
SUBNETS1 = ('100.75.60.0/24', 'fd00:60::/64')
OWNER1 = Owner('sandbox-1', 'eth1')


class ParentsTestCase(base.LabTestCase):
    """A pod with an interface on each of two NICs, in both families."""

    NIC = 'eth1'

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        run = self.lab.run
        self.add_nic()
        self.netns = self.lab.add_pod('pod', POD, POD6, mac=MAC)
        self.lab.add_macvlan('pod', 'eth1', mac=MAC1, parent=self.NIC)
        for netns, name, texts in ((None, self.NIC, (NODE1, NODE1_6)),
                                   ('pod', 'eth1', (POD1, POD1_6))):
            for text in texts:
                run('ip', 'address', 'add', text + ('/64' if ':' in text
                                                    else '/24'), 'dev', name,
                    *(('nodad',) if ':' in text else ()), netns=netns)
        self.bind_both()

    def add_nic(self) -> None:
        self.lab.run('ip', 'link', 'add', self.NIC, 'type', 'veth', 'peer',
                     'name', 'nic1', 'netns', 'lan')
        self.lab.run('ip', 'link', 'set', self.NIC, 'up')
        self.lab.run('ip', 'link', 'set', 'nic1', 'up', netns='lan')

    def bind_both(self) -> None:
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=MAC,
                  subnets=SUBNETS)
        self.bind(POD1, POD1_6, owner=OWNER1, parent=self.NIC,
                  netns=self.netns, mac_of_pod=MAC1, subnets=SUBNETS1)

    @property
    def device1(self) -> str:
        return 'break0-' + self.NIC

    def assert_answers(self, *addresses: str, name: str = 'pod') -> None:
        """Expect pods to answer the node, and the node to answer a pod."""
        for address in addresses or (POD, POD6, POD1, POD1_6):
            self.assertTrue(self.lab.ping(address), address)
        for address in (lab.NODE, lab.NODE6, NODE1, NODE1_6)[
                :len(addresses) or None]:
            self.assertTrue(self.lab.ping(address, name), address)

    def assert_reachable(self) -> None:
        self.assert_answers()
        self.assertEqual([], self.problems())
