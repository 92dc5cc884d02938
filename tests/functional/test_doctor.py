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

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any
import unittest.mock

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
    maxDiff = None

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.set_up_pods()
        # There, but it must not repair what the test has broken.
        self.agent = contextlib.ExitStack()
        self.agent.enter_context(Ledger('/run/kuryr-break0', 10).attend())
        self.addCleanup(self.agent.close)

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
        # As the command sees it, without what a build has left in the tree.
        path = [each for each in sys.path if each not in ('', os.getcwd())]
        with unittest.mock.patch.object(sys, 'path', path):
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
        self.assert_found('break0-mac', '[break0] mac is ' + mac, mac=mac)
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
                  netns='/run/netns/other', mac_of_pod=MACS['other'],
                  subnets=SUBNETS)
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


class TestPods(DoctorTestCase):

    def test_not_told(self) -> None:
        # The agent has not seen it yet.
        self.lab.run('ip', 'address', 'add', '100.75.30.52/24', 'dev',
                     lab.PARENT)
        self.follow(self.assert_found('pod-not-told', '', POD4, OTHER4, POD6,
                                      OTHER6, severity='error'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping('100.75.30.52', 'pod'))

    def test_another_mac_address_of_break0(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'address',
                     '02:00:00:00:00:99')
        self.assertFalse(self.lab.ping(lab.NODE6, 'pod'))
        self.follow(self.assert_found('break0-mac', 'pods have been told'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))

    def test_bound_without_its_namespace(self) -> None:
        self.bind('100.75.30.79', owner=OWNER_79)
        self.assertEqual({}, self.findings())
        self.bind('fd00:30::79', owner=OWNER_79)
        self.assert_found('pod-not-told', '', 'fd00:30::79')

    def test_neighbour_missing(self) -> None:
        self.lab.run('ip', 'neigh', 'del', lab.NODE6, 'dev', 'eth0',
                     netns='pod')
        self.follow(self.assert_found('pod-neighbour-missing', lab.NODE6,
                                      POD4, severity='error'))
        self.assertEqual({}, self.findings())

    def test_neighbour_wrong(self) -> None:
        self.lab.run('ip', 'neigh', 'replace', lab.NODE, 'lladdr',
                     MACS['other'], 'dev', 'eth0', 'nud', 'permanent',
                     netns='pod')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.follow(self.assert_found('pod-neighbour-wrong', MACS['other'],
                                      POD4))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_another_mac_address_of_the_pod(self) -> None:
        self.lab.run('ip', 'link', 'set', 'eth0', 'address',
                     '02:00:00:00:00:99', netns='pod')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found('pod-mac', '02:00:00:00:00:99', POD4))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD4))

    def test_no_interface(self) -> None:
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod')
        self.assert_found('pod-unreadable', 'no interface eth0',
                          'sandbox-1/eth0')

    def test_a_namespace_that_is_none(self) -> None:
        path = '/run/netns/pod'
        self.lab.run('umount', path)  # a plain file is left
        found = os.stat(path)
        entry = '/run/kuryr-break0/addresses/%s.json'
        for address in (POD4, POD6):
            with open(entry % address) as file:
                fields = json.load(file)
            fields['netns_id'] = [found.st_dev, found.st_ino]
            with open(entry % address, 'w') as file:
                json.dump(fields, file)
        self.assert_found('pod-unreadable', 'cannot be entered',
                          'sandbox-1/eth0')

    def test_they_are_left_as_they_are(self) -> None:
        before = self.everything('pod')
        self.assertEqual({}, self.findings())
        self.assertEqual(before, self.everything('pod'))

    def everything(self, netns: str) -> list[Any]:
        return [self.lab.ip(*args, netns=netns) for args in (
            ('link', 'show'), ('route', 'show', 'table', 'all'),
            ('neigh', 'show', 'nud', 'permanent'))]


class TestFarPod(DoctorTestCase):
    """A pod in another subnet than the node."""

    def set_up_pods(self) -> None:
        self.lab.add_other_subnet()
        path = self.lab.add_pod('far', FAR4 + '/24', mac=MACS['far'],
                                gateways=[lab.OTHER_LAN])
        self.bind(FAR4, netns=path, mac_of_pod=MACS['far'],
                  subnets=['100.75.40.0/24'])

    def test_healthy_when_strict(self) -> None:
        self.sysctl('ipv4.conf.all.rp_filter', 1)
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(FAR4))

    def test_dropped(self) -> None:
        self.sysctl('ipv4.conf.all.rp_filter', 1)
        self.lab.run('ip', 'route', 'del', lab.NODE, netns='far')
        self.assertFalse(self.lab.ping(FAR4))
        finding = self.assert_found('rp-filter', 'rp_filter of eth0 is 1',
                                    FAR4, severity='error')
        self.follow(finding)
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(FAR4))

    def test_dropped_since_it_was_not_told(self) -> None:
        self.lab.run('ip', 'route', 'del', lab.NODE, netns='far')
        self.bind(FAR4, mac_of_pod=MACS['far'], subnets=['100.75.40.0/24'])
        self.assertEqual({}, self.findings())
        self.sysctl('ipv4.conf.eth0.rp_filter', 1)
        self.assertFalse(self.lab.ping(FAR4))
        self.follow(self.assert_found('rp-filter', '', FAR4))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(FAR4))

    def test_a_detour(self) -> None:
        self.lab.run('ip', 'route', 'del', lab.NODE, netns='far')
        self.follow(self.assert_found('pod-route-missing', lab.NODE, FAR4,
                                      severity='warning'))
        self.assertEqual({}, self.findings())


class TestARP(DoctorTestCase):
    """Where pods and node ask each other."""

    def set_up_pods(self) -> None:
        path = self.lab.add_pod('pod', POD4, mac=MACS['pod'])
        self.bind(POD4, netns=path, mac_of_pod=MACS['pod'],
                  subnets=SUBNETS[:1], static_neighbours=False)

    def test_healthy(self) -> None:
        self.assertEqual({}, self.findings(static_neighbours=False))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_ignored(self) -> None:
        for where in ('all', 'break0'):
            with self.subTest(where):
                self.sysctl('ipv4.conf.%s.arp_ignore' % where, 1)
                self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
                finding = self.assert_found(
                    'arp-ignored', 'arp_ignore of %s is 1' % where, POD4,
                    static_neighbours=False)
                self.follow(finding)
                self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_it_does_not_matter_to_who_has_been_told(self) -> None:
        self.sysctl('ipv4.conf.all.arp_ignore', 1)
        self.manager().sync()
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_not_for_ipv6(self) -> None:
        path = self.lab.add_pod('other', OTHER6, mac=MACS['other'])
        self.bind(OTHER6, owner=OTHER_OWNER, netns=path,
                  mac_of_pod=MACS['other'], subnets=SUBNETS[1:],
                  static_neighbours=False)
        self.assertFalse(self.lab.ping(lab.NODE6, 'other'))
        self.assert_found('ipv6-not-told', '', OTHER6,
                          static_neighbours=False)


class TestRecords(DoctorTestCase):

    STATE = '/run/kuryr-break0'

    def entry(self, address: str) -> str:
        return '%s/addresses/%s.json' % (self.STATE, address)

    def test_no_agent(self) -> None:
        self.agent.close()
        self.assert_found('agent-not-running', self.STATE,
                          severity='warning')

    def test_stuck_agent(self) -> None:
        path = self.STATE + '/attended'
        for silent, ids in ((180, []), (200, ['agent-stuck'])):
            os.utime(path, times=(0, time.time() - silent))
            with self.subTest(silent=silent):
                self.assertEqual(ids, list(self.findings()))
        self.assert_found('agent-stuck', 'for 200 s; it is process %d ' %
                          os.getpid(), severity='error')
        self.assertEqual({}, self.findings(resync_interval=100))

    def test_nothing_is_made(self) -> None:
        state = '/run/elsewhere/state'
        found = self.findings(state_dir=state)
        # Nobody claims what this state directory does not know.
        self.assertEqual({'agent-not-running', 'route-stale'}, set(found))
        self.assertFalse(os.path.exists('/run/elsewhere'))

    def test_damaged(self) -> None:
        with open(self.entry(POD4), 'w') as file:
            file.write('{"version": 1,')
        self.assert_found('ledger-damaged', 'Expecting property name',
                          self.entry(POD4), severity='error')
        # It is still there.
        self.assert_found('ledger-damaged', '', self.entry(POD4))

    def test_not_an_address(self) -> None:
        with open(self.entry('x'), 'w') as file:
            file.write('{}')
        self.assert_found('ledger-damaged', 'not appear to be an IPv4',
                          self.entry('x'))

    def test_set_aside(self) -> None:
        with open(self.entry(POD4), 'w') as file:
            file.write('no JSON')
        self.status()
        finding = self.assert_found('ledger-aside', '',
                                    self.STATE + '/damaged/%s.json' % POD4,
                                    severity='warning')
        self.bind(POD4, POD6, netns='/run/netns/pod', subnets=SUBNETS,
                  mac_of_pod=MACS['pod'])
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_newer(self) -> None:
        with open(self.entry(POD4)) as file:
            fields = json.load(file)
        with open(self.entry(POD4), 'w') as file:
            json.dump({**fields, 'version': 2}, file)
        self.assert_found('ledger-newer', 'version 2', self.entry(POD4))

    def test_sandbox_gone(self) -> None:
        self.lab.run('ip', 'netns', 'del', 'pod')
        self.follow(self.assert_found(
            'sandbox-gone', '', POD4 + ' (sandbox-1/eth0)',
            POD6 + ' (sandbox-1/eth0)', severity='warning'))
        self.assertEqual({}, self.findings())

    def test_lock_held(self) -> None:
        ready, held = os.pipe()

        def hold() -> None:
            with Ledger(self.STATE, 10).lock():
                os.write(held, b'.')
                time.sleep(60)

        pid = base.in_child(hold)
        try:
            os.read(ready, 1)
            self.assert_found('lock-held', 'process %d ' % pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)
        self.assertEqual({}, self.findings())

    def test_mode(self) -> None:
        os.chmod(self.STATE, 0o770)
        self.follow(self.assert_found('state-dir-mode', 'mode 0770'))
        self.assertEqual({}, self.findings())

    def test_read_only(self) -> None:
        self.lab.run('mount', '--bind', self.STATE, self.STATE)
        self.lab.run('mount', '-o', 'remount,bind,ro', self.STATE)
        self.assert_found('state-dir-unusable', 'cannot write',
                          severity='error')

    def test_not_a_directory(self) -> None:
        with open('/run/file', 'w'):
            pass
        self.assert_found('state-dir-unusable', '/run/file is not a dir',
                          state_dir='/run/file/state')

    def test_persistent(self) -> None:
        for name in ('lower', 'upper', 'work'):
            os.makedirs('/run/disk/' + name)
        self.lab.run('mount', '-t', 'overlay', 'overlay', '-o',
                     'lowerdir=/run/disk/lower,upperdir=/run/disk/upper,'
                     'workdir=/run/disk/work', self.STATE)
        os.chmod(self.STATE, 0o700)
        found = self.findings()
        self.assertIn('state-dir-persistent', found)
        self.assertIn('is on /run/kuryr-break0, which is overlay',
                      found['state-dir-persistent']['seen'])


class TestServices(DoctorTestCase):

    def write(self, path: str, text: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(text)

    def index(self) -> int:
        link = self.lab.link('break0')
        assert link is not None
        return int(link['ifindex'])

    def replace_etc(self) -> None:
        """Files of systemd of the node's own, of which it has none yet."""
        for name in ('upper', 'work'):
            os.makedirs('/run/etc/' + name)
        self.mount('overlay', '/etc', '-o', 'lowerdir=/etc,upperdir='
                   '/run/etc/upper,workdir=/run/etc/work')
        os.makedirs('/etc/systemd', exist_ok=True)
        for path in ('/etc/systemd', '/usr/lib/systemd',
                     '/usr/local/lib/systemd'):
            if os.path.isdir(path):
                self.mount('tmpfs', path)

    def mount(self, kind: str, path: str, *args: str) -> None:
        self.lab.run('mount', '-t', kind, kind, path, *args)
        self.addCleanup(self.lab.run, 'umount', path)

    def networkd(self, state: str) -> None:
        self.write('/run/systemd/netif/links/%d' % self.index(),
                   '# This is private data. Do not parse.\n' + state)

    def test_networkd_leaves_it_alone(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\nOPER_STATE=degraded\n')
        self.assertEqual({}, self.findings())

    def test_networkd_manages_it(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=configured\n'
                      'NETWORK_FILE=/etc/systemd/network/any.network\n')
        finding = self.assert_found('networkd-manages-break0',
                                    '/etc/systemd/network/any.network')
        self.assertIn('Unmanaged=yes', finding['commands'][0])

    def test_networkd_and_foreign_routes(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\n')
        self.write('/etc/systemd/networkd.conf',
                   '[Network]\n#ManageForeignRoutes=no\n[DHCPv4]\n'
                   'ManageForeignRoutes=no\n')
        self.assert_found('networkd-foreign-routes', 'by default',
                          severity='warning')
        self.write('/run/systemd/networkd.conf.d/90.conf',
                   '[Network]\nManageForeignRoutes = no\n')
        self.assertEqual({}, self.findings())
        self.write('/etc/systemd/networkd.conf.d/95.conf',
                   '[Network]\nManageForeignRoutes=yes\n')
        self.assert_found('networkd-foreign-routes',
                          'by /etc/systemd/networkd.conf.d/95.conf')
        # One of the same name hides the other.
        self.write('/run/systemd/networkd.conf.d/95.conf', '[Network]\n')
        self.assert_found('networkd-foreign-routes', '95.conf')
        os.unlink('/etc/systemd/networkd.conf.d/95.conf')
        self.assertEqual({}, self.findings())

    def test_networkd_does_as_it_is_told(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\n')
        self.write('/etc/systemd/networkd.conf', '[Network]\n')
        finding = self.assert_found('networkd-foreign-routes')
        for command in finding['commands'][:-1]:  # but for the restart
            self.lab.run('sh', '-c', command)
        self.assertEqual({}, self.findings())

    def test_network_manager(self) -> None:
        device = '/run/NetworkManager/devices/%d' % self.index()
        self.write(device, '[device]\nmanaged=false\n')
        self.assertEqual({}, self.findings())
        self.write(device, '[device]\nmanaged=true\nconnection-uuid=1\n')
        self.assert_found('networkmanager-manages-break0', 'break0')


class TestFirewall(DoctorTestCase):

    def nft(self, text: str) -> None:
        self.lab.run('nft', text)

    def test_accepting(self) -> None:
        self.nft('''
            table inet filter {
              set nodes { type ipv4_addr; flags interval;
                          elements = { 100.75.30.0/24 } }
              chain input {
                type filter hook input priority 0; policy drop;
                ct state vmap { established : accept, related : accept,
                                invalid : drop }
                iifname "lo" accept
                iifname "eth0" tcp dport 22 accept
                iifname { "break0", "tun0" } jump pods
              }
              chain pods {
                ip saddr 10.0.0.0/8 drop
                tcp dport 25 reject
                accept
              }
              chain output {
                type filter hook output priority 0; policy accept;
                oifname "eth0" drop
              }
              chain forward {
                type filter hook forward priority 0; policy drop;
                meta mark 0x4000 accept
              }
            }''')
        found = self.findings()
        # What is said of SMTP is said of break0 by name.
        self.assertEqual(['firewall-restricts'], list(found))
        self.assertIn('tcp dport 25', found['firewall-restricts']['seen'])
        self.nft('delete rule inet filter pods handle %d' % self.handle(
            'pods', 'reject'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertTrue(self.lab.ping(POD4))

    def handle(self, chain: str, statement: str) -> int:
        rules = json.loads(self.lab.run(
            'nft', '--json', 'list', 'chain', 'inet', 'filter',
            chain).stdout)['nftables']
        return int(next(each['rule']['handle'] for each in rules
                        if 'rule' in each and any(
                            statement in one for one in each['rule']['expr'])))

    def test_a_rule_for_break0(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname "break0" counter drop; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.follow(self.assert_found(
            'firewall-drops', 'iifname break0 drop', 'inet filter in',
            severity='error'))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertEqual({}, self.findings())

    def test_a_rule_for_pods(self) -> None:
        self.nft('table ip filter { chain out { type filter hook output '
                 'priority 0; ip daddr 100.75.30.64-100.75.30.95 reject; }; '
                 '}')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found('firewall-drops', 'reject',
                                      'ip filter out'))
        self.assertTrue(self.lab.ping(POD4))

    def test_policy(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; iifname "lo" accept; }; }')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.follow(self.assert_found('firewall-drops', 'policy drop',
                                      'inet filter in'))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_only_some_ports(self) -> None:
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; policy drop; ct state established,related '
                 'accept; tcp dport { 22, 10250 } accept; ip6 nexthdr icmpv6 '
                 'accept; }; }')
        self.assert_found('firewall-restricts', 'policy drop',
                          'inet filter in', severity='warning')

    def test_a_zone(self) -> None:
        """As firewalld does it."""
        self.nft('''
            table inet firewalld {
              chain public { tcp dport 22 accept; }
              chain zones {
                iifname "eth1" goto public
                goto public
              }
              chain filter_INPUT {
                type filter hook input priority 10; policy accept;
                ct state { established, related } accept
                iifname "lo" accept
                jump zones
                reject with icmpx admin-prohibited
              }
            }''')
        self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
        self.assert_found('firewall-restricts', 'reject',
                          'inet firewalld filter_INPUT')

    def test_forwarding(self) -> None:
        self.nft('table ip filter { chain FORWARD { type filter hook forward '
                 'priority 0; policy drop; }; }')
        self.assertEqual({}, self.findings())
        self.sysctl('ipv4.ip_forward', 1)
        self.follow(self.assert_found('firewall-restricts', 'hook forward',
                                      'ip filter FORWARD'))
        self.assertEqual({}, self.findings())

    def test_other_interfaces(self) -> None:
        self.nft('table netdev t { chain c { type filter hook ingress device '
                 '"eth0" priority 0; policy accept; ip saddr 10.0.0.0/8 '
                 'drop; }; }')
        self.nft('table inet filter { chain in { type filter hook input '
                 'priority 0; iifname != "break0" drop; iif "eth0" drop; '
                 'tcp dport 25 drop; meta mark 7 drop; }; }')
        self.assertEqual({}, self.findings())

    def test_rules_of_all_kinds(self) -> None:
        """They are all understood, or given the benefit of the doubt."""
        self.nft('\n'.join((
            'table inet filter {',
            '  set known { type ipv4_addr; flags dynamic, timeout; }',
            '  map services {',
            '    type ipv4_addr . inet_proto . inet_service : verdict',
            '    elements = { 10.0.0.1 . tcp . 443 : goto service } }',
            '  counter seen { packets 0 bytes 0; }',
            '  chain service { drop; }',
            '  chain in { type filter hook input priority 0; policy accept;',
            '    counter name seen',
            '    ip daddr . meta l4proto . th dport vmap @services',
            '    meta mark & 0x4000 == 0x4000 drop',
            '    fib daddr type broadcast drop',
            '    numgen random mod 2 vmap { 0 : jump service }',
            '    limit rate over 10/second drop',
            '    tcp flags & (fin|syn) == (fin|syn) drop',
            '    th dport 1-1024 ip protocol udp drop',
            '    ip6 saddr fe80::/10 drop',
            '    ip saddr != { 100.75.0.0/16, 10.1.0.1-10.1.0.9 } drop',
            '    icmpv6 type { echo-request, nd-neighbor-solicit } accept',
            '    ether saddr 02:00:00:00:00:99 drop',
            '    iifgroup 7 drop',
            '    meta l4proto { tcp, udp } th sport 53 drop',
            '    ct status dnat drop',
            '    ct mark 5 drop',
            '    ip saddr @known drop',
            '    rt type 0 drop',
            '    socket transparent 1 drop',
            '    jump service_of_nobody',
            '  }',
            '  chain service_of_nobody { log prefix "none"; return; }',
            '}')))
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            logging.getLogger('kuryr_break0').warning('a line')
            self.assertEqual({}, self.findings())
        self.assertEqual(1, len(logs.output))
        self.nft('insert rule inet filter in iifname "break0" ct mark 5 drop')
        self.assertEqual(['firewall-restricts'], list(self.findings()))
        self.nft('add element inet filter known { %s timeout 1h }' % POD4)
        self.assertEqual(['firewall-drops'], list(self.findings()))

    def test_iptables(self) -> None:
        for program, ping in (('iptables', lab.NODE), ('ip6tables',
                                                       lab.NODE6)):
            for flavour in ('nft', 'legacy'):
                with self.subTest(program=program, flavour=flavour):
                    self.lab.run('%s-%s' % (program, flavour), '-A', 'INPUT',
                                 '-i', 'break+', '-m', 'comment',
                                 '--comment', 'a -j ACCEPT', '-j', 'REJECT')
                    self.assertFalse(self.lab.ping(ping, 'pod'))
                    finding = self.assert_found(
                        'firewall-drops', 'REJECT',
                        finding_chain(program, flavour))
                    self.lab.run('sh', '-c', finding['commands'][0].replace(
                        program, '%s-%s' % (program, flavour), 1))
                    self.assertTrue(self.lab.ping(ping, 'pod'))
                    self.assertEqual({}, self.findings())

    def hide(self, name: str) -> None:
        """Be on a node where there is no such program."""
        for directory in ('/usr/sbin', '/sbin', '/usr/bin', '/bin'):
            path = os.path.join(directory, name)
            if os.path.exists(path) and os.access(path, os.X_OK):
                self.lab.run('mount', '--bind', '/dev/null', path)
                self.addCleanup(self.lab.run, 'umount', path)

    def test_iptables_where_there_is_no_nft(self) -> None:
        self.hide('nft')
        self.lab.run('iptables', '-P', 'OUTPUT', 'DROP')
        self.lab.run('iptables', '-A', 'OUTPUT', '-m', 'conntrack',
                     '--ctstate', 'RELATED,ESTABLISHED', '-j', 'ACCEPT')
        self.lab.run('iptables', '-A', 'OUTPUT', '!', '-o', 'break0', '-j',
                     'ACCEPT')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found('firewall-drops', 'policy drop',
                                      'iptables filter OUTPUT'))
        self.assertTrue(self.lab.ping(POD4))
        self.assertEqual({}, self.findings())

    def test_where_there_is_neither(self) -> None:
        self.lab.run('iptables', '-P', 'OUTPUT', 'DROP')
        for name in ('nft', 'iptables-save', 'ip6tables-save'):
            self.hide(name)
        self.assertEqual({}, self.findings())


def finding_chain(program: str, flavour: str) -> str:
    if flavour == 'legacy':
        return program + ' filter INPUT'
    return ('ip' if program == 'iptables' else 'ip6') + ' filter INPUT'


class TestInstallation(DoctorTestCase):
    """With other distributions before those of the virtual environment."""

    PATH = '/run/site-packages'
    BINDING = 'kuryr_kubernetes.cni.binding'

    def install(self, name: str, version: str, entry_points: str = '',
                requires: str = '') -> None:
        info = '%s/%s-%s.dist-info' % (self.PATH, name, version)
        os.makedirs(info)
        with open(info + '/METADATA', 'w') as file:
            file.write('Metadata-Version: 2.1\nName: %s\nVersion: %s\n%s' %
                       (name, version, requires))
        with open(info + '/entry_points.txt', 'w') as file:
            file.write(entry_points)

    def assert_only(self, expected: str, *seen: str, code: int = 1,
                    **environ: str) -> None:
        environ = {'PYTHONPATH': self.PATH, **environ}
        found = json.loads(self.call('--json', code=code,
                                     **environ).stdout)['findings']
        self.assertEqual([expected] * len(seen), [each['id']
                                                  for each in found], found)
        for text, finding in zip(seen, found):
            self.assertIn(text, finding['seen'])
        for text in (expected, 'why', 'do'):
            self.assertIn(text, self.call(code=code, **environ).stdout)

    def test_pyroute2_unfit(self) -> None:
        self.install('pyroute2', '0.9.7')
        self.assert_only('dependency-unfit', 'pyroute2 is 0.9.7, but <0.8')

    def test_kuryr_unfit(self) -> None:
        self.install('kuryr_kubernetes', '9.0.0')
        self.assert_only('dependency-unfit', 'kuryr-kubernetes is 9.0.0, but')

    def test_pyroute2_that_cannot_be_imported(self) -> None:
        self.install('pyroute2', '0.9.7')
        os.mkdir(self.PATH + '/pyroute2')
        with open(self.PATH + '/pyroute2/__init__.py', 'w') as file:
            file.write('raise ImportError("no transactional")\n')
        self.assert_only('dependency-unfit', 'pyroute2 is 0.9.7', code=2)
        done = subprocess.run(
            [PROGRAM, 'status'], text=True, stderr=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': self.PATH})
        self.assertEqual(2, done.returncode)
        self.assertRegex(done.stderr, r'\Akuryr-break0: It cannot be loaded: '
                         r'no transactional. pyroute2 is 0.9.7, [^\n]*\n\Z')

    def test_entry_points_missing(self) -> None:
        self.install('kuryr_break0', '9')
        self.assert_only('entry-point-missing', '0 entry points named '
                         'VIFMacvlanBreak0', '0 entry points named kuryr_bre')

    def test_one_entry_point_missing(self) -> None:
        self.install('kuryr_break0', '9', '[os_vif]\nkuryr_break0 = '
                     'kuryr_break0.os_vif_plugin:Break0Plugin\n')
        self.assert_only('entry-point-missing', 'VIFMacvlanBreak0')

    def test_two_entry_points(self) -> None:
        self.install('another', '1', '[%s]\nVIFMacvlanBreak0 = '
                     'kuryr_break0.driver:Break0MacvlanDriver\n' %
                     self.BINDING)
        self.assert_only('entry-point-missing', '2 entry points')

    def test_driver_broken(self) -> None:
        self.install('kuryr_break0', '9', '[os_vif]\nkuryr_break0 = '
                     'kuryr_break0.os_vif_plugin:Break0Plugin\n[%s]\n'
                     'VIFMacvlanBreak0 = kuryr_break0.driver_x:Driver\n' %
                     self.BINDING)
        self.assert_only('driver-broken', 'driver_x')

    def test_invalid_option(self) -> None:
        os.mkdir(self.PATH)
        self.assert_only('options-invalid', "mac: 'x' is not a MAC address",
                         code=2, OS_BREAK0__MAC='x')

    def test_disabled(self) -> None:
        os.mkdir(self.PATH)
        self.assert_only('disabled', 'enabled is false',
                         OS_BREAK0__ENABLED='false')


class TestCommand(DoctorTestCase):

    def test_for_people(self) -> None:
        self.lab.run('ip', 'route', 'del', POD4)
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        done = self.call(code=1)
        self.assertEqual('', done.stderr)
        self.assertIn('error: route-missing\n  seen  addresses of pods have '
                      'no route through break0 in table 254:', done.stdout)
        self.assertIn('\n          kuryr-break0 sync\n', done.stdout)
        self.assertIn('Errors: 1, warnings: 1. Looked at pods: 2, entered: '
                      '2; addresses: 4', done.stdout)
        self.assertLess(max(map(len, done.stdout.splitlines())), 80)

    def test_a_state_directory_that_cannot_be_read(self) -> None:
        os.makedirs('/run/state/addresses')
        with open('/run/state/lock', 'w'):
            pass
        os.chmod('/run/state', 0o700)
        os.chmod('/run/state/lock', 0o400)
        self.lab.run('mount', '--bind', '/run/state/lock', '/run/state/lock')
        self.lab.run('mount', '-o', 'remount,bind,ro', '/run/state/lock')
        done = self.call(code=3, OS_BREAK0__STATE_DIR='/run/state')
        self.assertIn('/run/state', done.stderr)

    def test_what_is_under_way(self) -> None:
        """Pods that come and go are not taken for faults."""
        stop = '/run/stop'
        path = self.lab.add_pod('coming', '100.75.30.79',
                                mac=MACS['far'])

        def come_and_go() -> None:
            while not os.path.exists(stop):
                self.bind('100.75.30.79', owner=OWNER_79, netns=path,
                          mac_of_pod=MACS['far'], subnets=SUBNETS)
                time.sleep(0.05)  # a pod lives longer
                self.unbind('100.75.30.79', owner=OWNER_79)
                time.sleep(0.05)

        pid = base.in_child(come_and_go)
        try:
            for _ in range(30):
                self.assertEqual({}, self.findings())
        finally:
            with open(stop, 'w'):
                pass
            self.assertEqual(0, base.wait_for(pid))

    def test_many_pods(self) -> None:
        """What costs a request for each pod is done for some of them."""
        for number in range(1, 251):
            self.bind('100.76.0.%d' % number, mac_of_pod=MACS['far'],
                      owner=Owner('many-%d' % number, 'eth0'))
        done = json.loads(self.call('--json').stdout)
        self.assertEqual([], done['findings'])
        self.assertEqual({'addresses': 254, 'looked_up': 128, 'pods': 252,
                          'entered': 2}, done['looked_at'])
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        finding = self.findings()['route-missing']
        self.assertEqual(252, len(finding['subjects']))
        self.assertIn('and 244 more.', ' '.join(
            self.call(code=1).stdout.split()))
