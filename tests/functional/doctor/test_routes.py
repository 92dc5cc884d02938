# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import OTHER6
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.functional.doctor.base import SUBNETS
from tests.support import lab


class TestRoutes(DoctorTestCase):

    def test_missing(self) -> None:
        self.lab.run('ip', 'route', 'del', POD4)
        self.lab.run('ip', 'route', 'del', OTHER6)
        finding = self.assert_found('route-missing', 'table 254', POD4,
                                    OTHER6, severity='error')
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_changed(self) -> None:
        self.lab.run('ip', 'address', 'add', '100.75.30.52/24', 'dev',
                     lab.PARENT)
        self.lab.run('ip', 'route', 'replace', POD4, 'dev', 'break0',
                     'proto', '176', 'scope', 'link', 'src', '100.75.30.52')
        # The pods have no neighbour entry for the address either.
        found = self.findings()
        self.assertEqual(['route-wrong', 'pod-not-configured'], list(found))
        self.assertEqual([POD4], found['route-wrong']['subjects'])
        self.assertIn('has the source 100.75.30.52, not 100.75.30.51',
                      found['route-wrong']['seen'])
        self.follow(found['route-wrong'])
        self.assertEqual({}, self.findings())

    def test_changed_protocol(self) -> None:
        self.lab.run('ip', 'route', 'replace', POD4, 'dev', 'break0',
                     'scope', 'link', 'src', lab.NODE)
        self.follow(self.assert_found('route-wrong', 'the protocol 3, not 176',
                                      POD4))
        self.assertEqual({}, self.findings())

    def test_foreign(self) -> None:
        self.lab.run('ip', 'route', 'replace', POD4, 'dev', 'lo')
        finding = self.assert_found('route-foreign', 'protocol boot', POD4)
        self.assertEqual('ip route del %s dev lo proto boot table 254' % POD4,
                         finding['commands'][0])
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_foreign_and_preferred(self) -> None:
        # Our route has metric 1, the lowest metric. So a foreign route is
        # preferred only if it replaces ours.
        self.lab.run('ip', 'route', 'replace', POD6, 'dev', 'lo', 'metric',
                     '1')
        finding = self.assert_found('route-foreign', 'through lo with', POD6)
        self.assertFalse(self.lab.ping(POD6))
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_stale(self) -> None:
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0',
                     'proto', '176', 'scope', 'link')
        self.follow(self.assert_found('route-stale', '', '100.75.30.99',
                                      severity='warning'))
        self.assertEqual({}, self.findings())

    def test_foreign_routes_on_break0(self) -> None:
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0')
        self.assertEqual({}, self.findings())

    def test_a_rule_in_the_way(self) -> None:
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN,
                     'table', '100')
        self.lab.run('ip', 'rule', 'add', 'to', POD4, 'table', '100')
        self.assert_found('route-not-used', 'by table 100', POD4)
        self.assertFalse(self.lab.ping(POD4))

    def test_a_rule_in_the_way_of_answers(self) -> None:
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN,
                     'table', '100')
        self.lab.run('ip', 'rule', 'add', 'from', lab.NODE, 'table', '100')
        finding = self.assert_found('route-not-used', '', POD4, OTHER4)
        self.assertIn('ip route get %s from %s' % (POD4, lab.NODE),
                      finding['commands'])
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))

    def test_an_address_that_is_local(self) -> None:
        """The doctor finds a pod's address that is local to the node.

        A load balancer or an interface's leftover address makes an address
        local.
        """
        self.lab.run('ip', 'route', 'add', 'local', POD4, 'dev', 'lo',
                     'table', 'local')
        finding = self.assert_found(
            'route-not-used', 'a local address of the node', POD4)
        shown = [self.lab.run('sh', '-c', command).stdout
                 for command in finding['commands']]
        self.assertIn('local %s dev lo' % POD4, ''.join(shown))

    def test_a_more_preferred_table(self) -> None:
        self.lab.run('ip', 'route', 'add', 'unreachable', POD4, 'table',
                     '100')
        self.lab.run('ip', 'rule', 'add', 'pref', '10', 'table', '100')
        self.assert_found('route-not-used', 'no route to it', POD4)

    def test_no_rule_to_the_table(self) -> None:
        for name, owner, addresses in (('pod', base.OWNER, (POD4, POD6)),
                                       ('other', OTHER_OWNER,
                                        (OTHER4, OTHER6))):
            self.bind(*addresses, owner=owner, mac_of_pod=MACS[name],
                      netns='/run/netns/' + name, subnets=SUBNETS,
                      route_table=100)
            for address in addresses:
                self.lab.run('ip', 'route', 'del', address, 'table', 'main')
        options = {'route_table': 100}
        self.assert_found('route-not-used', '', POD4, OTHER4, POD6, OTHER6,
                          **options)
        for family in ('-4', '-6'):
            self.lab.run('ip', family, 'rule', 'add', 'table', '100')
        self.assertEqual({}, self.findings(**options))

    def test_neighbour_missing(self) -> None:
        self.lab.run('ip', 'neigh', 'del', POD6, 'dev', 'break0')
        self.follow(self.assert_found('neighbour-missing', '', POD6,
                                      severity='warning'))
        self.assertEqual({}, self.findings())

    def test_neighbour_wrong(self) -> None:
        self.lab.run('ip', 'neigh', 'replace', POD4, 'lladdr',
                     MACS['other'], 'dev', 'break0', 'nud', 'permanent')
        self.follow(self.assert_found('neighbour-wrong', MACS['pod'], POD4))
        self.assertEqual({}, self.findings())

    def test_neighbour_stale(self) -> None:
        self.lab.run('ip', 'neigh', 'add', '100.75.30.99', 'lladdr',
                     MACS['other'], 'dev', 'break0', 'nud', 'permanent',
                     'protocol', '176')
        self.follow(self.assert_found('neighbour-stale', '', '100.75.30.99'))
        self.assertEqual({}, self.findings())

    def test_an_address_of_the_node(self) -> None:
        self.lab.run('ip', 'link', 'add', 'br0', 'type', 'bridge')
        self.lab.run('ip', 'address', 'add', OTHER4 + '/32', 'dev', 'br0')
        self.assert_found('address-refused', 'of the node itself', OTHER4)

    def test_a_next_hop(self) -> None:
        self.lab.run('ip', 'route', 'add', '10.9.0.0/16', 'via', OTHER4,
                     'dev', lab.PARENT)
        self.assert_found('address-refused', 'next hop', OTHER4)

    def test_a_next_hop_that_is_a_pod(self) -> None:
        for beyond in ('10.9.0.0/16', '192.0.2.1'):
            self.lab.run('ip', 'route', 'add', beyond, 'via', OTHER4)
        self.assertEqual({}, self.findings())

    def test_not_allowed(self) -> None:
        self.assert_found(
            'address-not-allowed', 'allowed_cidrs', OTHER4,
            allowed_cidrs=[POD4 + '/32', 'fd00:30::/64'])
