# SPDX-License-Identifier: Apache-2.0

"""Other network namespaces: what they are, and how to be in them.

A path proves little. The file may be a placeholder whose mount has not been
propagated, it may be the path of another mount or process namespace, and the
kernel uses inode numbers again. Whether one still exists is for
:mod:`kuryr_break0.kernel.existence` to say.

What takes the path of a namespace raises NetnsUnusable if that cannot be
opened, or is another one, and SystemRefused if this process lacks descriptors
or memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys
from typing import Iterator, Optional

from kuryr_break0 import exceptions
from kuryr_break0.model import NamespaceId

#: The network namespace of this thread
OWN = '/proc/thread-self/ns/net'
#: ioctl(2) on nsfs: the number of a namespace that is never used again
#: (linux/nsfs.h, linux 6.18). It is SO_NETNS_COOKIE, without entering.
_NS_GET_ID = 0x8008b70d
#: ioctl(2) on nsfs: which kind it is, as for clone(2) (linux 4.11)
_NS_GET_NSTYPE = 0xb703
# linux/nsfs.h and linux/exportfs.h: a file handle of a namespace
_FILEID_NSFS = 0xf1
_CLONE_NEWNET = 0x40000000
_HANDLE = struct.Struct('=IiQII')  # size, type; id, kind, inode
_LIBC = ctypes.CDLL(None, use_errno=True)


def identify(path: Optional[str]) -> Optional[NamespaceId]:
    """Return what the namespace at a path is; None if there is none.

    A file that is no network namespace, as a placeholder, a pipe or a
    device, is none, and is not opened.
    """
    with contextlib.suppress(OSError):
        return None if path is None else identify_or_fail(path)
    return None


def identify_or_fail(path: str) -> NamespaceId:
    """Return what the namespace at a path is.

    :raises OSError: ENOENT if nothing is there, ENXIO if it is no namespace,
        EINVAL if it is no path; any other is of this process, as EMFILE
    """
    with _file(path) as fd:
        return identify_file(fd)


def identify_file(fd: int) -> NamespaceId:
    """Return what an open namespace is."""
    found = os.fstat(fd)
    number = bytearray(8)
    try:
        fcntl.ioctl(fd, _NS_GET_ID, number)
    except OSError:
        return NamespaceId(found.st_dev, found.st_ino)
    return NamespaceId(found.st_dev, found.st_ino,
                       int.from_bytes(number, sys.byteorder))


def require_other(path: str,
                  known: Optional[NamespaceId] = None) -> NamespaceId:
    """Return what the namespace at a path is, which must be another one.

    :param known: what it is, if that is known
    """
    try:
        found = known or identify_or_fail(path)
        is_own = found.is_same(identify_or_fail(OWN))
    except OSError as err:
        if err.errno in exceptions.EXHAUSTED:
            raise exceptions.SystemRefused(reason=err) from err
        raise exceptions.NetnsUnusable(
            netns=path, reason='does not exist, or is another kind of file'
        ) from err
    if is_own:
        raise exceptions.NetnsUnusable(netns=path, reason="is the node's own")
    return found


@contextlib.contextmanager
def _file(path: str) -> Iterator[int]:
    """Open a file of nsfs, and nothing else: that could block.

    :raises OSError: ENXIO for a file of another kind
    """
    if '\0' in path:
        raise OSError(errno.EINVAL, 'the path has a NUL')
    if os.stat(path).st_dev != os.stat(OWN).st_dev:
        raise OSError(errno.ENXIO, 'it is no network namespace')
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_dev != os.stat(OWN).st_dev or fcntl.ioctl(
                fd, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            raise OSError(errno.ENXIO, 'it is no network namespace')
        yield fd
    finally:
        os.close(fd)


def open_by_number(known: NamespaceId) -> int:
    """Open a namespace by the number that it alone has.

    :returns: a file descriptor
    :raises OSError: ESTALE if it is gone, or if this process may not see it
        (nsfs_fh_to_dentry); EPERM if it may open none
    """
    handle = ctypes.create_string_buffer(_HANDLE.pack(
        16, _FILEID_NSFS, known.cookie, _CLONE_NEWNET, known.inode))
    with _file(OWN) as mount:
        fd: int = _LIBC.open_by_handle_at(mount, handle,
                                          os.O_RDONLY | os.O_CLOEXEC)
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return fd


@contextlib.contextmanager
def opened(netns: str,
           known: Optional[NamespaceId] = None) -> Iterator[int]:
    """Open a namespace; the file descriptor is valid in the block.

    :param known: what it must be; by its number it is found even if the
        path is not there any more
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(_file(netns))
            if known is not None and not identify_file(fd).is_same(known):
                raise OSError(errno.ESTALE, 'it is another one by now')
        except OSError as err:
            try:
                if known is None or known.cookie is None:
                    raise
                fd = open_by_number(known)
                stack.callback(os.close, fd)
            except OSError as last:
                if {err.errno, last.errno} & exceptions.EXHAUSTED:
                    raise exceptions.SystemRefused(reason=last) from err
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s' %
                    (err.strerror or err)) from err
        yield fd


@contextlib.contextmanager
def entered(netns: str,
            known: Optional[NamespaceId] = None) -> Iterator[None]:
    """Be in another network namespace; this thread, within the block."""
    with opened(OWN) as home:
        with opened(netns, known) as other:
            if _LIBC.setns(other, _CLONE_NEWNET) != 0:
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s'
                    % os.strerror(ctypes.get_errno()))
        try:
            yield
        finally:
            if _LIBC.setns(home, _CLONE_NEWNET) != 0:
                # Whatever this thread did next, it would do to a pod.
                os._exit(os.EX_OSERR)


def unshare() -> bool:
    """Move this thread into a new network namespace; whether that was done.

    For a process of its own, with which it ends.
    """
    return bool(_LIBC.unshare(_CLONE_NEWNET) == 0)


def seen(path: str, own: os.stat_result) -> Optional[tuple[int, int]]:
    """Return device and inode of the namespace at a path, without opening it.

    :param own: the status of our own
    :returns: None for that, and for a file of another kind
    """
    found = os.stat(path)
    if found.st_dev != own.st_dev or found.st_ino == own.st_ino or (
            stat.S_ISDIR(found.st_mode)):
        return None
    return found.st_dev, found.st_ino
