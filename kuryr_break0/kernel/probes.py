# SPDX-License-Identifier: Apache-2.0

"""Pings hosts and detects duplicate addresses, by raw sockets.

A container image may lack ``ping``. All functions use the network namespace of
the calling thread. The functions with raw sockets raise NotPermitted without
CAP_NET_RAW.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any, Iterator, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel.wire import family_of
from kuryr_break0 import model

# RFC 792, RFC 4443: types of echo request and reply
_TYPES = {4: (8, 0), 6: (128, 129)}
_HEADER = struct.Struct('!BBHHH')  # type, code, checksum, identifier, number
_SO_BINDTOIFINDEX = 62
_ETH_P_ALL = 3
_ARP, _IPV6 = 0x0806, 0x86dd
_BROADCAST = b'\xff' * 6
#: Number of probes for an address, and seconds to wait after each probe. The
#: number is above 1 because a probe may be lost.
_TRIES, _PAUSE = 3, 0.5


def ping(address: model.IPAddress, count: int, timeout: float,
         vrf: int = 0) -> list[Optional[float]]:
    """Send echo requests, one after the other.

    :param timeout: seconds to wait for each reply
    :param vrf: ifindex of the VRF to send in; 0 for none
    :returns: the round-trip time of each request in seconds; None for a
        request without a reply
    """
    try:
        wire = socket.socket(
            family_of(address), socket.SOCK_RAW, socket.IPPROTO_ICMP
            if address.version == 4 else socket.IPPROTO_ICMPV6)
    except PermissionError as err:
        raise exceptions.NotPermitted(
            action='ping', capability='CAP_NET_RAW') from err
    # The identifier is random: other programs of the node may ping the same
    # address.
    identifier = int.from_bytes(os.urandom(2), 'big')
    with wire:
        _enter(wire, vrf)
        return [_ping(wire, address, identifier, number, timeout)
                for number in range(count)]


def connect(address: model.IPAddress, port: int, count: int, timeout: float,
            vrf: int = 0) -> list[Optional[float]]:
    """Open TCP connections, one after the other.

    If the host refuses the connection, the refusal counts as a reply. For the
    other parameters and the result, see :func:`ping`.
    """
    times: list[Optional[float]] = []
    for _ in range(count):
        began = time.monotonic()
        try:
            with socket.socket(family_of(address)) as wire:
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


def find_claimants(interface: str, address: model.IPAddress) -> list[str]:
    """Probe a link for hosts that have an address.

    The probes (RFC 5227, RFC 4862) have the MAC address of the interface and
    no source address, so no host updates its neighbour table.

    :returns: the MAC addresses of the hosts, without the MAC address of the
        interface
    :raises SystemRefused: if the interface cannot be used
    """
    try:
        # With protocol 0 the socket receives nothing before it is bound.
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
            wire.bind((interface, _ETH_P_ALL))
            own = wire.getsockname()[4]
            question = (_arp_probe(own, address) if address.version == 4
                        else _solicitation(own, address))
            macs: set[Optional[bytes]] = set()
            for _ in range(_TRIES):
                wire.send(question)
                macs.update(_parse_claim(frame, address) for frame, _
                            in _receive_for(wire, _PAUSE))
            return sorted(each.hex(':') for each in macs - {own} if each)
    except PermissionError as err:
        raise exceptions.NotPermitted(
            action='probe for an address', capability='CAP_NET_RAW') from err
    except OSError as err:
        raise exceptions.SystemRefused(reason='%s: %s' % (
            interface, err.strerror or err)) from err


def _enter(wire: socket.socket, vrf: int) -> None:
    if vrf:
        wire.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, vrf)


def _receive_for(wire: socket.socket, seconds: float
                 ) -> Iterator[tuple[bytes, Any]]:
    """Iterate over the packets that arrive within ``seconds``.

    :returns: pairs of a packet and its source address
    """
    deadline = time.monotonic() + seconds
    while True:
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0:
            return
        wire.settimeout(seconds_left)
        try:
            yield wire.recvfrom(2048)
        except socket.timeout:
            return


def _ping(wire: socket.socket, address: model.IPAddress, identifier: int,
          number: int, timeout: float) -> Optional[float]:
    request, reply = _TYPES[address.version]
    # For ICMPv6 the kernel computes the checksum again (RFC 3542, 3.1).
    parts = [request, 0, 0, identifier, number]
    parts[2] = _checksum(_HEADER.pack(*parts))
    sent = time.monotonic()
    try:
        wire.sendto(_HEADER.pack(*parts), (str(address), 0))
        for data, source in _receive_for(wire, timeout):
            if address.version == 4:
                data = data[(data[0] & 0x0f) * 4:]  # skip the IP header
            if len(data) < _HEADER.size or source[0] != str(address):
                continue
            kind, _, _, *which = _HEADER.unpack_from(data)
            if kind == reply and which == [identifier, number]:
                return time.monotonic() - sent
    except OSError:  # no route
        pass
    return None


def _arp_probe(own: bytes, address: model.IPAddress) -> bytes:
    return (_BROADCAST + own + struct.pack('!HHHBBH', _ARP, 1, 0x0800, 6, 4,
                                           1)
            + own + bytes(4) + bytes(6) + address.packed)


def _solicitation(own: bytes, address: model.IPAddress) -> bytes:
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


def _parse_claim(frame: bytes, address: model.IPAddress) -> Optional[bytes]:
    """Return the sender's MAC address if a frame claims an address."""
    kind, = struct.unpack_from('!H', frame + bytes(14), 12)
    packet = frame[14:]
    if kind == _ARP and address.version == 4 and len(packet) >= 28:
        # In a request and in a reply, this field has the sender's IP address.
        if packet[14:18] == address.packed:
            return packet[8:14]
    elif kind == _IPV6 and address.version == 6 and len(packet) >= 64:
        if (packet[6] == 58 and packet[40] == 136
                and packet[48:64] == address.packed):
            return frame[6:12]
    return None
