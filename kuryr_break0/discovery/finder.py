# SPDX-License-Identifier: Apache-2.0

"""Find the namespaces of containers, and keep their addresses bound.

A container can change its namespace a thousand times per second. So an event
only marks the namespace, and the finder reads a constantly changing namespace
only once per second. Containers that exceed their credit of processor time
share a tenth of a processor, and do not delay other containers.

After an event, the finder searches new mounts and new processes for
namespaces. If the search does not find the namespace of the event, the finder
searches all mounts and processes. A timer repeats the full search.
"""

from __future__ import annotations

import time
from typing import Callable, Hashable, Optional

from kuryr_break0 import config
from kuryr_break0.discovery.binder import Binder
from kuryr_break0.discovery import ended
from kuryr_break0.discovery.namespace import BURST
from kuryr_break0.discovery.namespace import LAST
from kuryr_break0.discovery.namespace import Namespace
from kuryr_break0.discovery import read_queue
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.pace import Pace

LOG = log.get_logger(__name__)

#: Maximum duration of :meth:`Finder.work` in seconds.
_STEP = 0.05
#: Minimum number of messages in one read that counts as a flood.
_FLOOD = 32
#: Seconds to wait after a flood, so that the next read gets more messages.
_FLOOD_PAUSE = 0.1
#: Seconds between two searches if the kernel sends no events.
_POLL_INTERVAL = 1.0
#: Seconds after a change in which the namespace will probably change again. If
#: events are lost, the finder reads such namespaces before all others.
_ACTIVE = 10.0
#: Maximum time in seconds from the end of a namespace until the kernel deletes
#: its macvlans, on a node without much load.
_ENDING = 1.0


class Finder:
    """Finds containers, and keeps their addresses bound.

    Only one thread may use it.

    :param options: options with ``discover`` set to true
    :param on_change: function to call after each bind, unbind and read of the
        records
    """

    def __init__(self, options: config.Options, ledger: Ledger,
                 on_change: Callable[[], None] = lambda: None) -> None:
        self._binder = Binder(options, ledger, on_change)
        self._mounts = kernel.open_mounts()
        self._events: Optional[kernel.NamespaceEvents] = None
        try:
            self._events = kernel.NamespaceEvents()
        except OSError as err:
            LOG.warning('Cannot receive events of containers, so the agent '
                        'searches for containers every second: %s. Give the '
                        'agent CAP_NET_BROADCAST.', err)
        self._search = kernel.Search(options.proc_dirs)
        #: namespaces that are not examined yet, the newest last
        self._unexamined: dict[kernel.Place, kernel.NamespaceLocation] = {}
        self._took_newest = False
        self._namespaces: dict[kernel.Place, Namespace] = {}
        self._numbers: dict[int, Namespace] = {}
        self._queue = read_queue.ReadQueue()
        #: numbers of namespaces to search for
        self._unknown: set[int] = set()
        #: numbers of namespaces that no search has found
        self._unseen: set[int] = set()
        self._ended = ended.EndedNamespaces(self._binder, self._queue.pace)
        self._binder.read_records()
        self._interval = options.resync_interval
        #: monotonic time of the next :meth:`mark_all`
        self._all_at = time.monotonic() + self._interval
        #: monotonic times of the next searches: for new namespaces, and for
        #: all namespaces
        self._search_at: Optional[float] = None
        self._search_all_at: Optional[float] = 0.0
        self._mounts_changed = False
        #: whether a macvlan may have changed in a namespace without a number
        self._is_unexplained = False
        #: monotonic time until which an event about a parent may come from the
        #: end of a known namespace
        self._explained_until = 0.0
        self._not_before = 0.0
        #: paces of the searches: for new namespaces, and for all namespaces
        self._new_pace, self._all_pace = Pace(), Pace()

    def close(self) -> None:
        self._mounts.close()
        if self._events is not None:
            self._events.close()

    def list_readable(self) -> list[int]:
        """Return descriptors that become readable when events arrive."""
        return [] if self._events is None else [self._events.fileno()]

    def list_exceptional(self) -> list[int]:
        """Return descriptors that report mounts as exceptional conditions."""
        return [self._mounts.fileno()]

    def note_mounts(self) -> None:
        """Schedule a search that includes new mounts."""
        self._mounts_changed = True
        self._schedule_search()

    def read_events(self) -> None:
        """Read the events, and mark their namespaces."""
        now = time.monotonic()
        if self._events is None:
            return
        changes = self._events.get()
        if changes.lost:
            self._mark_after_loss(now)
        numbers = self._numbers.keys()
        self._unknown |= ((changes.changed | changes.numbered) - numbers
                          - self._unseen) - changes.ended
        self._unseen -= changes.ended
        for number in changes.changed & numbers:
            self._queue.mark(self._numbers[number], now)
        for number in changes.ended & numbers:
            # The kernel reuses numbers, so the event may be about an earlier
            # namespace with this number. So examine the present namespace
            # again.
            location = self._numbers[number].location
            self._remove(self._numbers[number])
            self._unexamined.setdefault(location.place, location)
        if changes.ended:
            self._explained_until = now + _ENDING
        # A change of a macvlan causes an event about its parent. If the
        # macvlan's namespace has a number, a second event has this number.
        # When a namespace has ended, the kernel deletes its macvlans, and
        # sends only the events about the parents.
        self._is_unexplained |= (
            changes.is_stacked and not changes.changed
            and now >= self._explained_until)
        if changes.interfaces or changes.lost or self._unknown:
            self._schedule_search()
        if changes.messages >= _FLOOD:
            # The pause ends early if other work is due.
            time.sleep(max(0.0, min(_FLOOD_PAUSE, self.find_due() - now)))

    def note_records(self) -> None:
        """Mark namespaces with changed records."""
        now = time.monotonic()
        for identity in self._binder.read_records():
            namespace = self._namespaces.get(identity[:2])
            if namespace is not None:
                self._queue.mark(namespace, now)

    def mark_all(self) -> None:
        """Schedule a search for all namespaces, and a read of each."""
        now = time.monotonic()
        self._all_at = now + self._interval
        self.note_records()
        self._unseen.clear()
        self._schedule_full_search()
        self._queue.add_routine(self._namespaces.values())

    def _mark_after_loss(self, now: float) -> None:
        """Schedule a read of all namespaces after events were lost.

        Active and bound namespaces come first.
        """
        for namespace in self._namespaces.values():
            if now - namespace.changed_at < _ACTIVE or (
                    self._binder.has_bound(namespace.location.namespace)):
                self._queue.mark(namespace, now)
            else:
                self._queue.add_routine([namespace])

    def _schedule_search(self) -> None:
        if self._search_at is None:
            self._search_at = time.monotonic() + BURST

    def _schedule_full_search(self) -> None:
        if self._search_all_at is None:
            self._search_all_at = time.monotonic() + BURST

    def find_due(self) -> float:
        """Return the monotonic time at which :meth:`work` is due."""
        now = time.monotonic()
        times = [now if self._unexamined else self._all_at]
        for at, pace in ((self._search_at, self._new_pace),
                         (self._search_all_at, self._all_pace)):
            if at is not None:
                times.append(max(at, now + pace.wait()))
        times += self._queue.find_due(now), self._ended.find_due(now)
        return max(min(times), self._not_before)

    def postpone(self) -> None:
        """Postpone all work by a second, after an unexpected exception."""
        self._not_before = time.monotonic() + LAST

    def work(self) -> None:
        """Search, examine, read and unbind for about ``_STEP`` seconds.

        After an error, the rest of the work stays due.
        """
        if self._all_at <= time.monotonic():
            self.mark_all()
        self._search_if_due()
        self._ended.unbind()
        now = time.monotonic()
        ends = now + _STEP
        while now < ends:
            # Alternate between new and changed namespaces, because the number
            # of either is unlimited.
            is_new = bool(self._unexamined)
            if is_new:
                place = self._choose_unexamined()
                self._examine(self._unexamined[place])
                del self._unexamined[place]
            entry = self._queue.pop_changed(now)
            if entry is None and not is_new:
                entry = self._queue.pop_late()
            if entry is not None:
                self._read(*entry)
            elif not is_new:
                break
            now = time.monotonic()
        if self._unknown and not self._unexamined and self._search_at is None:
            self._schedule_full_search()

    def _choose_unexamined(self) -> kernel.Place:
        """Alternately return the newest and the oldest unexamined namespace.

        A container can create namespaces faster than the finder examines them.
        A search lists namespaces with a name last, as the newest. So the
        finder examines a namespace with a name at once, and each other
        namespace within a limited time.
        """
        self._took_newest = not self._took_newest
        return next(reversed(self._unexamined) if self._took_newest
                    else iter(self._unexamined))

    def _search_if_due(self) -> None:
        now = time.monotonic()
        if self._search_all_at is not None and (
                self._search_all_at <= now and not self._all_pace.wait()):
            self._all_pace.begin()
            self._search_all()
            self._search_all_at = None if self._events is not None else (
                now + _POLL_INTERVAL)
            self._all_pace.end()
        if self._search_at is not None and (
                self._search_at <= now and not self._new_pace.wait()):
            self._new_pace.begin()
            self._search_new()
            self._search_at = None
            self._new_pace.end()

    def _search_new(self) -> None:
        """Find the namespaces of new mounts and new processes."""
        mounts_changed, self._mounts_changed = self._mounts_changed, False
        try:
            locations = self._search.new(mounts_changed)
        except Exception:
            self._schedule_full_search()
            raise
        new = {}
        for each in locations:
            namespace = self._namespaces.get(each.place)
            # The kernel reuses the inode of an ended namespace at once, often
            # before the event of its end arrives.
            if namespace is None or each.is_named or (
                    not namespace.location.is_current()):
                new[each.place] = each
        for place, each in new.items():
            # Prefer a name to the path of a process, because the process can
            # end before the namespace, as with "ip netns exec".
            known = self._unexamined.get(place)
            if each.is_named or known is None or not (
                    known.is_named and known.is_current()):
                # Move the namespace to the end, as the newest. The previous
                # entry may be for an ended namespace with the same inode.
                self._unexamined.pop(place, None)
                self._unexamined[place] = each
        if self._is_unexplained and new.keys() <= self._namespaces.keys():
            self._schedule_full_search()
        self._is_unexplained = False

    def _search_all(self) -> None:
        """Find all namespaces of the node, and remove the ended ones.

        :raises SystemRefused: if the namespaces cannot be listed completely;
            no namespace is removed then
        """
        now = time.monotonic()
        present = {each.place: each for each in self._search.all(
            {place: each.location.path
             for place, each in self._namespaces.items()})}
        # Omit the namespaces that ended before they were examined.
        self._unexamined = {
            place: each for place, each in present.items()
            if place in self._unexamined or place not in self._namespaces}
        for place, namespace in list(self._namespaces.items()):
            location = namespace.location
            if place in present:
                self._ended.discard(location.namespace)
                if present[place].path != location.path or (
                        location.process is None and present[place].process):
                    # Another namespace may have the inode now, or the new
                    # process may identify the container.
                    self._unexamined[place] = present[place]
                if self._events is None:
                    self._queue.mark(namespace, now)
            elif (self._binder.has_bound(location.namespace)
                  and kernel.judge_state(location.path, location.namespace)
                  is kernel.State.LIVING):
                # Another program keeps the namespace open, for example the
                # server of Podman 4. The kernel still opens the namespace by
                # its cookie, and reports its end by an event.
                self._queue.mark(namespace, now)
            else:
                self._remove(namespace)
        self._unseen |= self._unknown
        self._unknown.clear()
        self._is_unexplained = self._mounts_changed = False

    def _examine(self, location: kernel.NamespaceLocation) -> None:
        """Identify a found namespace, and then read it.

        The kernel sends events of a namespace only if the namespace has a
        number. :func:`kernel.examine_namespace` assigns the number before the
        read, so that each change after the read causes an event.
        """
        self._queue.pace.begin()
        try:
            examined = kernel.examine_namespace(location)
        except exceptions.NetnsUnusable as err:
            LOG.debug('Cannot examine %s yet: %s', location.path, err)
            return
        location, container, number = examined
        namespace = self._namespaces.get(location.place)
        if (namespace is not None
                and namespace.location.namespace == location.namespace):
            namespace.location = location
            namespace.container = container
        else:
            # The kernel reuses inodes and numbers.
            for earlier in (namespace, None if number is None
                            else self._numbers.get(number)):
                if earlier is not None:
                    self._remove(earlier)
            namespace = Namespace(location, container, number,
                                  changed_at=time.monotonic())
            self._namespaces[location.place] = namespace
            self._ended.discard(location.namespace)
            if number is not None:
                self._numbers[number] = namespace
                self._unknown.discard(number)
                self._unseen.discard(number)
        self._queue.pace.end(namespace.cause)
        if not self._queue.add_if_late(namespace):
            self._read(namespace, namespace.cause)

    def _read(self, namespace: Namespace, cause: Hashable) -> None:
        """Read a namespace; bind new addresses, and unbind removed addresses.

        :param cause: the cause to charge for the processor time
        """
        now = time.monotonic()
        self._queue.pace.begin()
        namespace.read_at = now
        try:
            if not self._binder.update(namespace.location,
                                       namespace.container):
                self._queue.mark(namespace, now)
        except exceptions.NetnsUnusable:
            state = kernel.judge_state(namespace.location.path,
                                       namespace.location.namespace)
            if state is not kernel.State.GONE:
                self._schedule_full_search()  # may find its new path
            if state is kernel.State.LIVING:
                self._queue.mark(namespace, now)
            else:
                self._remove(namespace)
                # The path may lead to another namespace now, so examine the
                # path again.
                self._unexamined.setdefault(namespace.location.place,
                                            namespace.location)
        except Exception:
            self._queue.mark(namespace, now)
            raise
        finally:
            self._queue.pace.end(cause)

    def _remove(self, namespace: Namespace) -> None:
        """Remove a namespace, and schedule the unbind of its addresses."""
        place = namespace.location.place
        identity = namespace.location.namespace
        if self._namespaces.get(place) is namespace:
            del self._namespaces[place]
        self._queue.remove(namespace)
        if namespace.number is not None and (
                self._numbers.get(namespace.number) is namespace):
            del self._numbers[namespace.number]
        self._ended.add(identity, namespace.cause)
