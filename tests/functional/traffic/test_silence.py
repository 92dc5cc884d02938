# SPDX-License-Identifier: Apache-2.0

"""No connection waits longer than its route was missing.

Without the route, the node asks the LAN for the pod. The kernel holds what it
has to send for three seconds, and TCP sends nothing again that is held.
"""

from __future__ import annotations

import socket
from typing import Optional

from kuryr_break0.model import Owner
from tests.functional.traffic import base
from tests import lab

LATE, LATE6 = '100.75.30.73', 'fd00:30::73'
LATE_MAC = 'fa:16:3e:00:00:73'


class SilenceTestCase(base.TrafficTestCase):

    def state(self, address: str) -> Optional[str]:
        """The state of a neighbour on the NIC."""
        found = self.lab.ip('neighbour', 'show', address, 'dev', 'eth0',
                            'nud', 'all')
        return found[0]['state'][0] if found else None

    def until_held(self, address: str) -> None:
        lab.until(lambda: self.state(address) == 'INCOMPLETE')

    def hold(self, address: str) -> None:
        """Let the kernel hold a datagram for an address."""
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

    def test_what_was_not_repaired_is_left_alone(self) -> None:
        stranger = '100.75.30.99'
        self.lab.run('ip', 'neighbour', 'add', base.POD, 'lladdr',
                     base.MAC, 'dev', 'eth0', 'nud', 'permanent')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.hold(stranger)
        self.manager().sync()
        self.assertEqual('INCOMPLETE', self.state(stranger))
        self.assertEqual('PERMANENT', self.state(base.POD))


class TestBind(SilenceTestCase):

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
