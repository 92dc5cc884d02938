# SPDX-License-Identifier: Apache-2.0

"""Events of the other network namespaces of a node.

The kernel gives the events of all namespaces that this one has a number for
to one socket (NETLINK_LISTEN_ALL_NSID), and says when a number begins and
ends. A number is had by being moved to, or by :func:`number`. That a namespace
has got a name is seen as a change of the mounts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
from typing import Iterator, NamedTuple, Optional

from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel import wire

_SOL_NETLINK = 270
_LISTEN_ALL_NSID = 8
# linux/rtnetlink.h: RTNLGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, _NSID
_GROUPS = 1 << 0 | 1 << 4 | 1 << 8 | 1 << 27
#: Datagrams that are read at once, and bytes of each: only whose it is counts.
_AT_ONCE = 256
_BYTES = 256
_MOUNTS = '/proc/self/mountinfo'


class Changes(NamedTuple):
    """What has happened since it was asked for last.

    :ivar changed: numbers of namespaces in which something changed
    :ivar ended: numbers of namespaces that are no more
    :ivar is_new: whether there may be namespaces that are not known
    :ivar lost: whether there was more than the socket could hold
    :ivar messages: how many were read
    """

    changed: set[int]
    ended: set[int]
    is_new: bool
    lost: bool
    messages: int


class NamespaceEvents:
    """Receives changes of all numbered namespaces."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
            self._socket.bind((0, _GROUPS))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def get(self) -> Changes:
        """Return what has come; nothing if nothing has."""
        changed: set[int] = set()
        ended: set[int] = set()
        is_new = lost = False
        messages = 0
        for messages in range(_AT_ONCE):
            try:
                data, extra, _, _ = self._socket.recvmsg(
                    _BYTES, socket.CMSG_SPACE(4))
            except BlockingIOError:
                break
            except OSError as err:
                lost |= err.errno == errno.ENOBUFS
                continue
            number = _number_of(extra)
            if number is not None:
                changed.add(number)
                continue
            for header in _headers(data):
                if header == wire.RTM_NEWNSID:
                    is_new = True
                elif header == wire.RTM_DELNSID:
                    with contextlib.suppress(struct.error):
                        ended.add(wire.parse_nsid(data, wire.HEADER.size,
                                                  len(data)))
        return Changes(changed, ended, is_new, lost, messages)


def _number_of(extra: list[tuple[int, int, bytes]]) -> Optional[int]:
    for level, kind, data in extra:
        if level == _SOL_NETLINK and kind == _LISTEN_ALL_NSID:
            return int.from_bytes(data[:4], 'little', signed=True)
    return None


def _headers(data: bytes) -> Iterator[int]:
    """Return the kind of the first message; a datagram of events has one."""
    if len(data) >= wire.HEADER.size:
        yield wire.HEADER.unpack_from(data)[1]


class Mounts:
    """Notices changes of the mounts of this process's namespace.

    For select(2), a change is an exceptional condition (proc(5)).
    """

    def __init__(self) -> None:
        self._fd = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


def mounted() -> list[str]:
    """List the paths at which network namespaces are mounted."""
    with open(_MOUNTS, errors='surrogateescape') as file:
        lines = file.readlines()
    found = []
    for line in lines:
        # ID parent major:minor root point options ... - type source ...
        fields, _, rest = line.partition(' - ')
        if rest.startswith('nsfs '):
            root, point = fields.split()[3:5]
            if root.startswith('net:'):
                found.append(re.sub(
                    r'\\([0-7]{3})', lambda code: chr(int(code[1], 8)),
                    point))
    return found


def number(found: namespaces.Found) -> int:
    """Return the number that this namespace has for another one.

    It gets one if it has none, and keeps it until it ends.

    :raises NetnsUnusable: if it cannot be opened
    :raises KernelRefused: if it cannot be numbered
    """
    with namespaces.opened(found.path, found.namespace) as fd, \
            Netlink() as netlink:
        present = netlink.namespace_number(fd)
        if present >= 0:
            return present
        netlink.number_namespace(fd)
        return netlink.namespace_number(fd)
