# SPDX-License-Identifier: Apache-2.0

"""Watches directories by inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Iterator

# sys/inotify.h
IN_MOVED_TO = 0x80
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
#: struct inotify_event: watch, mask, cookie, size of the name that follows
_EVENT = struct.Struct('=iIII')
#: Bytes for all events that the kernel queues (fs.inotify.max_queued_events)
_QUEUE = 2 ** 20
_LIBC = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """An inotify instance. Reading it never blocks.

    To close an instance, the kernel needs more than 10 ms
    (fsnotify_mark_srcu).

    :raises OSError: if a limit of the node allows no further instance
    """

    def __init__(self) -> None:
        self._fd = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def watch(self, path: str, mask: int) -> None:
        """Watch a path; an existing watch of the path gets the new mask.

        :param mask: the kinds of events, as a sum of the constants above
        :raises OSError: if the path does not exist, or a limit of the node
            allows no further watch
        """
        _checked(_LIBC.inotify_add_watch(self._fd, os.fsencode(path),
                                         ctypes.c_uint32(mask)), path)

    def read(self) -> list[str]:
        """Return the file name of each pending event.

        A name is empty if the event is about the watched path itself, or if
        the kernel has dropped events.
        """
        try:
            return list(_names(os.read(self._fd, _QUEUE)))
        except BlockingIOError:
            return []


def _names(data: bytes) -> Iterator[str]:
    place = 0
    while place < len(data):
        *_, size = _EVENT.unpack_from(data, place)
        place += _EVENT.size + size
        yield os.fsdecode(data[place - size:place].rstrip(b'\0'))


def _checked(result: int, path: object = None) -> int:
    """Return a result of the C library, or raise its error."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
