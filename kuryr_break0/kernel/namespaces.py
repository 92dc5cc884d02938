# SPDX-License-Identifier: Apache-2.0

"""Identifies, opens and enters other network namespaces.

A path does not identify a namespace. If the mount of the namespace was not
propagated, the file at the path is a placeholder. A path may be valid only in
another mount or PID namespace. The kernel reuses inode numbers.
:mod:`kuryr_break0.kernel.existence` decides whether a namespace still exists.

A function that takes the path of a namespace raises NetnsUnusable if the
namespace cannot be opened or is not the expected namespace. It raises
SystemRefused if this process lacks file descriptors or memory. If a function
raises other errors, its docstring names them.
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
from kuryr_break0 import model

#: The network namespace of this thread
OWN_NETNS = '/proc/thread-self/ns/net'
#: ioctl(2) on nsfs: the cookie of a namespace, which is never reused
#: (linux/nsfs.h, Linux 6.18). The value equals SO_NETNS_COOKIE, but this
#: thread need not enter the namespace to read it.
_NS_GET_ID = 0x8008b70d
#: ioctl(2) on nsfs: the type of a namespace, as the flag of clone(2) that
#: creates such a namespace (Linux 4.11)
_NS_GET_NSTYPE = 0xb703
# linux/nsfs.h and linux/exportfs.h: a file handle of a namespace
_FILEID_NSFS = 0xf1
_CLONE_NEWNET = 0x40000000
_HANDLE = struct.Struct('=IiQII')  # size, type; id, kind, inode
_LIBC = ctypes.CDLL(None, use_errno=True)


def identify(path: Optional[str]) -> Optional[model.NamespaceId]:
    """Return the identity of the namespace at a path; None if there is none.

    The function does not open another kind of file, such as a placeholder, a
    pipe or a device.
    """
    with contextlib.suppress(OSError):
        return None if path is None else identify_or_fail(path)
    return None


def identify_or_fail(path: str) -> model.NamespaceId:
    """Return the identity of the namespace at a path.

    :raises OSError: ENOENT if the path does not exist, ENXIO if the file is
        not a network namespace, EINVAL if the path is invalid. Other errors
        are faults of this process, such as EMFILE
    """
    with _file(path) as fd:
        return identify_file(fd)


def identify_file(fd: int) -> model.NamespaceId:
    """Return the identity of an open namespace."""
    status = os.fstat(fd)
    number = bytearray(8)
    try:
        fcntl.ioctl(fd, _NS_GET_ID, number)
    except OSError:
        return model.NamespaceId(status.st_dev, status.st_ino)
    return model.NamespaceId(status.st_dev, status.st_ino,
                             int.from_bytes(number, sys.byteorder))


def require_other_namespace(path: str,
                            identity: Optional[model.NamespaceId] = None
                            ) -> model.NamespaceId:
    """Return the identity of a namespace other than this thread's.

    :param identity: the identity, if the caller has already read it
    """
    try:
        namespace = identity or identify_or_fail(path)
        is_own = namespace.is_same(identify_or_fail(OWN_NETNS))
    except OSError as err:
        if err.errno in exceptions.RESOURCE_ERRNOS:
            raise exceptions.SystemRefused(reason=err) from err
        raise exceptions.NetnsUnusable(
            netns=path, reason='does not exist, or is another kind of file'
        ) from err
    if is_own:
        raise exceptions.NetnsUnusable(
            netns=path, reason='is the namespace of the node itself')
    return namespace


@contextlib.contextmanager
def _file(path: str) -> Iterator[int]:
    """Open a file if it is a namespace; to open another file could block.

    :raises OSError: ENXIO for a file of another kind
    """
    if '\0' in path:
        raise OSError(errno.EINVAL, 'the path has a NUL character')
    if os.stat(path).st_dev != os.stat(OWN_NETNS).st_dev:
        raise OSError(errno.ENXIO, 'it is not a network namespace')
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_dev != os.stat(OWN_NETNS).st_dev or fcntl.ioctl(
                fd, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            raise OSError(errno.ENXIO, 'it is not a network namespace')
        yield fd
    finally:
        os.close(fd)


def open_by_cookie(namespace: model.NamespaceId) -> int:
    """Open a namespace by its cookie.

    :returns: a file descriptor
    :raises OSError: ESTALE if the namespace is gone or this process has no
        access to it (nsfs_fh_to_dentry); EPERM if this process has access to
        no namespace
    """
    handle = ctypes.create_string_buffer(_HANDLE.pack(
        16, _FILEID_NSFS, namespace.cookie, _CLONE_NEWNET, namespace.inode))
    with _file(OWN_NETNS) as mount:
        fd: int = _LIBC.open_by_handle_at(mount, handle,
                                          os.O_RDONLY | os.O_CLOEXEC)
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return fd


@contextlib.contextmanager
def open_namespace(netns: str, expected: Optional[model.NamespaceId] = None
                   ) -> Iterator[int]:
    """Open a namespace; the file descriptor is valid within the block.

    :param expected: the expected identity. If the path does not lead to the
        expected namespace, the function opens the namespace by the cookie
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(_file(netns))
            if expected is not None and not identify_file(fd).is_same(
                    expected):
                raise OSError(errno.ESTALE, 'it is another namespace now')
        except OSError as err:
            try:
                if expected is None or expected.cookie is None:
                    raise
                fd = open_by_cookie(expected)
                stack.callback(os.close, fd)
            except OSError as last:
                if {err.errno, last.errno} & exceptions.RESOURCE_ERRNOS:
                    raise exceptions.SystemRefused(reason=last) from err
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s' %
                    (err.strerror or err)) from err
        yield fd


@contextlib.contextmanager
def enter_namespace(netns: str, expected: Optional[model.NamespaceId] = None
                    ) -> Iterator[None]:
    """Move this thread into another network namespace within the block."""
    with open_namespace(OWN_NETNS) as home:
        with open_namespace(netns, expected) as other:
            if _LIBC.setns(other, _CLONE_NEWNET) != 0:
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s'
                    % os.strerror(ctypes.get_errno()))
        try:
            yield
        finally:
            if _LIBC.setns(home, _CLONE_NEWNET) != 0:
                # Otherwise this thread would continue in the pod's namespace.
                os._exit(os.EX_OSERR)


def unshare() -> bool:
    """Move this thread into a new network namespace.

    Call this function in a thread or process that ends afterwards.

    :returns: whether the thread was moved
    """
    return bool(_LIBC.unshare(_CLONE_NEWNET) == 0)


def stat_namespace(path: str,
                   own: os.stat_result) -> Optional[tuple[int, int]]:
    """Return device and inode of a namespace without opening its file.

    :param own: the result of stat(2) for this thread's namespace
    :returns: None for this thread's namespace, and for other kinds of files
    :raises OSError: if the path cannot be examined
    """
    status = os.stat(path)
    if status.st_dev != own.st_dev or status.st_ino == own.st_ino or (
            stat.S_ISDIR(status.st_mode)):
        return None
    return status.st_dev, status.st_ino
