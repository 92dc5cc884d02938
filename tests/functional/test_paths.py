# SPDX-License-Identifier: Apache-2.0

"""Node and pods reach each other without a frame on the LAN."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import time
from typing import Any, Optional

from kuryr_break0.engine import problems
from tests.functional import base
from tests.functional.base import Owner
from tests.support import lab
from tests.support import program

POD = '100.75.30.71'
POD6 = 'fd00:30::71'
FAR = '100.75.40.71'
FAR6 = 'fd00:40::71'
MAC = 'fa:16:3e:00:00:%02x'
SUBNETS = ['100.75.30.0/24', 'fd00:30::/64']
FAR_SUBNETS = ['100.75.40.0/24', 'fd00:40::/64']
BREAK0 = '100.75.30.7'
BREAK06 = 'fd00:30::7'


class DualStackTestCase(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.lab.add_other_subnet()

    def add_pod(self, number: int, **overrides: Any) -> str:
        """Add and bind a pod in the node's subnet, as Kuryr does."""
        name = 'pod-%d' % number
        return self._add(name, number, (self.v4(number), self.v6(number)),
                         (lab.LAN, lab.LAN6), SUBNETS, **overrides)

    def add_far_pod(self, **overrides: Any) -> str:
        """Add and bind a pod in another subnet than the node's."""
        return self._add('far', 0xff, (FAR, FAR6),
                         (lab.OTHER_LAN, lab.OTHER_LAN6), FAR_SUBNETS,
                         **overrides)

    def _add(self, name: str, number: int, addresses: tuple[str, ...],
             gateways: tuple[str, ...], subnets: list[str],
             **overrides: Any) -> str:
        # Kuryr sets the addresses after the call of the driver.
        path = self.lab.add_pod(name, mac=MAC % number)
        self.bind(*addresses, owner=Owner(name, 'eth0'), netns=path,
                  mac_of_pod=MAC % number, subnets=subnets, **overrides)
        for address in addresses:
            self.lab.run('ip', 'address', 'add',
                         address + ('/64' if ':' in address else '/24'),
                         'dev', 'eth0',
                         *(('nodad',) if ':' in address else ()), netns=name)
        for gateway in gateways:
            self.lab.run('ip', 'route', 'add', 'default', 'via', gateway,
                         netns=name)
        return path

    @staticmethod
    def v4(number: int) -> str:
        return '100.75.30.%d' % (70 + number)

    @staticmethod
    def v6(number: int) -> str:
        return 'fd00:30::%d' % (70 + number)

    def set_sysctl(self, path: str, value: int) -> None:
        with open('/proc/sys/net/' + path, 'w') as file:
            file.write(str(value))

    def set_rp_filter(self, value: int) -> None:
        for device in ('all', lab.PARENT, 'break0'):
            if os.path.exists('/proc/sys/net/ipv4/conf/' + device):
                self.set_sysctl('ipv4/conf/%s/rp_filter' % device, value)

    def transfer(self, server: Optional[str], client: Optional[str],
                 address: str) -> None:
        """Send a mebibyte in each direction."""
        self.talk(*self.connection(server, client, address), 2 ** 20)

    def connection(self, server: Optional[str], client: Optional[str],
                   address: str) -> tuple[socket.socket, socket.socket]:
        family = socket.AF_INET6 if ':' in address else socket.AF_INET
        listener = self.lab.socket(family, netns=server)
        self.addCleanup(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 4000))
        listener.listen()
        connected = self.lab.socket(family, netns=client)
        self.addCleanup(connected.close)
        connected.connect((address, 4000))
        accepted, _ = listener.accept()
        accepted.settimeout(lab.PATIENCE)
        self.addCleanup(accepted.close)
        listener.close()
        return accepted, connected

    def talk(self, one: socket.socket, other: socket.socket,
             size: int = 1000) -> None:
        """Send this number of bytes in each direction."""
        for sender, receiver in ((one, other), (other, one)):
            left = size
            while left:
                sender.sendall(bytes(min(left, 1000)))
                received = 0
                while received < min(left, 1000):
                    received += len(receiver.recv(1000))
                left -= min(left, 1000)


class TestMatrix(DualStackTestCase):
    """Cold pings both ways, for each value of rp_filter and arp_ignore."""

    def check(self, **overrides: Any) -> None:
        self.add_pod(1, **overrides)
        self.add_far_pod(**overrides)
        cells = 0
        for rp_filter, arp_ignore in itertools.product((0, 1, 2), (0, 1)):
            self.set_rp_filter(rp_filter)
            self.set_sysctl('ipv4/conf/all/arp_ignore', arp_ignore)
            for name, v4, v6 in (('pod-1', POD, POD6), ('far', FAR, FAR6)):
                for node, pod in ((lab.NODE, v4), (lab.NODE6, v6)):
                    with self.subTest(pod=pod, rp_filter=rp_filter,
                                      arp_ignore=arp_ignore):
                        self.assertTrue(self.lab.ping(pod), 'to the pod')
                        self.assertTrue(self.lab.ping(node, name),
                                        'from the pod')
                        cells += 2
        self.assertEqual(48, cells)

    def test_unnumbered(self) -> None:
        self.check()

    def test_numbered(self) -> None:
        self.check(addr=[BREAK0, BREAK06])
        for address, pod in ((BREAK0, 'pod-1'), (BREAK06, 'pod-1'),
                             (BREAK0, 'far'), (BREAK06, 'far')):
            with self.subTest(address=address, pod=pod):
                self.assertTrue(self.lab.ping(address, pod))

    def test_forwarded(self) -> None:
        # A Service may forward packets of a pod through the node.
        self.add_pod(1)
        for key in ('ipv4/ip_forward', 'ipv6/conf/all/forwarding'):
            self.set_sysctl(key, 1)
        self.bind(POD, POD6, owner=Owner('pod-1', 'eth0'))
        self.lab.settle()
        for beyond, node in (('100.64.0.1/32', lab.NODE),
                             ('fd00:99::1/128', lab.NODE6)):
            self.lab.run('ip', 'address', 'add', beyond, 'dev', 'lo',
                         netns='lan')
            self.lab.run('ip', 'route', 'add', beyond, 'via', node,
                         netns='pod-1')
            before = self.received()
            self.assertTrue(self.lab.ping(beyond.split('/')[0], 'pod-1'))
            self.assertGreater(self.received(), before)

    def received(self) -> int:
        """Return the number of packets received on break0."""
        stats = self.lab.run('ip', '-json', '-statistics', 'link', 'show',
                             'break0').stdout
        return int(json.loads(stats)[0]['stats64']['rx']['packets'])


class TestSilence(DualStackTestCase):

    def setUp(self) -> None:
        super().setUp()
        # A first pod creates a break0. Every later break0 has the same MAC
        # address.
        self.add_pod(0)
        self.mac = (self.lab.link('break0') or {})['address']
        self.unbind(self.v4(0), self.v6(0), owner=Owner('pod-0', 'eth0'))
        self.lab.run('ip', 'link', 'del', 'break0')

    def test_no_frame_of_break0_is_on_the_lan(self) -> None:
        # An IPv6 router joins one more multicast group and reports it.
        self.set_sysctl('ipv6/conf/all/forwarding', 1)
        with self.lab.capture() as frames:
            for number in range(1, 11):
                self.add_pod(number)
            self.add_far_pod()
            for number in range(1, 11):
                for node, pod in ((lab.NODE, self.v4(number)),
                                  (lab.NODE6, self.v6(number))):
                    self.assertTrue(self.lab.ping(pod))
                    self.assertTrue(self.lab.ping(node, 'pod-%d' % number))
            for node, pod in ((lab.NODE, FAR), (lab.NODE6, FAR6)):
                self.assertTrue(self.lab.ping(pod))
                self.assertTrue(self.lab.ping(node, 'far'))
            for node, pod in ((lab.NODE, POD), (lab.NODE6, POD6)):
                self.transfer('pod-1', None, pod)
                self.transfer(None, 'pod-1', node)
            for number in range(2, 11):
                self.unbind(self.v4(number), self.v6(number),
                            owner=Owner('pod-%d' % number, 'eth0'))
            agent = program.start([program.BREAK0, 'agent'],
                                  stderr=subprocess.DEVNULL)
            self.addCleanup(agent.wait)
            self.addCleanup(agent.kill)
            for _ in range(2):
                time.sleep(1.5)
                self.lab.run('ip', 'link', 'del', 'break0')
                lab.until(lambda: self.lab.ping(POD) and self.lab.ping(POD6))
            # The kernel joins the group of routers when forwarding begins.
            for value in (0, 1):
                self.set_sysctl('ipv6/conf/all/forwarding', value)
            agent.send_signal(signal.SIGTERM)
            agent.wait()
            self.lab.run('ip', 'link', 'del', 'break0')
            time.sleep(2)  # time for repeated frames
        self.assertEqual([], self.of_break0(frames))
        self.assertNotEqual([], frames)

    def test_the_original_recipe_is_heard(self) -> None:
        # The control of the capture: the original recipe is not silent.
        with self.lab.capture() as frames:
            self.recipe()
            self.assertTrue(self.lab.ping(POD))
            lab.until(lambda: len(self.of_break0(frames)) > 2 and POD in [
                frame.asks for frame in self.of_break0(frames)])

    def of_break0(self, frames: list[lab.Frame]) -> list[lab.Frame]:
        return [frame for frame in frames
                if self.mac in (frame.src, frame.dst)]

    def recipe(self) -> None:
        # The guard outlives break0, and would silence the next break0.
        self.lab.run('nft', 'flush', 'ruleset')
        self.lab.add_pod('pod-1', POD, mac=MAC % 1)
        self.lab.run('ip', 'link', 'add', 'break0', 'link', lab.PARENT,
                     'address', self.mac, 'type', 'macvlan', 'mode',
                     'bridge')
        self.lab.run('ip', 'address', 'add', BREAK0 + '/32', 'dev', 'break0')
        self.lab.run('ip', 'link', 'set', 'break0', 'up')
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'break0')

    def answers(self) -> tuple[set[str], set[str]]:
        """Return the senders of ARP and of ND answers for the node."""
        with self.lab.capture() as frames:
            self.assertTrue(self.lab.ping(lab.NODE, 'lan'))
            self.assertTrue(self.lab.ping(lab.NODE6, 'lan'))
        # If a request has no answer for a second, the LAN host repeats it.
        arp, nd = ({frame.src for frame in frames if frame.answers == node}
                   for node in (lab.NODE, lab.NODE6))
        return arp, nd

    def test_the_lan_gets_one_answer(self) -> None:
        eth0 = (self.lab.link(lab.PARENT) or {})['address']
        self.add_pod(1)
        for rp_filter in (0, 1, 2):
            with self.subTest(rp_filter=rp_filter):
                self.set_rp_filter(rp_filter)
                self.assertEqual(({eth0}, {eth0}), self.answers())

    def test_with_the_original_recipe_it_gets_two(self) -> None:
        eth0 = (self.lab.link(lab.PARENT) or {})['address']
        self.recipe()
        self.set_rp_filter(0)
        lab.until(lambda: self.answers()[0] == {eth0, self.mac})


class TestConnections(DualStackTestCase):

    def test_they_survive_that_break0_is_created_again(self) -> None:
        self.add_pod(1)
        pairs = [self.connection('pod-1', None, POD),
                 self.connection('pod-1', None, POD6),
                 self.connection(None, 'pod-1', lab.NODE),
                 self.connection(None, 'pod-1', lab.NODE6)]
        for pair in pairs:
            self.talk(*pair)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager().sync()
        for pair in pairs:
            self.talk(*pair)


class TestNeighbours(DualStackTestCase):

    def neighbours(self, device: str, netns: Optional[str] = None
                   ) -> dict[str, str]:
        return {each['dst']: each['lladdr'] for family in ('-4', '-6')
                for each in self.lab.ip(family, 'neigh', 'show', 'dev',
                                        device, 'nud', 'permanent',
                                        netns=netns)}

    def onlink(self, netns: str) -> set[str]:
        """Return the host routes in a pod that break0 has set."""
        return {route['dst'] for family in ('-4', '-6')
                for route in self.lab.ip(family, 'route', 'show', 'proto',
                                         '176', netns=netns)}

    def setUp(self) -> None:
        super().setUp()
        self.add_pod(1)
        self.add_far_pod()
        self.mac = (self.lab.link('break0') or {})['address']

    def test_both_know_each_other(self) -> None:
        self.assertEqual({POD: MAC % 1, POD6: MAC % 1, FAR: MAC % 0xff,
                          FAR6: MAC % 0xff}, self.neighbours('break0'))
        for pod in ('pod-1', 'far'):
            self.assertEqual({lab.NODE: self.mac, lab.NODE6: self.mac},
                             self.neighbours('eth0', pod))
        self.assertEqual(set(), self.onlink('pod-1'))
        self.assertEqual({lab.NODE, lab.NODE6}, self.onlink('far'))
        self.assertEqual([], self.problems())

    def test_they_go_with_the_pod(self) -> None:
        self.unbind(FAR, FAR6, owner=Owner('far', 'eth0'))
        self.assertEqual({POD: MAC % 1, POD6: MAC % 1},
                         self.neighbours('break0'))
        self.assertEqual({}, self.neighbours('eth0', 'far'))
        self.assertEqual(set(), self.onlink('far'))

    def test_one_family_after_the_other(self) -> None:
        path = self.lab.add_pod('pod', '100.75.30.81', 'fd00:30::81',
                                mac=MAC % 81)
        owner = Owner('pod', 'eth0')
        hosts = {lab.NODE: self.mac, lab.NODE6: self.mac}
        for address in ('100.75.30.81', 'fd00:30::81'):
            self.bind(address, owner=owner, netns=path, mac_of_pod=MAC % 81,
                      subnets=SUBNETS)
        self.assertEqual(hosts, self.neighbours('eth0', 'pod'))
        self.unbind('100.75.30.81', owner=owner)
        del hosts[lab.NODE]
        self.assertEqual(hosts, self.neighbours('eth0', 'pod'))
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))
        self.unbind('fd00:30::81', owner=owner)
        self.assertEqual({}, self.neighbours('eth0', 'pod'))

    def test_addresses_of_the_node_change(self) -> None:
        self.lab.run('ip', 'address', 'del', lab.NODE6 + '/64', 'dev', 'eth0')
        for address in ('100.75.30.52/24', 'fd00:30::52/64', '10.9.9.9/32'):
            self.lab.run('ip', 'address', 'add', address, 'dev', 'eth0',
                         *(('nodad',) if ':' in address else ()))
        self.assertIn('its container is not configured to reach the node',
                      self.problems())
        self.manager().sync()
        hosts = {lab.NODE, '100.75.30.52', 'fd00:30::52', '10.9.9.9'}
        for pod in ('pod-1', 'far'):
            self.assertEqual(dict.fromkeys(hosts, self.mac),
                             self.neighbours('eth0', pod))
        self.assertEqual({'10.9.9.9'}, self.onlink('pod-1'))
        self.assertEqual(hosts, self.onlink('far'))
        for host in hosts:
            self.assertTrue(self.lab.ping(host, 'pod-1'), host)
            self.assertTrue(self.lab.ping(host, 'far'), host)
        self.assertEqual([], self.problems())
        self.assertFalse(self.manager().sync())

    def test_damage_is_mended(self) -> None:
        before = self.neighbours('break0')
        for command in ('del %s dev break0' % POD,
                        'replace %s dev break0 lladdr 02:00:00:00:00:09 '
                        'nud permanent' % POD,
                        'flush dev break0 nud permanent'):
            with self.subTest(command=command):
                self.lab.run('ip', 'neigh', *command.split())
                self.assertNotEqual([], self.problems())
                self.manager().sync()
                self.assertEqual(before, self.neighbours('break0'))
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.assertEqual({}, self.neighbours('break0'))
        self.manager().sync()
        self.assertEqual(before, self.neighbours('break0'))

    def claim(self, liar: str) -> None:
        """Claim the address of pod-1 by an ARP reply from another pod."""
        mac = self.lab.ip('link', 'show', 'eth0', netns=liar)[0]['address']
        target, source = (bytes.fromhex(each.replace(':', ''))
                          for each in (self.mac, mac))
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW,
                             liar) as wire:
            wire.bind(('eth0', 0))
            wire.send(target + source + b'\x08\x06'  # an ARP reply
                      + b'\x00\x01\x08\x00\x06\x04\x00\x02'
                      + source + socket.inet_aton(POD)
                      + target + socket.inet_aton(lab.NODE))

    def test_no_pod_can_claim_the_address_of_another(self) -> None:
        self.add_pod(2)
        self.claim('pod-2')
        # Frames arrive in order, so the ARP reply came before this ping.
        self.assertTrue(self.lab.ping(lab.NODE, 'pod-2', cold=False))
        self.assertEqual(MAC % 1, self.neighbours('break0')[POD])
        # Without the guard, an ARP reply can claim the address.
        self.manager(guard='off').sync()
        self.lab.run('ip', 'neighbour', 'flush', 'dev', 'break0', 'nud',
                     'permanent')
        self.assertTrue(self.lab.ping(POD))

        def is_believed() -> bool:
            # The kernel ignores a new MAC address for a second (locktime).
            self.claim('pod-2')
            return bool(self.lab.ip('neigh', 'show', POD, 'dev', 'break0')[0][
                'lladdr'] == MAC % 2)

        lab.until(is_believed)

    def test_foreign_entries_stay(self) -> None:
        self.lab.run('ip', 'neigh', 'add', '100.75.30.99', 'dev', 'break0',
                     'lladdr', '02:00:00:00:00:09')
        self.manager().sync()
        self.assertIn('100.75.30.99', self.neighbours('break0'))

    def test_a_pod_that_cannot_be_told(self) -> None:
        path = self.lab.add_pod('none', '100.75.30.80', mac=MAC % 80)
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            self.bind('100.75.30.80', owner=Owner('none', 'net1'),
                      netns=path, mac_of_pod=MAC % 80, subnets=SUBNETS)
        self.assertIn('has no interface net1', '\n'.join(logs.output))
        self.assertTrue(self.lab.ping('100.75.30.80'))
        self.assertTrue(self.lab.ping(lab.NODE, 'none'))
        with self.quiet():
            self.manager().sync()  # retries without another warning
        self.lab.run('ip', 'link', 'set', 'eth0', 'name', 'net1', netns='none')
        self.manager().sync()
        self.assertIn(lab.NODE, self.neighbours('net1', 'none'))


class TestFamilies(base.LabTestCase):

    def test_ipv6_is_off_on_the_node(self) -> None:
        with open('/proc/sys/net/ipv6/conf/all/disable_ipv6', 'w') as file:
            file.write('1')
        path = self.lab.add_pod('pod', POD, mac=MAC % 1)
        with self.quiet():
            self.bind(POD, POD6, netns=path, mac_of_pod=MAC % 1,
                      subnets=SUBNETS)
        self.assertEqual({POD}, set(self.lab.routes()))
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))
        self.assertEqual(['IPv6 is disabled on break0'], list(
            problems.by_address(problems.find(self.snapshot())).values()))
        self.assertFalse(self.manager().sync())
        self.unbind(POD, POD6)
        self.assertEqual(set(), self.bound())

    def test_ipv6_only(self) -> None:
        self.lab.add_ipv6()
        self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', 'scope',
                     'global')
        self.lab.run('ip', 'address', 'add', lab.NODE6 + '/64', 'dev', 'eth0',
                     'nodad')
        path = self.lab.add_pod('pod', POD6, mac=MAC % 1)
        with self.quiet():
            self.bind(POD6, netns=path, mac_of_pod=MAC % 1, subnets=SUBNETS)
        self.assertEqual({POD6}, set(self.lab.routes()))
        self.assertTrue(self.lab.ping(POD6))
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))
        self.assertEqual([], self.problems())
