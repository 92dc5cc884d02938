# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import signal
import threading
from typing import Any
from unittest import mock

from kuryr_break0.doctor import reachability
from kuryr_break0.doctor import trace
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import OTHER6
from tests.functional.doctor.base import OWNER_79
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.functional.doctor.base import SUBNETS
from tests.support import lab
from tests.support import program

#: An address on the node's link, outside of the node's subnet
FAR4 = '100.75.40.71'


class TestPods(DoctorTestCase):

    def test_not_told(self) -> None:
        # The agent has not read the new address yet.
        self.lab.run('ip', 'address', 'add', '100.75.30.52/24', 'dev',
                     lab.PARENT)
        self.follow(self.assert_found('pod-not-configured', '', POD4, POD6,
                                      OTHER4, OTHER6, severity='error'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping('100.75.30.52', 'pod'))

    def test_another_mac_address_of_break0(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'address',
                     '02:00:00:00:00:99')
        self.assertFalse(self.lab.ping(lab.NODE6, 'pod'))
        self.follow(self.assert_found('break0-mac',
                                      'pods were configured with'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))

    def test_bound_without_its_namespace(self) -> None:
        self.bind('100.75.30.79', owner=OWNER_79)
        self.assertEqual({}, self.findings())
        # The guard answers the pod's neighbour solicitations.
        self.require_rewriting()
        self.bind('fd00:30::79', owner=OWNER_79)
        self.assertEqual({}, self.findings())

    def test_neighbour_missing(self) -> None:
        self.lab.run('ip', 'neigh', 'del', lab.NODE6, 'dev', 'eth0',
                     netns='pod')
        self.follow(self.assert_found('pod-neighbour-missing', lab.NODE6,
                                      POD6, severity='error'))
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
        self.follow(self.assert_found('pod-mac', '02:00:00:00:00:99', POD4,
                                      POD6))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD4))

    def test_no_interface(self) -> None:
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod')
        self.assert_found('pod-interface-gone', "The network namespace "
                          "'/run/netns/pod' has no interface eth0", POD4,
                          POD6, severity='error')

    def test_parent_made_anew(self) -> None:
        """If the parent is created again, the pods must be restarted.

        The kernel has deleted the pods' macvlans with the old parent.
        """
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.lab.add_nic()
        self.manager().sync()
        found = self.findings()
        self.assertIn('Restart the pod',
                      found['pod-interface-gone']['remedy'])
        self.assertNotIn('pod-not-configured', found)
        self.lab.add_ipv6()
        self.manager().sync()
        self.assertIn('pod-interface-gone', self.findings())

    def test_a_namespace_that_is_none(self) -> None:
        # Simulate a container without mount propagation, on a kernel without
        # namespace numbers.
        self.lab.run('umount', '/run/netns/pod')  # a plain file is left
        records = '/run/kuryr-break0/addresses/%s.json'
        for address in (POD4, POD6):
            with open(records % address) as file:
                fields = json.load(file)
            fields['claims'][0]['namespace'][2] = None
            with open(records % address, 'w') as file:
                json.dump(fields, file)
        found = self.findings()
        self.assertEqual(['sandbox-unknown', 'pod-unreadable'], list(found))
        self.assertIn('is not a namespace',
                      found['sandbox-unknown']['seen'])
        self.assertIn('cannot be entered', found['pod-unreadable']['seen'])

    def test_they_are_left_as_they_are(self) -> None:
        self.lab.settle()
        before = self.everything('pod')
        self.assertEqual({}, self.findings())
        self.assertEqual(before, self.everything('pod'))

    def everything(self, netns: str) -> list[Any]:
        return [self.lab.ip(*args, netns=netns) for args in (
            ('link', 'show'), ('route', 'show', 'table', 'all'),
            ('neigh', 'show', 'nud', 'permanent'))]


class TestFarPod(DoctorTestCase):
    """The doctor examines a pod outside of the node's subnet."""

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
    """The doctor examines ARP between pods and node."""

    def set_up_pods(self) -> None:
        self.lab.add_pod('pod', POD4, mac=MACS['pod'])
        self.bind(POD4, mac_of_pod=MACS['pod'], subnets=SUBNETS[:1])

    def test_healthy(self) -> None:
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_ignored(self) -> None:
        for where in ('all', 'break0'):
            with self.subTest(where):
                self.sysctl('ipv4.conf.%s.arp_ignore' % where, 1)
                self.assertFalse(self.lab.ping(lab.NODE, 'pod'))
                finding = self.assert_found(
                    'arp-ignored', 'arp_ignore of %s is 1' % where, POD4)
                self.follow(finding)
                self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_a_pod_with_a_neighbour_needs_no_answer(self) -> None:
        self.sysctl('ipv4.conf.all.arp_ignore', 1)
        self.bind(POD4, netns='/run/netns/pod', mac_of_pod=MACS['pod'],
                  subnets=SUBNETS[:1])
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))


class TestInterfaces(DoctorTestCase):
    """The doctor finds faults of the pods' interfaces and addresses."""

    def test_private_mode(self) -> None:
        self.lab.run('ip', 'link', 'set', 'eth0', 'type', 'macvlan', 'mode',
                     'private', netns='pod')
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found('pod-apart', 'in private mode', POD4,
                                      POD6, severity='error'))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD4))

    def test_interface_is_down(self) -> None:
        # Without this sysctl, the kernel would delete the IPv6 address, and a
        # sync would exit with 1 until the pod has the address again.
        self.lab.run('sysctl', '-q', '-w',
                     'net.ipv6.conf.eth0.keep_addr_on_down=1', netns='other')
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='other')
        found = self.findings()
        self.assertEqual('error', found['pod-down']['severity'])
        self.assertEqual([OTHER4, OTHER6], found['pod-down']['subjects'])
        self.follow(found['pod-down'])
        self.lab.run(program.BREAK0, 'sync')
        self.lab.settle()
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(OTHER4))
        self.assertTrue(self.lab.ping(OTHER6))

    def test_address_is_missing(self) -> None:
        self.lab.run('ip', 'address', 'del', POD4 + '/24', 'dev', 'eth0',
                     netns='pod')
        # With the last address of a family, the kernel deletes the family's
        # neighbours.
        found = self.findings()
        self.assertEqual(['pod-address-missing', 'pod-neighbour-missing'],
                         list(found))
        self.assertEqual([POD4], found['pod-address-missing']['subjects'])
        self.assertFalse(self.lab.ping(POD4))
        for finding in found.values():
            self.follow(finding)
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD4))


class TestReachability(DoctorTestCase):
    """The doctor's pings find faults that no other check finds."""

    def assert_dropped(self, text: str) -> dict[str, Any]:
        finding = self.assert_found('packet-dropped', text, severity='error')
        self.assertIn(POD4, finding['subjects'])
        return finding

    def findings(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().findings(*args, **kwargs)
        # Keep the subjects apart, since they depend on the test's pods.
        for each in found.values():
            each['subjects'], self.subjects = [], each['subjects']
        return found

    def assert_found(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        finding = super().assert_found(*args, **kwargs)
        return {**finding, 'subjects': self.subjects}

    def test_rules_in_the_pod(self) -> None:
        self.lab.run('nft', 'add table inet t; add chain inet t c { type '
                     'filter hook input priority 0; policy drop; }',
                     netns='pod')
        self.assert_dropped('in the pod the policy of the table inet t')
        self.lab.run('nft', 'delete', 'table', 'inet', 't', netns='pod')
        self.assertEqual({}, self.findings())

    def test_nft_that_prints_late(self) -> None:
        """The trace waits for nft's monitor, which a busy machine delays."""
        wait, late = trace._wait, []

        def stopped(monitor: Any, condition: Any) -> None:
            wait(monitor, condition)
            if monitor not in late:  # the monitor is listening
                late.append(monitor)
                monitor.send_signal(signal.SIGSTOP)
                timer = threading.Timer(2, monitor.send_signal,
                                        (signal.SIGCONT,))
                timer.start()
                self.addCleanup(timer.join)

        self.lab.run('nft', 'add table inet t; add chain inet t c { type '
                     'filter hook input priority 0; policy drop; }',
                     netns='pod')
        with mock.patch.object(trace, '_wait', stopped):
            self.assert_dropped('in the pod the policy of the table inet t')

    def test_rules_at_prerouting_and_ingress(self) -> None:
        for rules, family in (
                ('add table inet t; add chain inet t c { type filter hook '
                 'prerouting priority -300; }; add rule inet t c iifname '
                 'break0 drop', 'inet'),
                ('add table netdev t; add chain netdev t c { type filter '
                 'hook ingress device break0 priority 0; }; add rule netdev '
                 't c ether saddr %s drop' % MACS['pod'], 'netdev'),
                ('add table inet t; add chain inet t c { type filter hook '
                 'input priority 0; }; add chain inet t m { type filter hook '
                 'prerouting priority -150; }; add rule inet t m iifname '
                 'break0 meta mark set 7; add rule inet t c meta mark 7 '
                 'drop', 'inet')):
            with self.subTest(rules):
                self.lab.run('nft', rules)
                # The simulator or the trace finds the rule.
                found = self.findings()
                self.assertTrue({'packet-dropped', 'firewall-drops',
                                 'firewall-restricts'} & set(found), found)
                self.lab.run('nft', 'delete', 'table', family, 't')
                self.assertEqual({}, self.findings())

    def test_routes_in_the_pod(self) -> None:
        for route, text in (
                (('blackhole', lab.NODE), 'there is no route to it'),
                (('unreachable', lab.NODE), 'there is no route to it'),
                ((lab.NODE, 'via', lab.LAN), 'but must have')):
            with self.subTest(route):
                self.lab.run('ip', 'route', 'add', *route, netns='pod')
                found = self.findings()
                self.assertEqual(['packet-lost'], list(found))
                self.assertIn('to the node at %s' % lab.NODE,
                              found['packet-lost']['seen'])
                self.assertIn(text, found['packet-lost']['seen'])
                self.lab.run('ip', 'route', 'del', *route, netns='pod')
                self.lab.run('ip', 'neigh', 'flush', lab.LAN, netns='pod')
                self.assertEqual({}, self.findings())

    def test_no_route_in_the_pod(self) -> None:
        """The doctor finds a pod without a route to the node's address."""
        path = self.lab.add_pod('bare', '100.75.30.79', mac=MACS['far'])
        self.bind('100.75.30.79', owner=OWNER_79, netns=path,
                  mac_of_pod=MACS['far'])  # without the pod's subnets
        self.lab.run('ip', 'route', 'flush', 'dev', 'eth0', netns='bare')
        self.assertFalse(self.lab.ping(lab.NODE, 'bare'))
        finding = self.assert_found(
            'pod-route-missing', 'it has no route to the node address '
            + lab.NODE, severity='error')
        self.assertEqual(['100.75.30.79'], finding['subjects'])
        self.follow(finding)
        self.assertTrue(self.lab.ping(lab.NODE, 'bare'))
        self.assertEqual({}, self.findings())

    def test_an_unbound_source_address(self) -> None:
        self.lab.run('ip', 'address', 'add', '100.99.0.9/32', 'dev', 'eth0',
                     netns='pod')
        self.lab.run('ip', 'route', 'replace', '100.75.30.0/24', 'dev',
                     'eth0', 'src', '100.99.0.9', netns='pod')
        finding = self.assert_found(
            'packet-lost', 'the reply of the node to 100.99.0.9 leaves '
            'through eth0, not break0', severity='error')
        self.assertEqual([POD4], finding['subjects'])

    def test_a_queue_that_drops(self) -> None:
        self.lab.run('tc', 'qdisc', 'add', 'dev', 'break0', 'root', 'pfifo',
                     'limit', '0')
        finding = self.assert_found(
            'packet-lost', 'the trace saw packets: to the pod, on the node '
            '(output), from the pod, in the pod (output), from the pod, on '
            'the node (ingress)',
            severity='error')
        self.assertIn('pfifo', self.lab.run('sh', '-c', next(
            each for each in finding['commands']
            if each.startswith('tc'))).stdout)

    def test_marks(self) -> None:
        """The doctor finds a mark that changes the route, as a VPN sets it."""
        self.lab.run('nft', 'add table inet t; add chain inet t c { type '
                     'route hook output priority -150; }; add rule inet t c '
                     'ip daddr %s meta mark set 9' % POD4)
        self.lab.run('ip', 'rule', 'add', 'fwmark', '9', 'lookup', '99')
        self.lab.run('ip', 'route', 'add', 'default', 'via', lab.LAN, 'dev',
                     lab.PARENT, 'table', '99')
        self.assertIn(
            'a ping from the node to the pod sandbox-1/eth0 at %s is not '
            'answered: the trace saw packets: ' % POD4, self.assert_found(
                'packet-lost', severity='error')['seen'])
        self.lab.run('ip', 'rule', 'del', 'fwmark', '9')
        self.assertEqual({}, self.findings())

    def test_pod_that_has_just_started(self) -> None:
        """A new pod's IPv6 address, tentative for 2 to 3 s, is no fault."""
        self.lab.run('sysctl', '-w', 'net.ipv6.conf.eth0.dad_transmits=2',
                     netns='pod')
        self.lab.run('ip', 'address', 'del', POD6 + '/64', 'dev', 'eth0',
                     netns='pod')
        self.lab.run('ip', 'address', 'add', POD6 + '/64', 'dev', 'eth0',
                     netns='pod')
        self.lab.run('ip', 'neigh', 'replace', lab.NODE6, 'lladdr',
                     str((self.lab.link('break0') or {})['address']), 'dev',
                     'eth0', 'nud', 'permanent', netns='pod')
        self.assertFalse(self.lab.ping(POD6, cold=False))
        self.assertEqual({}, self.findings())

    def test_pod_that_answers_no_pings(self) -> None:
        self.lab.run('sysctl', '-w', 'net.ipv4.icmp_echo_ignore_all=1',
                     netns='pod')
        finding = self.assert_found(
            'probe-unanswered', 'ipv4/icmp_echo_ignore_all of the pod is 1',
            severity='warning')
        self.assertEqual([POD4], finding['subjects'])
        self.assertEqual({}, self.findings(probe=False))
        done = self.call('--no-probe')
        self.assertIn('Not examined: pings: switched off by --no-probe',
                      done.stdout)
        self.assertIn('Nothing wrong was found.', done.stdout)
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_node_that_answers_no_pings(self) -> None:
        for name in ('ipv4.icmp_echo_ignore_all',
                     'ipv6.icmp.echo_ignore_all'):
            with self.subTest(name):
                self.sysctl(name, 1)
                finding = self.assert_found(
                    'probe-unanswered', '%s of the node is 1'
                    % name.replace('.', '/'), severity='warning')
                self.follow(finding)
                self.assertEqual({}, self.findings())

    def test_a_reply_that_leaves_by_another_interface(self) -> None:
        for netns in ('pod', 'other'):
            self.lab.run('ip', 'link', 'add', 'net1', 'type', 'bridge',
                         netns=netns)
            self.lab.run('ip', 'link', 'set', 'net1', 'up', netns=netns)
            # The rule affects replies only: the pod's own pings look up their
            # route without a source address.
            self.lab.run('ip', 'rule', 'add', 'from', {
                'pod': POD4, 'other': OTHER4}[netns], 'lookup', '99',
                netns=netns)
            self.lab.run('ip', 'route', 'add', 'default', 'dev', 'net1',
                         'table', '99', netns=netns)
        self.assertIn('the reply of the pod to %s leaves through net1, not '
                      'eth0' % lab.NODE,
                      self.assert_found('packet-lost',
                                        severity='error')['seen'])

    def test_a_node_without_its_ipv6_address(self) -> None:
        self.lab.run('ip', '-6', 'address', 'del', lab.NODE6 + '/64', 'dev',
                     lab.PARENT)
        self.manager().sync()
        finding = self.assert_found('node-address-missing', 'no IPv6 address',
                                    severity='error')
        self.assertEqual([POD6, OTHER6], finding['subjects'])

    def test_a_parent_without_an_address(self) -> None:
        """An address on another interface of the node is no fault."""
        self.lab.run('ip', 'link', 'add', 'other', 'type', 'bridge')
        self.lab.run('ip', 'link', 'set', 'other', 'up')
        for address in ('100.99.0.1/24', 'fd00:99::1/64'):
            self.lab.run('ip', 'address', 'add', address, 'dev', 'other',
                         *(('nodad',) if ':' in address else ()))
        self.lab.run('ip', 'address', 'flush', 'dev', lab.PARENT, 'scope',
                     'global')
        self.manager().sync()
        self.assertEqual({}, self.findings())
        # The doctor reports a node without any address.
        self.lab.run('ip', 'link', 'del', 'other')
        self.manager().sync()
        self.assertIn('node-address-missing', self.findings())

    def test_a_duplicate_on_the_lan(self) -> None:
        """The doctor looks for a duplicate if no trace explains a failure."""
        self.lab.run('ip', 'address', 'add', POD4 + '/24', 'dev', 'nic',
                     netns='lan')
        mac = self.lab.ip('link', 'show', 'nic', netns='lan')[0]['address']
        self.assertEqual({}, self.findings())
        self.lab.run('nft', 'add table inet t; add chain inet t c { type '
                     'filter hook input priority 0; policy drop; }',
                     netns='pod')
        with mock.patch.object(reachability.Pings, '_traced',
                               return_value=trace.Trace(is_complete=False)):
            finding = self.assert_found('address-duplicate', severity='error')
        self.assertIn('%s is at %s too' % (POD4, mac), finding['seen'])
