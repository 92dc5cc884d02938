# SPDX-License-Identifier: Apache-2.0

"""Searches for the network namespaces of the node.

The kernel sends no event about a new namespace. Its name is a new mount, or a
process that was started lately is in it. So a search for new namespaces reads
new mounts and new processes only: its cost does not grow with the others. It
misses a namespace without a name that an older process has entered. A search
for all namespaces finds that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import sys
import time
from typing import Hashable, Iterable, Iterator, Mapping, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import node
from kuryr_break0.kernel.node import absence
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0 import log
from kuryr_break0.model import NamespaceId

LOG = log.get_logger(__name__)

#: Directories in which namespaces have names
NETNS_DIRS = '/run/netns', '/var/run/netns'
#: Seconds from the start of a process until it has entered its namespaces
_YOUNG = 2.0
#: The position of a process in /proc is its number plus this (TGID_OFFSET in
#: fs/proc/base.c).
_POSITION = 258
# ioctl(2) on nsfs: the user namespace that owns a namespace, the one above a
# namespace, the user that made a user namespace (linux/nsfs.h, linux 4.11)
_NS_GET_USERNS, _NS_GET_PARENT, _NS_GET_OWNER_UID = 0xb701, 0xb702, 0xb704
#: What makes the path of a namespace out of that of a process in it
_BY_PROCESS = '/ns/net'
_UNSEEN = 'network namespaces cannot be listed'

#: Device and inode of a namespace
Place = tuple[int, int]


class Found(NamedTuple):
    """A network namespace of this node.

    :ivar path: one that exists as long as possible
    :ivar namespace: without its cookie, until it is examined
    :ivar process: directory of a process in it, if one is seen
    """

    path: str
    namespace: NamespaceId
    process: Optional[str] = None

    @property
    def place(self) -> Place:
        return self.namespace[:2]

    @property
    def is_named(self) -> bool:
        """Return whether the path is a name, and not by a process."""
        return not self.path.endswith(_BY_PROCESS)


class Examined(NamedTuple):
    """A namespace, and its container.

    :ivar container: equal for all namespaces of one container; None for one
        that this user has made outside of any
    :ivar number: the number that the own namespace has for it; None if the
        kernel refuses to give one
    """

    found: Found
    container: Hashable
    number: Optional[int]


class Search:
    """Searches for namespaces.

    What it raises is SystemRefused, if this process lacks descriptors or
    memory. After that, only a search for all finds what was new.

    :param processes: directories of processes, as /proc
    """

    def __init__(self, processes: Iterable[str]) -> None:
        self._processes = [_Processes(each) for each in processes]
        self._mounts: frozenset[str] = frozenset()

    def all(self, known: Mapping[Place, str]) -> list[Found]:
        """List the namespaces but the own one, by one path each.

        A name lives as long as the namespace. A namespace without a name goes
        by the process that has been in it for longest: any other may end
        before it does.

        :param known: paths that namespaces were found by earlier
        """
        for each in self._processes:
            each.note()
        mounts = node.read_mounts()
        self._mounts = frozenset(mounts)
        names = [os.path.join(directory, name) for directory in NETNS_DIRS
                 for name in sorted(_names(directory))]
        return _found([*names, *_names_of(mounts)],
                      [path for each in self._processes
                       for path in each.all()], known)

    def new(self, mounts_changed: bool) -> list[Found]:
        """List the namespaces of new mounts and new processes.

        Some may not be new.
        """
        names: list[str] = []
        if mounts_changed:
            mounts = node.read_mounts()
            names = _names_of(each for each in mounts
                              if each not in self._mounts)
            self._mounts = frozenset(mounts)
        return _found(names, [path for each in self._processes
                              for path in each.new()], {})


class _Processes:
    """The processes in a directory such as /proc."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        #: times, and the number that the last process had at each
        self._last: list[tuple[float, int]] = []
        self._is_ordered: Optional[bool] = None

    def all(self) -> list[str]:
        """List the directories of all processes."""
        return self._paths(_names(self._directory))

    def new(self) -> list[str]:
        """List those of the processes that were started since the last time.

        Numbers ascend, until the kernel begins again with low ones. Then, and
        where they are of another process namespace, it lists all.
        """
        since = self.note()
        with absence(_UNSEEN):
            return [path for path in self._paths(self._names_from(since))
                    if int(os.path.basename(path)) >= since]
        return []

    def note(self) -> int:
        """Note the number of the last process.

        :returns: the one of a moment ago; 0 if it is not known
        """
        now, last = time.monotonic(), self._read_last()
        if last is None or self._last and last < self._last[-1][1]:
            self._last.clear()
        while len(self._last) > 1 and self._last[1][0] <= now - _YOUNG:
            del self._last[0]
        since = self._last[0][1] if self._last else 0
        if last is not None:
            self._last.append((now, last))
        return since

    def _paths(self, names: Iterable[str]) -> list[str]:
        return [os.path.join(self._directory, name)
                for name in names if name.isdigit()]

    def _read_last(self) -> Optional[int]:
        """Return the number of the last process of this process namespace.

        None where the directory shows another one, or nothing says it.
        """
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.readlink(self._directory + '/self') == str(os.getpid()):
                with open(self._directory + '/loadavg') as file:
                    return int(file.read().split()[4])
        return None

    def _names_from(self, number: int) -> list[str]:
        """List the directory; from a process on, if the kernel can."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if number and self._is_ordered is None:
                own = os.getpid()
                os.lseek(fd, _POSITION + own, os.SEEK_SET)
                self._is_ordered = os.listdir(fd)[:1] == [str(own)]
            if number and self._is_ordered:
                os.lseek(fd, _POSITION + number, os.SEEK_SET)
            return os.listdir(fd)
        finally:
            os.close(fd)


def find(processes: Iterable[str]) -> Iterator[Found]:
    """List the namespaces but the own one, by one path each.

    :param processes: where processes are to be seen, as /proc
    :raises SystemRefused: if this process cannot see all
    """
    own = os.stat(namespaces.OWN)
    for found in Search(processes).all({}):
        with absence(_UNSEEN):
            namespace = namespaces.identify_or_fail(found.path)
            if namespace[:2] != (own.st_dev, own.st_ino):
                yield found._replace(namespace=namespace)


def examine(found: Found) -> Examined:
    """Find out which namespace is at the path of one now.

    It gets a number if it has none, and keeps that until it ends.

    :raises NetnsUnusable: if there is none, or the own one
    :raises SystemRefused, KernelRefused: if this process lacks descriptors or
        memory
    """
    number = None
    with namespaces.opened(found.path) as fd:
        namespace = namespaces.require_other(found.path,
                                             namespaces.identify_file(fd))
        container = _container_of(found.process, fd)
        try:
            with Netlink() as own:
                number = own.ensure_namespace_number(fd)
        except exceptions.KernelRefused as err:
            if err.exhausted:
                raise
            # Without a number it has no events, but the timer.
            LOG.debug('Changes of %s are noticed by the timer only: %s',
                      found.path, err)
    return Examined(found._replace(namespace=namespace), container, number)


def _container_of(process: Optional[str], netns: int) -> Hashable:
    """Return what the namespaces of a container have in common.

    It is the process namespace below the own one that their processes are
    in: it cannot be left, and those that a container makes are below it. Any
    user can make process namespaces, in user namespaces of their own, and any
    number of both. What these have in common is that user.

    :param process: directory of a process in it; None if there is none
    :param netns: the network namespace, open
    :returns: None if it is of no container
    """
    with contextlib.ExitStack() as stack:
        inside: Optional[int] = None
        if process is not None:
            with contextlib.suppress(OSError):
                inside = os.open(process + '/ns/pid', os.O_RDONLY
                                 | os.O_CLOEXEC)
                stack.callback(os.close, inside)
        inside = _outermost(stack, inside, 'pid')
        with contextlib.suppress(OSError):
            owner = fcntl.ioctl(netns if inside is None else inside,
                                _NS_GET_USERNS)
            stack.callback(os.close, owner)
            made = _outermost(stack, owner, 'user')
            if made is not None:
                user = bytearray(4)
                fcntl.ioctl(made, _NS_GET_OWNER_UID, user)
                if int.from_bytes(user, sys.byteorder) != os.geteuid():
                    return 'user', bytes(user)
        return None if inside is None else (
            'processes', os.fstat(inside).st_ino)


def _outermost(stack: contextlib.ExitStack, fd: Optional[int],
               kind: str) -> Optional[int]:
    """Return the namespace below the own one that another is, or is below.

    :param stack: closes what was opened
    :param fd: of that other one
    :returns: None if that is the own one
    """
    found = None
    # It ends at the own one, or with an error at what is beyond our view.
    with contextlib.suppress(OSError):
        own = os.stat('/proc/self/ns/' + kind).st_ino
        while fd is not None and os.fstat(fd).st_ino != own:
            found = fd
            fd = fcntl.ioctl(fd, _NS_GET_PARENT)
            stack.callback(os.close, fd)
    return found


def _found(names: Iterable[str], processes: Iterable[str],
           known: Mapping[Place, str]) -> list[Found]:
    """List the namespaces that have names or processes; named ones last."""
    own = os.stat(namespaces.OWN)
    paths: dict[Place, str] = {}
    inside: dict[Place, list[str]] = {}
    for path in names:
        with absence(_UNSEEN):
            place = namespaces.seen(path, own)
            if place:
                paths.setdefault(place, path)
    for process in processes:
        with absence(_UNSEEN):
            place = namespaces.seen(process + _BY_PROCESS, own)
            if place:
                inside.setdefault(place, []).append(process)
    return [Found(paths.get(place) or _path_by(inside[place],
                                               known.get(place)),
                  NamespaceId(*place), next(iter(inside.get(place, ())), None))
            for place in sorted({**inside, **paths}, key=paths.__contains__)]


def _path_by(processes: list[str], known: Optional[str]) -> str:
    """Return the path of a namespace by one of the processes in it."""
    paths = [each + _BY_PROCESS for each in processes]
    if known in paths:
        return str(known)
    return paths[0] if len(paths) == 1 else min(paths, key=_started)


def _started(path: str) -> float:
    """Return when a process was started, in ticks; late if it has ended."""
    with absence(_UNSEEN), contextlib.suppress(IndexError, ValueError), \
            open(path[:-len(_BY_PROCESS)] + '/stat', 'rb') as file:
        # The name of the program, in parentheses, may have any byte.
        return int(file.read().rpartition(b')')[2].split()[19])
    return math.inf


def _names(directory: str) -> list[str]:
    with absence(_UNSEEN):
        return os.listdir(directory)
    return []


def _names_of(mounts: Iterable[str]) -> list[str]:
    return [path for root, path, kind in map(node.parse_mount, mounts)
            if kind == 'nsfs' and root.startswith('net:')]
