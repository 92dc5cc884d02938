# SPDX-License-Identifier: Apache-2.0

"""Multicast and broadcast: between containers, the LAN and the node."""

from __future__ import annotations

import socket
import struct
from typing import Optional

from tests.functional.traffic import base
from tests.support import lab

# The groups of mDNS in both families, and the broadcast address.
GROUP, GROUP6 = '224.0.0.251', 'ff02::fb'
BROADCAST = '100.75.30.255'


class TestGroups(base.TrafficTestCase):

    def device(self, netns: Optional[str]) -> tuple[str, int]:
        """Return name and ifindex of an end's interface."""
        name = {None: 'break0', 'lan': 'nic'}.get(netns, 'eth0')
        link, = self.lab.ip('link', 'show', name, netns=netns)
        return name, link['ifindex']

    def is_heard(self, source: Optional[str], target: Optional[str],
                 group: str, device: Optional[str] = None) -> bool:
        """Return whether a datagram to a group reaches another end.

        :param device: the sender's interface; by default as in device()
        """
        family = socket.AF_INET6 if ':' in group else socket.AF_INET
        name, index = self.device(target)
        with self.lab.socket(family, socket.SOCK_DGRAM,
                             target) as hears, self.lab.socket(
                family, socket.SOCK_DGRAM, source) as sends:
            hears.bind(('', 5353))
            if group == GROUP:
                hears.setsockopt(
                    socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                    struct.pack('4s4si', socket.inet_aton(group), bytes(4),
                                index))
            elif group == GROUP6:
                hears.setsockopt(
                    socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP,
                    socket.inet_pton(family, group) + struct.pack('I', index))
            sends.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sends.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, (
                device or self.device(source)[0]).encode())
            hears.settimeout(0.05)
            # A membership takes effect after a delay.
            for _ in range(10):
                try:
                    sends.sendto(b'who?', (group, 5353))
                    hears.recv(100)
                    return True
                except OSError:
                    continue
            return False

    def test_between_containers_and_the_lan(self) -> None:
        self.lab.settle()
        for ends in (('pod', 'other'), ('pod', 'lan'), ('lan', 'pod')):
            for group in (GROUP, GROUP6, BROADCAST):
                lab.until(lambda: self.is_heard(*ends, group))

    def test_not_from_the_node_by_its_nic(self) -> None:
        for group in (GROUP, GROUP6, BROADCAST):
            lab.until(lambda: self.is_heard(None, 'lan', group, 'eth0'))
            self.assertFalse(self.is_heard(None, 'pod', group, 'eth0'))

    def test_a_program_that_names_break0(self) -> None:
        """break0 carries IPv4 groups, and sends no frame to the LAN."""
        own = (self.lab.link('break0') or {})['address']
        with self.lab.capture() as frames:
            for group in (GROUP, BROADCAST):
                lab.until(lambda: self.is_heard(None, 'pod', group))
                lab.until(lambda: self.is_heard('pod', None, group))
            self.assertFalse(self.is_heard(None, 'pod', GROUP6))
        self.assertGreater(len(frames), 0)
        self.assertEqual([], [frame for frame in frames
                              if frame.src == own])
