# SPDX-License-Identifier: Apache-2.0

"""Judges whether a namespace, or a macvtap, that was seen once still exists.

That it is not found proves nothing: this process may be one that does not see
it. The kernel answers ESTALE for the handle of a namespace that is gone, and
also for a living one to a process without CAP_SYS_ADMIN, or, since linux
6.18.50, 6.19.9 and 7.0, outside of the first process namespace. A path can be
hidden, or be another one's. So an absence counts only beside a presence: the
same call must just have found a namespace that lives and is not our own.
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
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Tap

_PROC = '/proc'
_FIRST_PROCESS_NAMESPACE = 0xeffffffc  # PROC_PID_INIT_INO
#: Living namespaces whose handles must all open before one that does not
#: counts as gone. Those of another user namespace may be refused.
_CONTROLS = 4
#: What the path of a process or a namespace that has just ended fails with.
_ENDED = (errno.ENOENT, errno.ESRCH, errno.ELOOP)


class State(enum.Enum):
    """Whether a namespace exists. UNKNOWN where nothing proves either."""

    LIVING = 'living'
    GONE = 'gone'
    UNKNOWN = 'unknown'


class Verdict(NamedTuple):
    """What could be found out; why, and what would help, if UNKNOWN."""

    state: State
    reason: str = ''


LIVING, GONE = Verdict(State.LIVING), Verdict(State.GONE)


def state(path: Optional[str], known: Optional[NamespaceId],
          tap: Optional[Tap] = None) -> State:
    """Return whether a sandbox exists; see :meth:`Judge.judge`."""
    return Judge().judge(path, known, tap).state


def find_taps() -> dict[str, Tap]:
    """Return the macvtaps of this namespace by their MAC addresses."""
    own = namespaces.identify(namespaces.OWN)
    with Netlink() as netlink:
        return {link.mac: Tap(own, link.mac) for link in netlink.links()
                if own is not None and link.kind == 'macvtap'}


class _View(NamedTuple):
    """The namespaces at one place, as seen at one moment.

    :ivar paths: one path of each, by device and inode; not of our own
    :ivar hides: whether some could not be examined
    """

    paths: dict[tuple[int, int], str]
    hides: bool


class Judge:
    """Judges namespaces within one operation: what it sees is kept.

    So judge only what was known before, and what is to be deleted by another
    one, under the lock.
    """

    def __init__(self) -> None:
        self._views: dict[str, _View] = {}
        self._blindness: Optional[str] = None
        self._links: Optional[set[tuple[Optional[str], str]]] = None

    def judge(self, path: Optional[str], known: Optional[NamespaceId],
              tap: Optional[Tap] = None) -> Verdict:
        """Return whether a sandbox still exists: its namespace, or macvtap.

        :param path: where its namespace once was
        :param known: what that was; None if that is not known
        :param tap: the macvtap of a VM, which has no namespace
        """
        if tap is not None:
            return self._judge_tap(tap)
        if known is None:
            return Verdict(State.UNKNOWN, 'nothing says which one it was')
        is_absent = False
        if known.cookie is not None:
            try:
                os.close(namespaces.open_by_number(known))
                return LIVING
            except OSError as err:
                is_absent = err.errno == errno.ESTALE
        shown, is_missing = None, False
        if path is not None:
            try:
                shown = namespaces.identify_or_fail(path)
                if shown.is_same(known):
                    return LIVING
            except FileNotFoundError:
                is_missing = not os.path.lexists(path)
            except OSError:
                pass  # a placeholder, or a fault of this process
        if is_absent and not self.blindness(path):
            return GONE
        if path is None or not (shown or is_missing):
            return self._unknown(known, path, 'no namespace is seen there')
        return self._by_search(path, known)

    def _judge_tap(self, tap: Tap) -> Verdict:
        """Judge by the interfaces of the node.

        A break0 must be among them: a process in another namespace, or what
        the kernel shows while the parent is gone, proves nothing.
        """
        own = namespaces.identify(namespaces.OWN)
        if own is None or not own.is_same(tap.namespace):
            return Verdict(State.UNKNOWN, 'this process is not in the '
                           'namespace where its macvtap was seen')
        try:
            if self._links is None:
                with Netlink() as netlink:
                    self._links = {(link.kind, link.mac)
                                   for link in netlink.links()}
        except exceptions.KernelRefused as err:
            return Verdict(State.UNKNOWN, str(err))
        if ('macvtap', tap.mac) in self._links:
            return LIVING
        if 'macvlan' not in {kind for kind, _ in self._links}:
            return Verdict(State.UNKNOWN, 'no break0 is seen on the node')
        return GONE

    def _by_search(self, path: str, known: NamespaceId) -> Verdict:
        """Judge by what else is seen where it was.

        Its name was removed, or its process has ended; another process may
        be in it all the same.
        """
        place = _place_of(path)
        for each in {place, _PROC}:
            view = self._view(each)
            found = view.paths.get(known[:2])
            try:
                if found and namespaces.identify_or_fail(found).is_same(known):
                    return LIVING
            except OSError as err:
                if err.errno not in (*_ENDED, errno.ENXIO):  # as EMFILE
                    return self._unknown(known, path, '%s: %s' % (
                        found, err.strerror))
            # A name goes with its sandbox, so where the kernel has nothing
            # better, processes that are not seen do not count.
            if view.hides and (each == place or known.cookie is not None):
                return self._unknown(known, path, 'not all namespaces in %s '
                                     'can be read' % each)
        if not any(map(namespaces.identify,
                       self._view(place).paths.values())):
            return self._unknown(known, path,
                                 'no other one is seen in %s' % place)
        return GONE

    def _unknown(self, known: NamespaceId, path: Optional[str],
                 reason: str) -> Verdict:
        text = '%s: %s' % (path, reason) if path else 'its path is not known'
        if known.cookie is not None:
            text += '; its number proves nothing, since ' + (
                self.blindness(path) or 'the kernel refuses to look')
        return Verdict(State.UNKNOWN, text)

    def blindness(self, path: Optional[str] = None) -> str:
        """Return why the kernel does not show namespaces by their number.

        Empty if it does: some that live, and are not our own, were found.

        :param path: near which there may be some
        """
        if self._blindness is None:
            self._blindness = self._find_blindness(path)
        return self._blindness

    def _find_blindness(self, path: Optional[str]) -> str:
        own = namespaces.identify(namespaces.OWN)
        if own is not None and own.cookie is None:
            return 'this kernel gives namespaces none (linux 6.18 does)'
        # Near the path first: a container can have thousands of processes,
        # of which each takes 8 us, under the lock.
        living = (each for place in dict.fromkeys((
            _place_of(path or _PROC + '/1/ns/net'), _PROC))
            for _, each in _seen_at(place) if each is not None)
        shown = list(itertools.islice(
            (each for each in map(_is_shown, living) if each is not None),
            _CONTROLS))
        # Where there is none but our own, one is made.
        return '' if all(shown or [_is_made_one_shown()]) else _why_blind()

    def _view(self, place: str) -> _View:
        if place not in self._views:
            self._views[place] = _look_at(place)
        return self._views[place]


def _place_of(path: str) -> str:
    """Return where a path is one of many: a directory of names, or a proc."""
    process = re.fullmatch(r'(/.+)/\d+(?:/task/\d+)?/ns/net', path)
    return process[1] if process else os.path.dirname(path)


def _look_at(place: str) -> _View:
    """See which namespaces are at a place, without opening any."""
    paths: dict[tuple[int, int], str] = {}
    hides = False
    for found, path in _seen_at(place):
        if path is None:
            hides = True
        else:
            paths.setdefault(found, path)
    return _View(paths, hides)


def _seen_at(place: str
             ) -> Iterator[tuple[tuple[int, int], Optional[str]]]:
    """Iterate over the namespaces at a place: device and inode, path.

    Without a path, it stands for one that could not be examined.
    """
    hidden = (0, 0), None
    try:
        own = os.stat(namespaces.OWN)
        names = os.listdir(place)
    except OSError:
        yield hidden
        return
    is_proc = os.path.isdir(place + '/1')
    for name in filter(str.isdigit, names) if is_proc else names:
        path = '%s/%s%s' % (place, name, '/ns/net' if is_proc else '')
        try:
            found = namespaces.seen(path, own)
        except OSError as err:
            if err.errno not in _ENDED:
                yield hidden
        else:
            if found:
                yield found, path


def _is_shown(path: str) -> Optional[bool]:
    """Return whether a living namespace can be opened by its number.

    None if it has just ended, or the kernel numbers none: that shows nothing.
    """
    try:
        known = namespaces.identify_or_fail(path)
        if known.cookie is None:
            return None
        try:
            os.close(namespaces.open_by_number(known))
            return True
        except OSError:
            if namespaces.identify_or_fail(path).is_same(known):
                return False
    except OSError:
        pass
    return None


def _why_blind() -> str:
    with contextlib.suppress(OSError):  # as of no descriptors left
        if not node.capabilities() >> node.CAP_SYS_ADMIN & 1:
            return 'this process lacks CAP_SYS_ADMIN'
        if os.stat('/proc/self/ns/pid').st_ino != _FIRST_PROCESS_NAMESPACE:
            return 'this process is not in the first process namespace'
    return 'this process may not see other namespaces'


def _is_made_one_shown() -> bool:
    """Make a namespace; whether it can be opened by its number.

    False if this process may make none.
    """
    with contextlib.ExitStack() as stack:
        def make() -> None:
            if namespaces.unshare():
                with contextlib.suppress(OSError):
                    made.append(stack.enter_context(open(namespaces.OWN)))

        made: list[TextIO] = []
        with contextlib.suppress(RuntimeError):  # no thread can be started
            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
        return any(_is_shown('/proc/self/fd/%d' % file.fileno())
                   for file in made)
