# SPDX-License-Identifier: Apache-2.0

"""Decides whether a known namespace or macvtap still exists.

A failed look-up alone proves nothing, because this process may be unable to
see the object. The call open_by_handle_at(2) fails with ESTALE for a deleted
namespace. If the process lacks CAP_SYS_ADMIN, the call fails with ESTALE for a
living namespace too. Since Linux 6.18.50, 6.19.9 and 7.0, the same happens if
the process is outside of the initial PID namespace. A mount can hide the path
of a living namespace, and the path can lead to another namespace. So a failed
look-up counts only if a look-up of the same kind has just found another living
namespace.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import os
import re
import threading
from typing import Iterator, NamedTuple, Optional, TextIO

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import node
from kuryr_break0.kernel import rtnetlink
from kuryr_break0 import model

_PROC = '/proc'
_FIRST_PROCESS_NAMESPACE = 0xeffffffc  # PROC_PID_INIT_INO
#: Maximum living namespaces to open by their handles, as a test. If one of
#: them does not open, a failed look-up of another namespace proves nothing.
#: The kernel may refuse a handle if another user namespace owns the network
#: namespace.
_CONTROLS = 4
#: Errors of open(2) for a path in /proc if its process or its namespace ends.
_ENDED = (errno.ENOENT, errno.ESRCH, errno.ELOOP)


class State(enum.Enum):
    """Whether a namespace exists; UNKNOWN if there is no proof."""

    LIVING = 'living'
    GONE = 'gone'
    UNKNOWN = 'unknown'


class Verdict(NamedTuple):
    """A state, and the reason if the state is UNKNOWN."""

    state: State
    reason: str = ''


LIVING, GONE = Verdict(State.LIVING), Verdict(State.GONE)


def judge_state(path: Optional[str], namespace: Optional[model.NamespaceId],
                tap: Optional[model.Tap] = None) -> State:
    """Return the state of a sandbox; see :meth:`Judge.judge`."""
    return Judge().judge(path, namespace, tap).state


def find_taps() -> dict[str, model.Tap]:
    """Return the macvtaps of this namespace by MAC address."""
    own = namespaces.identify(namespaces.OWN_NETNS)
    with rtnetlink.Netlink() as netlink:
        return {link.mac: model.Tap(own, link.mac) for link in netlink.links()
                if own is not None and link.kind == 'macvtap'}


class _View(NamedTuple):
    """The namespaces in one directory at one moment.

    :ivar paths: one path of each namespace, by device and inode, without the
        namespace of this thread
    :ivar hides: whether a namespace could not be examined
    """

    paths: dict[tuple[int, int], str]
    hides: bool


class Judge:
    """Decides whether sandboxes exist.

    A Judge caches its reads, so create a new Judge for each operation. Pass
    only namespaces that were recorded before this Judge was created.
    Before a deletion, repeat the decision with a new Judge under the lock.
    """

    def __init__(self) -> None:
        self._views: dict[str, _View] = {}
        self._blindness: Optional[str] = None
        self._links: Optional[set[tuple[Optional[str], str]]] = None

    def judge(self, path: Optional[str],
              namespace: Optional[model.NamespaceId],
              tap: Optional[model.Tap] = None) -> Verdict:
        """Return whether a sandbox's namespace or macvtap still exists.

        :param path: the recorded path of the namespace, or None
        :param namespace: the recorded identity of the namespace, or None
        :param tap: the macvtap of a VM, which has no namespace of its own;
            None for a container
        """
        if tap is not None:
            return self._judge_tap(tap)
        if namespace is None:
            return Verdict(State.UNKNOWN, 'its namespace was not recorded')
        is_absent = False
        if namespace.cookie is not None:
            try:
                os.close(namespaces.open_by_cookie(namespace))
                return LIVING
            except OSError as err:
                is_absent = err.errno == errno.ESTALE
        shown, is_missing = None, False
        if path is not None:
            try:
                shown = namespaces.identify_or_fail(path)
                if shown.is_same(namespace):
                    return LIVING
            except FileNotFoundError:
                is_missing = not os.path.lexists(path)
            except OSError:
                pass  # a placeholder file, or this process lacks resources
        if is_absent and not self.blindness(path):
            return GONE
        if path is None or not (shown or is_missing):
            return self._unknown(namespace, path, 'is not a namespace')
        return self._judge_by_directory(path, namespace)

    def _judge_tap(self, tap: model.Tap) -> Verdict:
        """Decide by the interfaces of the node.

        A missing macvtap counts as gone only if the node has a macvlan.
        Without a macvlan, this process may see another network namespace, or
        the parent of the macvtap may be gone.
        """
        own = namespaces.identify(namespaces.OWN_NETNS)
        if own is None or not own.is_same(tap.namespace):
            return Verdict(State.UNKNOWN, 'this process is in another '
                           'network namespace than its macvtap was')
        try:
            if self._links is None:
                with rtnetlink.Netlink() as netlink:
                    self._links = {(link.kind, link.mac)
                                   for link in netlink.links()}
        except exceptions.KernelRefused as err:
            return Verdict(State.UNKNOWN, str(err))
        if ('macvtap', tap.mac) in self._links:
            return LIVING
        if 'macvlan' not in {kind for kind, _ in self._links}:
            return Verdict(State.UNKNOWN, 'the node has no macvlan')
        return GONE

    def _judge_by_directory(self, path: str, namespace: model.NamespaceId
                            ) -> Verdict:
        """Decide by the other namespaces in the directory of a path.

        Use this method if the path does not exist any more. Another process
        may still be in the namespace.
        """
        place = _directory_of(path)
        for each in {place, _PROC}:
            view = self._view(each)
            same = view.paths.get(namespace[:2])
            try:
                if same and namespaces.identify_or_fail(same).is_same(
                        namespace):
                    return LIVING
            except OSError as err:
                if err.errno not in (*_ENDED, errno.ENXIO):  # EMFILE etc.
                    return self._unknown(namespace, path, '%s: %s' % (
                        same, err.strerror))
            # Engines remove a name together with its sandbox. So if the
            # namespace has no cookie, only the directory of its name must be
            # readable.
            if view.hides and (each == place or namespace.cookie is not None):
                return self._unknown(
                    namespace, path,
                    'not all namespaces in %s can be read' % each)
        if not any(map(namespaces.identify,
                       self._view(place).paths.values())):
            return self._unknown(namespace, path,
                                 'no other namespace is in %s' % place)
        return GONE

    def _unknown(self, known: model.NamespaceId, path: Optional[str],
                 reason: str) -> Verdict:
        text = '%s: %s' % (path, reason) if path else 'its path is unknown'
        if known.cookie is not None:
            text += '; a look-up of its cookie proves nothing: ' + (
                self.blindness(path) or 'the kernel refuses the look-up')
        return Verdict(State.UNKNOWN, text)

    def blindness(self, path: Optional[str] = None) -> str:
        """Return the reason why failed look-ups by cookie prove nothing.

        A failed look-up is a proof if the look-ups of living namespaces
        succeed. The test does not use the namespace of this thread.

        :param path: a path, to search its directory for living namespaces
        :returns: an empty text if a failed look-up is a proof
        """
        if self._blindness is None:
            self._blindness = self._find_blindness(path)
        return self._blindness

    def _find_blindness(self, path: Optional[str]) -> str:
        own = namespaces.identify(namespaces.OWN_NETNS)
        if own is not None and own.cookie is None:
            return 'namespaces have no cookie before Linux 6.18'
        # Search the directory of the path before /proc. A container can have
        # thousands of processes, and the look-up of each process takes 8 us,
        # while the caller may hold the lock.
        living = (each for place in dict.fromkeys((
            _directory_of(path or _PROC + '/1/ns/net'), _PROC))
            for _, each in _list_namespaces_at(place) if each is not None)
        shown = list(itertools.islice(
            (each for each in map(_opens_by_number, living)
             if each is not None),
            _CONTROLS))
        # If no other namespace exists, create one.
        return '' if all(
            shown or [_can_open_new_namespace()]) else _explain_blindness()

    def _view(self, place: str) -> _View:
        if place not in self._views:
            self._views[place] = _read_view(place)
        return self._views[place]


def _directory_of(path: str) -> str:
    """Return the directory to search for other namespaces.

    It is /run/netns for the path /run/netns/a, and /proc for the path
    /proc/1/ns/net.
    """
    process = re.fullmatch(r'(/.+)/\d+(?:/task/\d+)?/ns/net', path)
    return process[1] if process else os.path.dirname(path)


def _read_view(place: str) -> _View:
    """Return the namespaces in a directory, without opening them."""
    paths: dict[tuple[int, int], str] = {}
    hides = False
    for numbers, path in _list_namespaces_at(place):
        if path is None:
            hides = True
        else:
            paths.setdefault(numbers, path)
    return _View(paths, hides)


def _list_namespaces_at(place: str
                        ) -> Iterator[tuple[tuple[int, int], Optional[str]]]:
    """Iterate over the namespaces in a directory, except this thread's.

    :returns: pairs: device and inode, and the path. If a namespace cannot be
        examined, the path is None
    """
    hidden = (0, 0), None
    try:
        own = os.stat(namespaces.OWN_NETNS)
        names = os.listdir(place)
    except OSError:
        yield hidden
        return
    is_proc = os.path.isdir(place + '/1')
    for name in filter(str.isdigit, names) if is_proc else names:
        path = '%s/%s%s' % (place, name, '/ns/net' if is_proc else '')
        try:
            numbers = namespaces.stat_namespace(path, own)
        except OSError as err:
            if err.errno not in _ENDED:
                yield hidden
        else:
            if numbers:
                yield numbers, path


def _opens_by_number(path: str) -> Optional[bool]:
    """Return whether a living namespace can be opened by its cookie.

    :returns: None if the namespace has just ended or has no cookie
    """
    try:
        namespace = namespaces.identify_or_fail(path)
        if namespace.cookie is None:
            return None
        try:
            os.close(namespaces.open_by_cookie(namespace))
            return True
        except OSError:
            if namespaces.identify_or_fail(path).is_same(namespace):
                return False
    except OSError:
        pass
    return None


def _explain_blindness() -> str:
    with contextlib.suppress(OSError):  # EMFILE, for example
        if not node.read_capabilities() >> node.CAP_SYS_ADMIN & 1:
            return 'this process lacks CAP_SYS_ADMIN'
        if os.stat('/proc/self/ns/pid').st_ino != _FIRST_PROCESS_NAMESPACE:
            return 'this process is not in the initial PID namespace'
    return 'this process has no access to other namespaces'


def _can_open_new_namespace() -> bool:
    """Return whether a new namespace can be opened by its cookie.

    :returns: False also if this process cannot create a namespace
    """
    with contextlib.ExitStack() as stack:
        def make() -> None:
            if namespaces.unshare():
                with contextlib.suppress(OSError):
                    made.append(stack.enter_context(
                        open(namespaces.OWN_NETNS)))

        made: list[TextIO] = []
        with contextlib.suppress(RuntimeError):  # no thread can be started
            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
        return any(_opens_by_number('/proc/self/fd/%d' % file.fileno())
                   for file in made)
