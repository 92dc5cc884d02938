# SPDX-License-Identifier: Apache-2.0

"""The base of tests of the guard, and forged packets."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any, Optional

from kuryr_break0 import kernel
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.support import lab

MAC, OTHER_MAC = 'fa:16:3e:00:00:01', 'fa:16:3e:00:00:02'
POD6, OTHER6 = 'fd00:30::71', 'fd00:30::72'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
BEYOND = '198.51.100.9'


def checksum(data: bytes) -> int:
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(':', ''))


def udp(source: str, target: str) -> bytes:
    """Return the EtherType and IP packet of a datagram to port 9999."""
    data = struct.pack('!HHHH', 1234, 9999, 12, 0) + b'spam'
    src, dst = (ipaddress.ip_address(each) for each in (source, target))
    if src.version == 6:
        pseudo = src.packed + dst.packed + struct.pack('!II', 12, 17) + data
        data = data[:6] + struct.pack('!H', checksum(pseudo)) + data[8:]
        return (b'\x86\xdd' + struct.pack('!IHBB', 6 << 28, 12, 17, 64)
                + src.packed + dst.packed + data)
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 32, 1, 0, 64, 17, 0,
                       src.packed, dst.packed)
    head = head[:10] + struct.pack('!H', checksum(head)) + head[12:]
    return b'\x08\x00' + head + data


def icmp6(source: str, target: str, body: bytes) -> bytes:
    src, dst = (ipaddress.ip_address(each).packed
                for each in (source, target))
    pseudo = src + dst + struct.pack('!II', len(body), 58)
    body = body[:2] + struct.pack('!H', checksum(pseudo + body)) + body[4:]
    return (b'\x86\xdd' + struct.pack('!IHBB', 6 << 28, len(body), 58, 255)
            + src + dst + body)


class BorderTestCase(base.LabTestCase):
    """A node with two bound pods, each with an IPv4 and IPv6 address."""

    overrides: dict[str, Any] = {}

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        for name in ('all', 'default', 'eth0'):
            kernel.write_sysctl('ipv4/conf/%s/rp_filter' % name, 0)
        self.netns = self.lab.add_pod('pod', POD, POD6, mac=MAC)
        self.lab.add_pod('other', OTHER_POD, OTHER6, mac=OTHER_MAC)
        self.bind_both()
        self.mac = (self.lab.link('break0') or {})['address']

    def bind_both(self) -> None:
        for name, owner, texts, mac in (
                ('pod', OWNER, (POD, POD6), MAC),
                ('other', OTHER_OWNER, (OTHER_POD, OTHER6), OTHER_MAC)):
            self.bind(*texts, owner=owner, netns='/run/netns/' + name,
                      mac_of_pod=mac, subnets=SUBNETS, **self.overrides)

    def send(self, payload: bytes, source: str = MAC,
             target: Optional[str] = None, times: int = 1) -> None:
        """Send a frame from the pod ``times`` times."""
        frame = packed(target or self.mac) + packed(source) + payload
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW,
                             'pod') as wire:
            wire.bind(('eth0', 0))
            for _ in range(times):
                try:
                    wire.send(frame.ljust(60, b'\0'))
                except OSError:  # the guard in the pod drops the frame
                    pass

    def received(self, payload: bytes, source: str = MAC,
                 family: int = socket.AF_INET) -> bool:
        """Return whether the node receives a datagram of the pod."""
        with self.lab.socket(family, socket.SOCK_DGRAM) as node:
            node.bind(('', 9999))
            node.settimeout(0.3)
            self.send(payload, source)
            try:
                node.recv(100)
            except socket.timeout:
                return False
            return True

    def assert_received(self, payload: bytes, source: str = MAC,
                        family: int = socket.AF_INET) -> None:
        lab.until(lambda: self.received(payload, source, family))

    def assert_reachable(self) -> None:
        for address in (POD, POD6, OTHER_POD, OTHER6):
            self.assertTrue(self.lab.ping(address), address)
        for name in ('pod', 'other'):
            for host in (lab.NODE, lab.NODE6):
                self.assertTrue(self.lab.ping(host, name), host)
