# SPDX-License-Identifier: Apache-2.0

"""A netlink socket that receives events.

If a flood of events overflows the buffer of the socket, the socket reports the
loss. It reports a truncated event as a loss too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, Iterator

from kuryr_break0.kernel import netlink

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
#: Number of datagrams to read at once, and maximum bytes of each datagram.
_AT_ONCE, _DATAGRAM = 256, 2 ** 16
#: Bytes of the socket buffer, which has room for about 10,000 events. The
#: default of 208 KiB has room for 250 events. The deletion of a break0 causes
#: two events for each address.
_HELD = 2 ** 23


class EventSocket(netlink.Socket):
    """A socket that receives events in the namespace of the calling thread.

    :param groups: multicast groups, as bits
    :param options: socket options to set before binding
    """

    _overrun = False

    def __init__(self, protocol: int, groups: int, *options: int) -> None:
        self._groups = groups
        self._options = options
        self._protocol = protocol
        self._socket = self._open_socket()

    def _open_socket(self) -> socket.socket:
        made = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK,
            self._protocol)
        try:
            # SO_RCVBUFFORCE fails for the root of a user namespace. In this
            # case the buffer keeps the size that SO_RCVBUF has set, which is
            # at most twice rmem_max.
            for option in socket.SO_RCVBUF, _SO_RCVBUFFORCE:
                with contextlib.suppress(PermissionError):
                    made.setsockopt(socket.SOL_SOCKET, option, _HELD)
            for option in self._options:
                made.setsockopt(netlink.SOL_NETLINK, option, 1)
            made.bind((0, self._groups))
        except OSError:
            made.close()
            raise
        return made

    def fileno(self) -> int:
        """Return the descriptor, for select(2) to wait for events."""
        return self._socket.fileno()

    def _drop(self) -> None:
        """Drop the pending events, because reading them would take longer.

        A new socket replaces the old socket, and gets its descriptor.
        """
        with contextlib.suppress(OSError), self._open_socket() as new:
            os.dup2(new.fileno(), self._socket.fileno(), inheritable=False)
            self._overrun = False

    def _receive(self, most: int = _AT_ONCE) -> Iterator[tuple[bytes, Any]]:
        """Iterate over the pending datagrams, with their ancillary data.

        An empty datagram stands for lost events, for example after ENOBUFS.
        After ENOBUFS, the kernel drops all events without another error until
        the reader has drained the socket (netlink_overrun). So a second empty
        datagram follows the last pending datagram.
        """
        for _ in range(most):
            try:
                data, extra, flags, _ = self._socket.recvmsg(
                    _DATAGRAM, socket.CMSG_SPACE(netlink.U32.size))
            except BlockingIOError:
                if self._overrun:
                    self._overrun = False
                    yield b'', ()
                return
            except OSError:
                self._overrun = True
                yield b'', ()
            else:
                # The parser could misread a truncated message.
                yield b'' if flags & socket.MSG_TRUNC else data, extra
