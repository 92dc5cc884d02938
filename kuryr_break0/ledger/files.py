# SPDX-License-Identifier: Apache-2.0

"""Reads small untrusted files, and replaces files atomically."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from typing import Optional

#: Begins the names of files whose writer has not finished, or was killed.
UNFINISHED = '.unfinished.'


def now() -> float:
    """Return the seconds since the boot, which nobody can set back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: str, max_size: int) -> str:
    """Read a small regular file.

    :param max_size: bytes
    :raises ValueError: if it is anything else
    :raises OSError: if it is not there or cannot be read
    """
    try:
        # A link or a pipe is none of ours; neither must hold up a pod.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                     | os.O_CLOEXEC)
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
        content = os.read(fd, found.st_size)
    finally:
        os.close(fd)
    return content.decode()


def replace(path: str, text: str) -> None:
    """Write a file: all of it is there, or what was there before.

    :raises OSError: if it cannot be written
    """
    directory, name = os.path.split(path)
    # Writers of one file may be several, where one could not have the lock.
    unfinished = os.path.join(directory, '%s%d.%s' % (
        UNFINISHED, threading.get_native_id(), name))
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                     | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # A short write says ENOSPC only when it is repeated.
            content = text.encode()
            while content:
                content = content[os.write(fd, content):]
        finally:
            os.close(fd)
        os.replace(unfinished, path)
    except OSError:
        try:
            os.unlink(unfinished)
        except OSError:
            pass
        raise


#: What a later file of the same name does not have in common with one.
Stamp = tuple[int, int, int]


def stamp(path: str) -> Optional[Stamp]:
    """Return the identity of a file, which a later one of its name has not."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
