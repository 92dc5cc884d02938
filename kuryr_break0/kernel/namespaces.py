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
import math
import os
import stat
import struct
import sys
from typing import Iterable, Iterator, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel.node import absence
from kuryr_break0.kernel.node import mounts
from kuryr_break0.model import NamespaceId

#: The network namespace of this thread
OWN = '/proc/thread-self/ns/net'
#: Where namespaces have names.
NETNS_DIRS = '/run/netns', '/var/run/netns'
#: ioctl(2) on nsfs: the number of a namespace that is never used again
#: (linux/nsfs.h, linux 6.18). It is SO_NETNS_COOKIE, without entering.
_NS_GET_ID = 0x8008b70d
#: ioctl(2) on nsfs: which kind it is, as for clone(2) (linux 4.11)
_NS_GET_NSTYPE = 0xb703
#: ioctl(2) on nsfs: the process namespace above another (linux 4.9)
_NS_GET_PARENT = 0xb702
# linux/nsfs.h and linux/exportfs.h: a file handle of a namespace
_FILEID_NSFS = 0xf1
_CLONE_NEWNET = 0x40000000
_HANDLE = struct.Struct('=IiQII')  # size, type; id, kind, inode
_UNSEEN = 'network namespaces cannot be listed'
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
        return _identify(fd)


def _identify(fd: int) -> NamespaceId:
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
            if known is not None and not _identify(fd).is_same(known):
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


class Found(NamedTuple):
    """A network namespace of this node.

    :ivar path: one that is there as long as possible
    :ivar process: the directory of a process that is in it, if one is seen
    """

    path: str
    namespace: NamespaceId
    process: Optional[str] = None


def find(processes: Iterable[str]) -> list[Found]:
    """List the namespaces but the own one, by one path each.

    A name in a directory lives as long as the namespace. One that has none
    goes by the process that has been in it for longest: any other may end
    before it does.

    :param processes: where processes are to be seen, as /proc
    """
    own = os.stat(OWN)
    paths: dict[tuple[int, int], str] = {}
    names = [os.path.join(directory, name) for directory in NETNS_DIRS
             for name in sorted(_names(directory))]
    names += [path for root, path, kind in mounts()
              if kind == 'nsfs' and root.startswith('net:')]
    for path in names:
        with absence(_UNSEEN):
            found = seen(path, own)
            if found:
                paths.setdefault(found, path)
    inside: dict[tuple[int, int], list[str]] = {}
    for proc in processes:
        for name in filter(str.isdigit, _names(proc)):
            process = os.path.join(proc, name)
            with absence(_UNSEEN):
                found = seen(process + '/ns/net', own)
                if found:
                    inside.setdefault(found, []).append(process)
    for found, members in inside.items():
        if found not in paths:
            paths[found] = min(members, key=_started) + '/ns/net'
    namespaces = []
    for path in paths.values():
        with absence(_UNSEEN):
            namespace = identify_or_fail(path)
            if namespace[:2] != (own.st_dev, own.st_ino):
                namespaces.append(Found(path, namespace, next(
                    iter(inside.get(namespace[:2], ())), None)))
    return namespaces


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


def container_of(process: Optional[str]) -> Optional[int]:
    """Return what all processes of a container have in common.

    That is the process namespace below our own that they are in: it cannot
    be left, and those that a container makes are below it.

    :param process: directory of one of them; None if it is not known
    :returns: None for a process of no container
    """
    if process is None:
        return None
    found = None
    # It ends at our own, or with an error at what is beyond our view.
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        own = os.stat('/proc/self/ns/pid').st_ino
        fd = os.open(process + '/ns/pid', os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        while os.fstat(fd).st_ino != own:
            found = os.fstat(fd).st_ino
            fd = fcntl.ioctl(fd, _NS_GET_PARENT)
            stack.callback(os.close, fd)
    return found


def _names(directory: str) -> list[str]:
    with absence(_UNSEEN):
        return os.listdir(directory)
    return []


def _started(process: str) -> float:
    """Return when a process was started, in ticks; late if it has ended."""
    with absence(_UNSEEN), contextlib.suppress(IndexError, ValueError), \
            open(process + '/stat', 'rb') as file:
        # The name of the program, in parentheses, may have any byte.
        return int(file.read().rpartition(b')')[2].split()[19])
    return math.inf
