# SPDX-License-Identifier: Apache-2.0

"""Reads small untrusted files, locks files, and replaces them atomically."""

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

#: Begins the names of files whose writer has not finished, or was killed.
UNFINISHED = '.unfinished.'
#: Seconds that :func:`take` waits at least if another has the lock.
_PAUSE = 0.001


def now() -> float:
    """Return the seconds since the boot, which nobody can set back.

    The same in each container, since processes compare their times.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _clock_offset()


@functools.lru_cache(maxsize=None)
def _clock_offset() -> float:
    """Return the seconds that the clock of this time namespace is ahead.

    0 on a kernel without time namespaces; see time_namespaces(7).
    """
    with contextlib.suppress(OSError, ValueError), \
            open('/proc/self/timens_offsets') as file:
        for clock, seconds, nanoseconds in map(str.split, file):
            if clock == 'boottime':
                return int(seconds) + int(nanoseconds) / 1e9
    return 0.0


@contextlib.contextmanager
def usable(directory: str) -> Iterator[None]:
    """Raise LedgerUnavailable for an error of the system in the block."""
    try:
        yield
    except OSError as err:
        raise exceptions.LedgerUnavailable(path=directory,
                                           reason=err) from err


_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Open a file; the descriptor is of the block.

    A link or a pipe is none of ours; neither must hold up a pod.
    """
    fd = os.open(path, flags | _FLAGS, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def take(fd: int, kind: int, seconds: float = 0) -> bool:
    """Lock an open file by flock(2), which its end frees.

    The lock belongs to the open file, so that other users of the file in the
    same process neither have it nor lose it, as they would one of fcntl(2).

    :param kind: LOCK_EX or LOCK_SH
    :returns: whether it could be had within so many seconds
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
    """Return whether an open file is the one that others open at a path.

    It is not if its directory was lost, and made again.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


#: What a later file of the same name does not have in common with one.
Stamp = tuple[int, int, int]


def read(path: str, max_size: int) -> str:
    """Read a small regular file.

    :param max_size: bytes
    :raises ValueError: if it is anything else
    :raises OSError: if it is not there or cannot be read
    """
    return read_stamped(path, max_size)[0]


def read_stamped(path: str, max_size: int) -> tuple[str, Stamp]:
    """Read a file as :func:`read`, and its :func:`stamp`.

    Without :func:`opened`, which takes a quarter of the time.
    """
    try:
        fd = os.open(path, _FLAGS)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise ValueError('it is a link')
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError('it is not a regular file')
        if found.st_size > max_size:
            raise ValueError('it is larger than %d bytes' % max_size)
        return os.read(fd, found.st_size).decode(), _stamp(found)
    finally:
        os.close(fd)


def replace(path: str, text: str) -> None:
    """Write a file: all of it is there, or what was there before.

    :raises OSError: if it cannot be written
    """
    directory, name = os.path.split(path)
    # Writers of one file may be several, where one could not have the lock,
    # and of several process namespaces, with one number.
    unfinished = os.path.join(directory, '%s%s.%s' % (
        UNFINISHED, os.urandom(8).hex(), name))
    try:
        with opened(unfinished,
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            # A short write says ENOSPC only when it is repeated.
            content = text.encode()
            while content:
                content = content[os.write(fd, content):]
        os.replace(unfinished, path)
    except OSError as err:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        # Each time the same, or each would be another line in the log.
        raise OSError(err.errno, err.strerror, path) from err


def stamp(path: str) -> Optional[Stamp]:
    """Return the identity of a file, which a later one of its name has not."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_mtime_ns, found.st_size
