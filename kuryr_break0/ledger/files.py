# SPDX-License-Identifier: Apache-2.0

"""Reads small untrusted files, locks files, and replaces files atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import time
from typing import Iterator, Optional

from kuryr_break0 import exceptions

#: Prefix of the name of an unfinished file, which a killed writer leaves.
UNFINISHED = '.unfinished.'
#: Seconds between two attempts of :func:`try_lock`.
_PAUSE = 0.001


def now() -> float:
    """Return the seconds since the boot, by a clock that is never set.

    The result is the same in all time namespaces, so a process can compare it
    with the result of a process in another container.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _clock_offset()


@functools.lru_cache(maxsize=None)
def _clock_offset() -> float:
    """Return the offset of this time namespace's clock in seconds.

    The offset is 0 on a kernel without time namespaces (time_namespaces(7)).
    """
    with contextlib.suppress(OSError, ValueError), \
            open('/proc/self/timens_offsets') as file:
        for clock, seconds, nanoseconds in map(str.split, file):
            if clock == 'boottime':
                return int(seconds) + int(nanoseconds) / 1e9
    return 0.0


@contextlib.contextmanager
def convert_errors(directory: str) -> Iterator[None]:
    """Raise LedgerUnavailable for an OSError in the block."""
    try:
        yield
    except OSError as err:
        raise exceptions.LedgerUnavailable(path=directory,
                                           reason=err) from err


_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def open_file(path: str, flags: int) -> Iterator[int]:
    """Open a file, and close it at the end of the ``with`` block.

    The function refuses a link. It does not block at a pipe, because a pod
    must not wait for another program.
    """
    fd = os.open(path, flags | _FLAGS, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int, kind: int, seconds: float = 0) -> bool:
    """Lock an open file by flock(2); closing the file releases the lock.

    The lock belongs to the open file, not to the process as with fcntl(2). So
    another thread, which has opened the file again, does not have the lock.

    :param kind: LOCK_EX or LOCK_SH
    :param seconds: seconds to wait
    :returns: whether the file was locked
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
        time.sleep(_PAUSE)


def is_at(fd: int, path: str) -> bool:
    """Return whether an open file is still the file at a path.

    If the directory was deleted and created again, another file is at the
    path.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


#: Identity of a file's content: inode, mtime in ns, size in bytes.
Stamp = tuple[int, int, int]


def read(path: str, max_size: int) -> str:
    """Read a small regular file.

    :param max_size: bytes
    :raises ValueError: if it is not a regular file, or is larger
    :raises OSError: if the file does not exist or cannot be read
    """
    return read_stamped(path, max_size)[0]


def read_stamped(path: str, max_size: int) -> tuple[str, Stamp]:
    """Read a file as :func:`read`, and return its :func:`stamp` too.

    The function does not use :func:`open_file`, because a context manager
    would take a quarter of the time of the whole read.
    """
    try:
        fd = os.open(path, _FLAGS)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise ValueError('it is a link')
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('it is not a regular file')
        if status.st_size > max_size:
            raise ValueError('it is larger than %d bytes' % max_size)
        return os.read(fd, status.st_size).decode(), _stamp(status)
    finally:
        os.close(fd)


def replace(path: str, text: str) -> None:
    """Replace a file atomically: a reader gets the old or the new text.

    :raises OSError: if the file cannot be written
    """
    directory, name = os.path.split(path)
    # If processes cannot get the lock, several of them may write one file. In
    # different PID namespaces, their PIDs may be equal. So the name of the
    # unfinished file is random, instead of the PID.
    unfinished = os.path.join(directory, '%s%s.%s' % (
        UNFINISHED, os.urandom(8).hex(), name))
    try:
        with open_file(unfinished,
                       os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            # After a short write, the next write reports ENOSPC.
            content = text.encode()
            while content:
                content = content[os.write(fd, content):]
        os.replace(unfinished, path)
    except OSError as err:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        # Report the final path: with the random path, no two log lines would
        # be equal.
        raise OSError(err.errno, err.strerror, path) from err


def stamp(path: str) -> Optional[Stamp]:
    """Return the identity of a file's content; None if it is missing."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size
