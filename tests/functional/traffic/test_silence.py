# SPDX-License-Identifier: Apache-2.0

"""Connections continue as soon as the missing route of their pod is set.

Without the route, the node resolves the pod on the LAN. The kernel holds the
packets for up to three seconds, and TCP does not retransmit a held segment.
"""

from __future__ import annotations

import socket
from typing import Optional

from kuryr_break0 import kernel
from kuryr_break0.model import Owner
from tests.functional import border_base
from tests.functional.traffic import base
from tests.support import lab

LATE, LATE6 = '100.75.30.73', 'fd00:30::73'
LATE_MAC = 'fa:16:3e:00:00:73'


class SilenceTestCase(base.TrafficTestCase):

    def setUp(self) -> None:
        super().setUp()
        # With this interval the kernel asks once and then waits, even on a
        # slow machine.
        for family in ('ipv4', 'ipv6'):
            kernel.write_sysctl('%s/neigh/eth0/retrans_time_ms' % family,
                                1000 * lab.PATIENCE)

    def state(self, address: str) -> Optional[str]:
        """Return the state of a neighbour on the NIC, or None."""
        found = self.lab.ip('neighbour', 'show', address, 'dev', 'eth0',
                            'nud', 'all')
        return found[0]['state'][0] if found else None

    def until_held(self, address: str) -> None:
        lab.until(lambda: self.state(address) == 'INCOMPLETE')

    def hold(self, address: str) -> None:
        """Make the kernel hold a datagram for an address."""
        with self.lab.socket(socket.AF_INET6 if ':' in address
                             else socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.sendto(b'held', (address, base.PORT))
        self.until_held(address)

    def connection(self, address: str) -> tuple[socket.socket,
                                                socket.socket]:
        family = socket.AF_INET6 if ':' in address else socket.AF_INET
        with self.lab.socket(family, netns='pod') as listening:
            listening.bind((address, base.PORT))
            listening.listen()
            client = self.lab.socket(family)
            self.addCleanup(client.close)
            client.connect((address, base.PORT))
            server = listening.accept()[0]
        self.addCleanup(server.close)
        server.settimeout(lab.PATIENCE)
        return client, server


class TestRepair(SilenceTestCase):

    def test_nothing_is_held_after_a_sync(self) -> None:
        for address in (base.POD, base.POD6):
            client, server = self.connection(address)
            self.lab.run('ip', 'link', 'del', 'break0')
            client.send(b'spam')
            self.until_held(address)
            with self.lab.capture() as frames:
                self.manager().sync()
                self.assertIsNone(self.state(address))
                self.assertEqual(b'spam', server.recv(100))
            self.assertEqual([], [
                frame for frame in frames
                if frame.dst == base.MAC or frame.asks == address])

    def test_foreign_neighbours_are_left_alone(self) -> None:
        stranger = '100.75.30.99'
        self.lab.run('ip', 'neighbour', 'add', base.POD, 'lladdr',
                     base.MAC, 'dev', 'eth0', 'nud', 'permanent')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.hold(stranger)
        self.manager().sync()
        self.assertEqual('INCOMPLETE', self.state(stranger))
        self.assertEqual('PERMANENT', self.state(base.POD))

    def test_without_the_guard(self) -> None:
        client, server = self.connection(base.POD)
        self.manager(guard='off').sync()
        self.lab.run('ip', 'link', 'del', 'break0')
        client.send(b'spam')
        self.until_held(base.POD)
        self.manager(guard='off').sync()
        self.assertIsNone(self.state(base.POD))
        self.assertEqual(b'spam', server.recv(100))


class TestBind(SilenceTestCase):

    def test_connection_begun_before_the_container_started(self) -> None:
        self.require_rewriting()
        for address in (LATE, LATE6):
            client = self.lab.socket(
                socket.AF_INET6 if ':' in address else socket.AF_INET)
            self.addCleanup(client.close)
            client.setblocking(False)
            client.connect_ex((address, base.PORT))
            self.until_held(address)
            name = 'late%d' % len(address)
            self.lab.add_pod(name, address, mac=LATE_MAC)
            with self.serving(name), self.lab.capture() as frames:
                self.bind(address, owner=Owner(name, 'eth0'),
                          netns='/run/netns/' + name, mac_of_pod=LATE_MAC,
                          subnets=base.SUBNETS)
                self.assertIsNone(self.state(address))
                client.settimeout(lab.PATIENCE)
                self.assertEqual((lab.NODE6 if ':' in address
                                  else lab.NODE).encode(), client.recv(100))
            self.assertEqual([], [frame for frame in frames
                                  if frame.dst == LATE_MAC])
            self.unbind(address, owner=Owner(name, 'eth0'))
            self.lab.del_netns(name)

    def test_containers_cannot_use_the_way(self) -> None:
        """A container in private mode reaches no container of its node."""
        self.lab.add_netns('private')
        self.lab.run('ip', 'link', 'add', 'new', 'link', 'eth0', 'netns',
                     'private', 'type', 'macvlan', 'mode', 'private')
        self.lab.run('ip', 'link', 'set', 'new', 'up', netns='private')
        payload = border_base.udp(lab.LAN, base.POD)
        with self.lab.socket(socket.AF_INET, socket.SOCK_DGRAM,
                             'pod') as pod, self.lab.socket(
                socket.AF_PACKET, socket.SOCK_RAW, 'private') as made:
            pod.bind(('', 9999))
            made.bind(('new', 0))
            with self.lab.capture() as frames:
                for source in (lab.PARENT, 'nic'):
                    link, = self.lab.ip('link', 'show', source, netns=None
                                        if source == lab.PARENT else 'lan')
                    made.send(border_base.packed(base.MAC)
                              + border_base.packed(link['address'])
                              + payload)
            # The frames went to the LAN only.
            self.assertEqual(2, len([frame for frame in frames
                                     if frame.dst == base.MAC]))
            pod.settimeout(0.3)
            self.assertRaises(socket.timeout, pod.recv, 100)

    def test_its_interface_is_down(self) -> None:
        self.hold(LATE)
        self.lab.add_pod('late', LATE, mac=LATE_MAC)
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='late')
        with self.lab.capture() as frames:
            self.bind(LATE, owner=Owner('late', 'eth0'),
                      netns='/run/netns/late', mac_of_pod=LATE_MAC)
            self.assertIsNone(self.state(LATE))
        self.assertEqual([], [frame for frame in frames
                              if frame.dst == LATE_MAC])

    def test_nothing_is_held_after_a_bind(self) -> None:
        for address in (LATE, LATE6):
            self.hold(address)
        self.add_pod('late', LATE_MAC, LATE, LATE6)
        for address in (LATE, LATE6):
            self.assertIsNone(self.state(address))

    def test_the_next_one_of_an_address(self) -> None:
        self.unbind(base.POD, base.POD6, owner=Owner('pod', 'eth0'))
        self.lab.del_netns('pod')
        for address in (base.POD, base.POD6):
            self.hold(address)
        self.add_pod('next', LATE_MAC, base.POD, base.POD6)
        for address in (base.POD, base.POD6):
            self.assertIsNone(self.state(address))
            self.assertTrue(self.lab.ping(address))
