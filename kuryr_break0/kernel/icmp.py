# SPDX-License-Identifier: Apache-2.0

"""Echo requests by raw sockets, which every image has; not so ``ping``."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Optional

from kuryr_break0 import exceptions
from kuryr_break0.model import IPAddress

# RFC 792, RFC 4443: types of echo request and reply
_TYPES = {4: (8, 0), 6: (128, 129)}
_HEADER = struct.Struct('!BBHHH')  # type, code, checksum, identifier, number
_SO_BINDTOIFINDEX = 62


def ping(address: IPAddress, count: int, timeout: float,
         vrf: int = 0) -> list[Optional[float]]:
    """Send echo requests, each when the one before is answered or given up.

    From the network namespace of the calling thread.

    :param timeout: seconds to wait for each reply
    :param vrf: ifindex of the VRF to send them in; 0 for none
    :returns: seconds that each took; None for one without a reply
    :raises NotPermitted: without CAP_NET_RAW
    """
    family, protocol = ((socket.AF_INET, socket.IPPROTO_ICMP)
                        if address.version == 4 else
                        (socket.AF_INET6, socket.IPPROTO_ICMPV6))
    try:
        wire = socket.socket(family, socket.SOCK_RAW, protocol)
    except PermissionError as err:
        raise exceptions.NotPermitted(
            action='ping', capability='CAP_NET_RAW') from err
    # Others on the node may be pinging the same address.
    identifier = int.from_bytes(os.urandom(2), 'big')
    with wire:
        _enter(wire, vrf)
        return [_ask(wire, address, identifier, number, timeout)
                for number in range(count)]


def connect(address: IPAddress, port: int, count: int, timeout: float,
            vrf: int = 0) -> list[Optional[float]]:
    """Connect by TCP; as :func:`ping`, and refused is answered too."""
    times: list[Optional[float]] = []
    for _ in range(count):
        began = time.monotonic()
        try:
            with socket.socket(socket.AF_INET if address.version == 4
                               else socket.AF_INET6) as wire:
                _enter(wire, vrf)
                wire.settimeout(timeout)
                wire.connect((str(address), port))
        except ConnectionRefusedError:
            pass
        except OSError:
            times.append(None)
            continue
        times.append(time.monotonic() - began)
    return times


def _enter(wire: socket.socket, vrf: int) -> None:
    if vrf:
        wire.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, vrf)


def _ask(wire: socket.socket, address: IPAddress, identifier: int,
         number: int, timeout: float) -> Optional[float]:
    request, reply = _TYPES[address.version]
    sent = time.monotonic()
    try:
        wire.sendto(_packet(request, identifier, number), (str(address), 0))
        while True:
            left = sent + timeout - time.monotonic()
            if left <= 0:
                return None
            wire.settimeout(left)
            data, source = wire.recvfrom(2048)
            received = time.monotonic()
            if address.version == 4:
                data = data[(data[0] & 0x0f) * 4:]  # behind the IP header
            if len(data) < _HEADER.size or source[0] != str(address):
                continue
            kind, _, _, *which = _HEADER.unpack_from(data)
            if kind == reply and which == [identifier, number]:
                return received - sent
    except OSError:  # timed out, or no way
        return None


def _packet(kind: int, identifier: int, number: int) -> bytes:
    # For ICMPv6 the kernel computes the checksum again (RFC 3542, 3.1).
    packet = _HEADER.pack(kind, 0, 0, identifier, number)
    total = sum(struct.unpack('!4H', packet))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return _HEADER.pack(kind, 0, ~total & 0xffff, identifier, number)
