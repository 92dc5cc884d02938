# SPDX-License-Identifier: Apache-2.0

"""Searches for the network namespaces of the node.

The kernel sends no event about a new namespace. A new namespace with a name is
a new mount. A new namespace without a name usually contains a new process. So
a search for new namespaces examines only new mounts and new processes. If an
old process enters a new namespace without a name, only a search for all
namespaces finds the namespace.
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
from kuryr_break0.kernel import rtnetlink
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: Directories of named namespaces
NETNS_DIRS = '/run/netns', '/var/run/netns'
#: Maximum seconds that a new process probably needs to enter its namespaces
_YOUNG = 2.0
#: The offset of a process in /proc is its PID plus this number (TGID_OFFSET in
#: fs/proc/base.c).
_POSITION = 258
# ioctl(2) on nsfs (linux/nsfs.h, Linux 4.11): return the user namespace that
# owns a namespace, the parent of a namespace, and the user that created a user
# namespace
_NS_GET_USERNS, _NS_GET_PARENT, _NS_GET_OWNER_UID = 0xb701, 0xb702, 0xb704
#: Path from the directory of a process to its network namespace
_BY_PROCESS = '/ns/net'
_UNSEEN = 'network namespaces cannot be listed'

#: Device and inode of a namespace
Place = tuple[int, int]


class NamespaceLocation(NamedTuple):
    """A network namespace of this node.

    :ivar path: the path to the namespace that will probably exist longest
    :ivar namespace: its identity, without the cookie in results of
        :class:`Search`
    :ivar process: directory of a process in the namespace, or None
    """

    path: str
    namespace: model.NamespaceId
    process: Optional[str] = None

    @property
    def place(self) -> Place:
        return self.namespace[:2]

    @property
    def is_named(self) -> bool:
        """Return whether the path is a name, not the path of a process."""
        return not self.path.endswith(_BY_PROCESS)

    def is_current(self) -> bool:
        """Return whether the path still leads to this inode.

        The kernel reuses inodes, so the namespace can be another one.
        """
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            return (status.st_dev, status.st_ino) == self.place
        return False


class ExaminedNamespace(NamedTuple):
    """A namespace and its container.

    :ivar container: a value that all namespaces of one container share. None
        for a namespace that this user has created outside of any container
    :ivar number: number (nsid) of the namespace in this thread's namespace;
        None if the kernel assigned no number
    """

    location: NamespaceLocation
    container: Hashable
    number: Optional[int]


class Search:
    """Searches for all namespaces, or only for new ones.

    The methods raise SystemRefused if this process lacks descriptors or
    memory. After such an error, :meth:`new` can miss namespaces, and only
    :meth:`all` finds them.

    :param processes: directories such as /proc
    """

    def __init__(self, processes: Iterable[str]) -> None:
        self._processes = [_Processes(each) for each in processes]
        self._mounts: frozenset[str] = frozenset()

    def all(self, earlier: Mapping[Place, str]) -> list[NamespaceLocation]:
        """List all namespaces except this thread's, with one path each.

        If a namespace has a name, the path is the name. Otherwise, it is the
        path of the oldest process in the namespace, because this process will
        probably end last.

        :param earlier: paths of namespaces from an earlier search. If the path
            of a process is still valid, the method returns the same path
        """
        for each in self._processes:
            each.note()
        mounts = node.read_mounts()
        self._mounts = frozenset(mounts)
        names = [os.path.join(directory, name) for directory in NETNS_DIRS
                 for name in sorted(_list_names(directory))]
        return _match_paths([*names, *_find_nsfs_mounts(mounts)],
                            [path for each in self._processes
                             for path in each.all()], earlier)

    def new(self, mounts_changed: bool) -> list[NamespaceLocation]:
        """List the namespaces of new mounts and new processes.

        The list may also contain known namespaces.
        """
        names: list[str] = []
        if mounts_changed:
            mounts = node.read_mounts()
            names = _find_nsfs_mounts(each for each in mounts
                                      if each not in self._mounts)
            self._mounts = frozenset(mounts)
        return _match_paths(names, [path for each in self._processes
                                    for path in each.new()], {})


class _Processes:
    """The processes in a directory such as /proc."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        #: monotonic times of searches, each with the last PID at that time
        self._last: list[tuple[float, int]] = []
        self._is_ordered: Optional[bool] = None

    def all(self) -> list[str]:
        """List the directories of all processes."""
        return self._paths(_list_names(self._directory))

    def new(self) -> list[str]:
        """List the directories of new processes.

        A process may need up to _YOUNG seconds to enter its namespaces. So a
        process is new if it started after the latest search that is at least
        _YOUNG seconds old. If all searches are more recent, a process is new
        if it started after the first search.

        The kernel assigns ascending PIDs until the maximum, and then begins
        with low PIDs again. After such a wrap-around, the list contains all
        processes. For the directory of another PID namespace, the list always
        contains all processes.
        """
        since = self.note()
        with node.tolerate_absence(_UNSEEN):
            return [path for path in self._paths(self._names_from(since))
                    if int(os.path.basename(path)) >= since]
        return []

    def note(self) -> int:
        """Record the last PID.

        :returns: the last PID at the latest search that is at least _YOUNG
            seconds old. If all searches are more recent, the last PID at the
            first search; 0 if unknown
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
        """Return the last PID that the kernel has assigned in this namespace.

        :returns: None if the directory belongs to another PID namespace, or
            its file loadavg has no PID
        """
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.readlink(self._directory + '/self') == str(os.getpid()):
                with open(self._directory + '/loadavg') as file:
                    return int(file.read().split()[4])
        return None

    def _names_from(self, number: int) -> list[str]:
        """List the directory; if possible, begin with the PID ``number``."""
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


def find_namespaces(processes: Iterable[str]) -> Iterator[NamespaceLocation]:
    """List all namespaces except this thread's, with one path each.

    :param processes: directories such as /proc
    :raises SystemRefused: if this process lacks descriptors or memory
    """
    own = os.stat(namespaces.OWN_NETNS)
    for location in Search(processes).all({}):
        with node.tolerate_absence(_UNSEEN):
            namespace = namespaces.identify_or_fail(location.path)
            if namespace[:2] != (own.st_dev, own.st_ino):
                yield location._replace(namespace=namespace)


def examine_namespace(location: NamespaceLocation) -> ExaminedNamespace:
    """Return the namespace that is now at a path, with its container.

    If the namespace has no number (nsid) yet, the function assigns a number,
    which remains until the namespace ends.

    :raises NetnsUnusable: if the path leads to no namespace, or to this
        thread's namespace
    :raises SystemRefused, KernelRefused: if this process lacks descriptors or
        memory
    """
    number = None
    with namespaces.open_namespace(location.path) as fd:
        namespace = namespaces.require_other_namespace(
            location.path, namespaces.identify_file(fd))
        container = _find_container(location.process, fd)
        try:
            with rtnetlink.Netlink() as own:
                number = own.ensure_namespace_number(fd)
        except exceptions.KernelRefused as err:
            if err.is_exhausted:
                raise
            # Without the number, NamespaceEvents receives no events of the
            # namespace.
            LOG.debug('The kernel sends no events of %s, so only the timer '
                      'finds its changes: %s',
                      location.path, err)
    return ExaminedNamespace(location._replace(namespace=namespace), container,
                             number)


def _find_container(process: Optional[str], netns: int) -> Hashable:
    """Return a value that all namespaces of a container share.

    The value is the outermost PID namespace, below this process's own, that
    contains the process. A process cannot leave its PID namespace, and a PID
    namespace that a container creates is below the PID namespace of the
    container.

    Any user can create a user namespace, and then any number of PID namespaces
    in the user namespace. If another user than this process's has created the
    user namespace, the value is this other user.

    :param process: directory of a process in the namespace; None if unknown
    :param netns: descriptor of the network namespace
    :returns: None if the namespace belongs to no container
    """
    with contextlib.ExitStack() as stack:
        inside: Optional[int] = None
        if process is not None:
            with contextlib.suppress(OSError):
                inside = os.open(process + '/ns/pid', os.O_RDONLY
                                 | os.O_CLOEXEC)
                stack.callback(os.close, inside)
        inside = _find_outermost(stack, inside, 'pid')
        with contextlib.suppress(OSError):
            owner = fcntl.ioctl(netns if inside is None else inside,
                                _NS_GET_USERNS)
            stack.callback(os.close, owner)
            made = _find_outermost(stack, owner, 'user')
            if made is not None:
                user = bytearray(4)
                fcntl.ioctl(made, _NS_GET_OWNER_UID, user)
                if int.from_bytes(user, sys.byteorder) != os.geteuid():
                    return 'user', bytes(user)
        return None if inside is None else (
            'processes', os.fstat(inside).st_ino)


def _find_outermost(stack: contextlib.ExitStack, fd: Optional[int],
                    kind: str) -> Optional[int]:
    """Return the outermost ancestor below this process's own namespace.

    :param stack: the stack that closes the descriptors
    :param fd: descriptor of a namespace, which may be the result itself
    :param kind: ``pid`` or ``user``
    :returns: descriptor of the ancestor; None if the namespace is this
        process's own
    """
    outermost = None
    # The loop ends at this process's namespace, or with an error at a
    # namespace outside of it.
    with contextlib.suppress(OSError):
        own = os.stat('/proc/self/ns/' + kind).st_ino
        while fd is not None and os.fstat(fd).st_ino != own:
            outermost = fd
            fd = fcntl.ioctl(fd, _NS_GET_PARENT)
            stack.callback(os.close, fd)
    return outermost


def _match_paths(names: Iterable[str], processes: Iterable[str],
                 earlier: Mapping[Place, str]) -> list[NamespaceLocation]:
    """List the namespaces at the given names and of the given processes.

    Namespaces with a name come last.
    """
    own = os.stat(namespaces.OWN_NETNS)
    paths: dict[Place, str] = {}
    inside: dict[Place, list[str]] = {}
    for path in names:
        with node.tolerate_absence(_UNSEEN):
            place = namespaces.stat_namespace(path, own)
            if place:
                paths.setdefault(place, path)
    for process in processes:
        with node.tolerate_absence(_UNSEEN):
            place = namespaces.stat_namespace(process + _BY_PROCESS, own)
            if place:
                inside.setdefault(place, []).append(process)
    return [NamespaceLocation(
        paths.get(place) or _choose_path(inside[place], earlier.get(place)),
        model.NamespaceId(*place), next(iter(inside.get(place, ())), None))
        for place in sorted({**inside, **paths}, key=paths.__contains__)]


def _choose_path(processes: list[str], earlier: Optional[str]) -> str:
    """Return the path of the process that will probably end last."""
    paths = [each + _BY_PROCESS for each in processes]
    if earlier in paths:
        return str(earlier)
    return paths[0] if len(paths) == 1 else min(paths, key=_read_start_time)


def _read_start_time(path: str) -> float:
    """Return the start time of a process in ticks; infinity if it ended."""
    with node.tolerate_absence(_UNSEEN), \
            contextlib.suppress(IndexError, ValueError), \
            open(path[:-len(_BY_PROCESS)] + '/stat', 'rb') as file:
        # The program's name, in parentheses, may contain any byte.
        return int(file.read().rpartition(b')')[2].split()[19])
    return math.inf


def _list_names(directory: str) -> list[str]:
    with node.tolerate_absence(_UNSEEN):
        return os.listdir(directory)
    return []


def _find_nsfs_mounts(mounts: Iterable[str]) -> list[str]:
    return [path for root, path, kind in map(node.parse_mount, mounts)
            if kind == 'nsfs' and root.startswith('net:')]
