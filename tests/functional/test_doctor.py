# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0.doctor import examination
from kuryr_break0.doctor import report
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests import lab

PROGRAM = os.path.join(os.path.dirname(sys.executable), 'kuryr-break0')
POD4, POD6 = '100.75.30.71', 'fd00:30::71'
OTHER4, OTHER6 = '100.75.30.72', 'fd00:30::72'
OWNER_79 = Owner('sandbox-79', 'eth0')
#: In another subnet on the link than the node.
FAR4 = '100.75.40.71'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
MACS = {'pod': '02:00:00:00:00:71', 'other': '02:00:00:00:00:72',
        'far': '02:00:00:00:00:73'}


class DoctorTestCase(base.LabTestCase):
    """A node with two bound pods of both families, and an agent."""

    static_neighbours = True

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.set_up_pods()
        # There, but it must not repair what the test has broken.
        attending = Ledger('/run/kuryr-break0', 10).attend()
        attending.__enter__()
        self.addCleanup(attending.__exit__, None, None, None)

    def set_up_pods(self) -> None:
        for name, owner, addresses in (
                ('pod', base.OWNER, (POD4, POD6)),
                ('other', OTHER_OWNER, (OTHER4, OTHER6))):
            path = self.lab.add_pod(name, *addresses, mac=MACS[name])
            self.bind(*addresses, owner=owner, netns=path,
                      mac_of_pod=MACS[name], subnets=SUBNETS,
                      static_neighbours=self.static_neighbours)

    def call(self, *args: str, code: int = 0,
             **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [PROGRAM, 'doctor', *args], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **environ})
        self.assertNotIn('Traceback', done.stderr)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done

    def findings(self, **overrides: Any) -> dict[str, Any]:
        """What the doctor finds with these options, by id."""
        conf = cfg.ConfigOpts()
        config.register(conf)
        conf([], default_config_files=[])
        for name, value in overrides.items():
            conf.set_override(name, value, group=config.GROUP)
        done = examination.examine(conf)
        self.assertIsNone(done.unreadable)
        found = {each.id: each for each in done.findings}
        self.assertEqual(len(done.findings), len(found), done.findings)
        return {name: json.loads(report.as_json([each]))['findings'][0]
                for name, each in found.items()}

    def assert_found(self, expected: str, seen: str = '', *subjects: str,
                     severity: str = '', **overrides: Any) -> dict[str, Any]:
        """It finds this, and nothing else."""
        found = self.findings(**overrides)
        self.assertEqual([expected], list(found), found)
        finding: dict[str, Any] = found[expected]
        self.assertIn(seen, finding['seen'])
        self.assertEqual(list(subjects), finding['subjects'])
        if severity:
            self.assertEqual(severity, finding['severity'])
        return finding

    def sysctl(self, name: str, value: int) -> None:
        self.lab.run('sysctl', '-w', 'net.%s=%d' % (name, value))

    def follow(self, finding: dict[str, Any]) -> None:
        """Do what it says."""
        for command in finding['commands']:
            if not command.startswith(('ip monitor', 'grep', 'ip rule')):
                self.lab.run('sh', '-c', 'PATH=%s:$PATH; %s' % (
                    os.path.dirname(PROGRAM), command))


class TestHealthy(DoctorTestCase):

    def test_nothing_is_found(self) -> None:
        agent = subprocess.Popen([PROGRAM, 'agent'],
                                 stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.send_signal, signal.SIGTERM)
        done = json.loads(self.call('--json').stdout)
        self.assertEqual([], done['findings'])
        self.assertEqual({'addresses': 4, 'looked_up': 4, 'pods': 2,
                          'entered': 2}, done['looked_at'])
        self.assertIn('Nothing is wrong.', self.call().stdout)
        self.assertTrue(self.lab.ping(POD4))
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))


class TestDevice(DoctorTestCase):

    def test_missing(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        finding = self.assert_found('break0-missing', 'no interface break0',
                                    severity='error')
        self.assertIn('kuryr-break0 sync', finding['commands'])
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_foreign(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth', 'peer',
                     'name', 'other')
        self.follow(self.assert_found('break0-foreign', 'is a veth'))
        self.assertEqual({}, self.findings())

    def test_another_mode(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'private')
        self.assert_found('break0-foreign', 'macvlan in private mode')

    def test_wrong_parent(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'other')
        self.lab.run('ip', 'link', 'add', 'break0', 'link', 'eth1', 'type',
                     'macvlan', 'mode', 'bridge')
        self.follow(self.assert_found('break0-wrong-parent', 'pods are on '
                                      'eth0'))
        self.assertEqual({}, self.findings())

    def test_down(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.follow(self.assert_found('break0-down'))
        self.assertEqual({}, self.findings())

    def test_mtu(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        self.follow(self.assert_found('break0-mtu', '1400'))
        self.assertEqual({}, self.findings())

    def test_mac(self) -> None:
        mac = '02:00:00:00:00:99'
        self.assert_found('break0-mac', mac, mac=mac)
        self.manager(mac=mac).sync()
        self.assertEqual({}, self.findings(mac=mac))

    def test_an_address_that_is_not_configured(self) -> None:
        self.lab.run('ip', 'address', 'add', '100.75.30.7/32', 'dev',
                     'break0')
        self.follow(self.assert_found('break0-addresses', 'not set',
                                      '100.75.30.7'))
        self.assertEqual({}, self.findings())

    def test_a_configured_address_is_missing(self) -> None:
        addr = ['100.75.30.7', '100.75.30.8']
        self.manager(addr=addr).sync()
        self.assertEqual({}, self.findings(addr=addr))
        self.lab.run('ip', 'address', 'del', addr[1] + '/32', 'dev',
                     'break0')
        self.assert_found('break0-addresses', addr[0], addr[1], addr=addr)

    def test_parent_missing(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.assert_found('parent-missing', 'no interface eth0')

    def test_parent_down(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        finding = self.assert_found('parent-down')
        self.assertEqual(['ip link set eth0 up'], finding['commands'])

    def test_parent_mismatch(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'other')
        with self.assertRaises(exceptions.DeviceConflict):
            self.bind('100.75.30.79', parent='eth1', owner=OWNER_79)
        self.bind(OTHER4, OTHER6, owner=OTHER_OWNER,
                  netns='/run/netns/other', mac_of_pod=MACS['other'], subnets=SUBNETS)
        self.manager().sync()
        self.assert_found('parent-mismatch', 'eth1', '100.75.30.79')

    def test_parent_is_configured_to_another(self) -> None:
        self.assert_found('parent-mismatch', '[break0] parent', POD4, OTHER4,
                          POD6, OTHER6, parent='lo')

    def test_it_answers_the_lan(self) -> None:
        self.sysctl('ipv4.conf.break0.arp_filter', 0)
        finding = self.assert_found('break0-answers-lan', 'arp_filter',
                                    severity='error')
        self.assertTrue(self.is_answered_for())
        self.follow(finding)
        self.assertEqual({}, self.findings())
        self.assertFalse(self.is_answered_for())

    def test_it_answers_the_lan_by_proxy(self) -> None:
        self.sysctl('ipv4.conf.break0.proxy_arp', 1)
        self.follow(self.assert_found('break0-answers-lan', 'proxy_arp'))
        self.assertEqual({}, self.findings())

    def test_all_may_filter(self) -> None:
        self.sysctl('ipv4.conf.break0.arp_filter', 0)
        self.sysctl('ipv4.conf.all.arp_filter', 1)
        self.assertEqual({}, self.findings())
        self.assertFalse(self.is_answered_for())

    def is_answered_for(self) -> bool:
        """Whether break0 answers the LAN for the address of the node."""
        link = self.lab.link('break0')
        assert link is not None
        with self.lab.capture() as frames:
            self.lab.ping(lab.NODE, 'lan')
        return any(frame.src == link['address'] and frame.answers == lab.NODE
                   for frame in frames)

    def test_heard(self) -> None:
        for name, value in (('addr_gen_mode', 0), ('accept_ra', 1),
                            ('force_mld_version', 0)):
            with self.subTest(name):
                self.sysctl('ipv6.conf.break0.' + name, value)
                self.follow(self.assert_found('break0-heard', name,
                                              severity='warning'))
                self.assertEqual({}, self.findings())
        self.lab.run('ip', 'link', 'set', 'break0', 'multicast', 'on')
        self.follow(self.assert_found('break0-heard', 'multicast'))
        self.assertEqual({}, self.findings())

    def test_ipv6_disabled(self) -> None:
        self.sysctl('ipv6.conf.break0.disable_ipv6', 1)
        self.follow(self.assert_found('ipv6-disabled', 'on break0', POD6,
                                      OTHER6))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD6))


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
        # The pods have not been told of that address yet either.
        found = self.findings()
        self.assertEqual(['route-wrong', 'pod-not-told'], list(found))
        self.assertEqual([POD4], found['route-wrong']['subjects'])
        self.follow(found['route-wrong'])
        self.assertEqual({}, self.findings())

    def test_changed_protocol(self) -> None:
        self.lab.run('ip', 'route', 'replace', POD4, 'dev', 'break0',
                     'scope', 'link', 'src', lab.NODE)
        self.follow(self.assert_found('route-wrong', '', POD4))
        self.assertEqual({}, self.findings())

    def test_foreign(self) -> None:
        self.lab.run('ip', 'route', 'replace', POD4, 'dev', 'lo')
        self.assert_found('route-foreign', 'protocol 3', POD4)

    def test_foreign_and_preferred(self) -> None:
        self.lab.run('ip', 'route', 'add', POD6, 'dev', 'lo', 'metric', '1')
        self.assert_found('route-foreign', 'interface 1', POD6)
        self.assertFalse(self.lab.ping(POD6))

    def test_stale(self) -> None:
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0',
                     'proto', '176', 'scope', 'link')
        self.follow(self.assert_found('route-stale', '', '100.75.30.99',
                                      severity='warning'))
        self.assertEqual({}, self.findings())

    def test_those_of_others_on_break0(self) -> None:
        self.lab.run('ip', 'route', 'add', '100.75.30.99', 'dev', 'break0')
        self.assertEqual({}, self.findings())

    def test_a_rule_in_the_way(self) -> None:
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN,
                     'table', '100')
        self.lab.run('ip', 'rule', 'add', 'to', POD4, 'table', '100')
        self.assert_found('route-not-used', 'by table 100; 4 were looked up',
                          POD4)
        self.assertFalse(self.lab.ping(POD4))

    def test_a_rule_in_the_way_of_answers(self) -> None:
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN,
                     'table', '100')
        self.lab.run('ip', 'rule', 'add', 'from', lab.NODE, 'table', '100')
        finding = self.assert_found('route-not-used', '', POD4, OTHER4)
        self.assertIn('ip route get %s from %s' % (POD4, lab.NODE),
                      finding['commands'])
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))

    def test_a_more_preferred_table(self) -> None:
        self.lab.run('ip', 'route', 'add', 'unreachable', POD4, 'table',
                     '100')
        self.lab.run('ip', 'rule', 'add', 'pref', '10', 'table', '100')
        self.assert_found('route-not-used', 'not at all', POD4)

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
        self.lab.run('ip', 'address', 'add', OTHER4 + '/32', 'dev', 'lo')
        self.assert_found('address-refused', 'of the node itself', OTHER4)

    def test_a_next_hop(self) -> None:
        self.lab.run('ip', 'route', 'add', '10.9.0.0/16', 'via', OTHER4)
        self.assert_found('address-refused', 'next hop', OTHER4)

    def test_not_allowed(self) -> None:
        self.assert_found(
            'address-not-allowed', 'allowed_cidrs', OTHER4,
            allowed_cidrs=[POD4 + '/32', 'fd00:30::/64'])
