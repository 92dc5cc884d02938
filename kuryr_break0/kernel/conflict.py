# SPDX-License-Identifier: Apache-2.0

"""Finds who else on a link has an address: RFC 5227 and RFC 4862."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from typing import Optional

from kuryr_break0 import exceptions
from kuryr_break0.model import IPAddress

_ETH_P_ALL = 3
_ARP, _IPV6 = 0x0806, 0x86dd
_SIOCGIFHWADDR = 0x8927
_BROADCAST = b'\xff' * 6
_TRIES = 3


def claimants(interface: str, address: IPAddress, seconds: float
              ) -> set[str]:
    """Ask a link who has an address, as one who has none yet.

    From the network namespace of the calling thread, with the MAC address of
    an interface there. Nobody learns anything from it.

    :returns: the MAC addresses of those who answer, but the own one
    :raises NotPermitted: without CAP_NET_RAW
    :raises SystemRefused: if the interface cannot be used
    """
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW,
                           socket.htons(_ETH_P_ALL)) as wire:
            wire.bind((interface, _ETH_P_ALL))
            own = _mac_of(wire, interface)
            return _asked(wire, own, address, seconds) - {own.hex(':')}
    except PermissionError as err:
        raise exceptions.NotPermitted(
            action='ask for an address', capability='CAP_NET_RAW') from err
    except OSError as err:
        raise exceptions.SystemRefused(reason='%s: %s' % (
            interface, err.strerror or err)) from err


def _mac_of(wire: socket.socket, interface: str) -> bytes:
    request = struct.pack('256s', os.fsencode(interface)[:15])
    return bytes(fcntl.ioctl(wire.fileno(), _SIOCGIFHWADDR,
                             request)[18:24])


def _asked(wire: socket.socket, own: bytes, address: IPAddress,
           seconds: float) -> set[str]:
    question = (_arp_probe(own, address) if address.version == 4
                else _solicitation(own, address))
    found = set()
    for _ in range(_TRIES):
        wire.send(question)
        deadline = time.monotonic() + seconds / _TRIES
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            wire.settimeout(left)
            with contextlib.suppress(socket.timeout):
                mac = _answered(wire.recv(2048), address)
                if mac is not None:
                    found.add(mac)
    return found


def _arp_probe(own: bytes, address: IPAddress) -> bytes:
    return (_BROADCAST + own + struct.pack('!HHHBBH', _ARP, 1, 0x0800, 6, 4,
                                           1)
            + own + bytes(4) + bytes(6) + address.packed)


def _solicitation(own: bytes, address: IPAddress) -> bytes:
    group = bytes.fromhex('ff0200000000000000000001ff') + address.packed[-3:]
    body = struct.pack('!BBHI', 135, 0, 0, 0) + address.packed
    pseudo = bytes(16) + group + struct.pack('!II', len(body), 58)
    body = body[:2] + struct.pack('!H', _checksum(pseudo + body)) + body[4:]
    return (b'\x33\x33' + group[-4:] + own + struct.pack(
        '!HIHBB', _IPV6, 6 << 28, len(body), 58, 255)
        + bytes(16) + group + body)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def _answered(frame: bytes, address: IPAddress) -> Optional[str]:
    """Return the MAC address of who says that it has an address, or None."""
    kind, = struct.unpack_from('!H', frame + bytes(14), 12)
    packet = frame[14:]
    if kind == _ARP and address.version == 4 and len(packet) >= 28:
        # Of an answer, or of one who asks for the same at this moment.
        if packet[14:18] == address.packed:
            return packet[8:14].hex(':')
    elif kind == _IPV6 and address.version == 6 and len(packet) >= 64:
        if (packet[6] == 58 and packet[40] == 136
                and packet[48:64] == address.packed):
            return frame[6:12].hex(':')
    return None
