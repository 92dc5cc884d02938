# SPDX-License-Identifier: Apache-2.0

"""Runs the agent: reconciles after events, and by a timer."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from typing import Any, Callable, Iterator, Optional

from kuryr_break0.agent import cni_server
from kuryr_break0.agent.event_filter import EventFilter
from kuryr_break0.agent import http
from kuryr_break0.agent.metrics import Metrics
from kuryr_break0.agent import service
from kuryr_break0.break0 import guard
from kuryr_break0 import config
from kuryr_break0.discovery import engines
from kuryr_break0.discovery import finder
from kuryr_break0.discovery import records
from kuryr_break0.engine.reconciler import Reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.pace import Pace

LOG = log.get_logger(__name__)

#: Seconds from an event to its sync, so that one sync repairs a whole burst.
_BURST = 0.05
#: Seconds from a new record to a sync. A bind takes 1 ms, so if the record has
#: no route by then, its bind was killed.
_SETTLED = 1.0
#: Minimum time between two syncs, in seconds.
_PAUSE = 0.1
#: Processor seconds that repairs of lost break0s may take before the next such
#: repair has to wait. Pods cannot cause these repairs, so the repairs have
#: their own pace, and events of pods do not delay the repairs.
_LOSS_CREDIT = 2.0
#: If one read returns at least _FLOOD events, the agent waits _FLOOD_PAUSE
#: seconds, so that the next read returns more events at once.
_FLOOD = 32
_FLOOD_PAUSE = 0.1
#: Seconds between two attempts to serve CNI requests, for example while an
#: earlier agent ends.
_RETRY = 0.5
#: Seconds to wait after an unexpected exception.
_RECOVERY = 1.0
#: Seconds from the start of the agent to the first search for unbound
#: containers.
_FIRST_SEARCH = 2.0
_UNWATCHED = ('Cannot watch the state directory, so the agent notices new '
              'records only by its timer: %s. If a limit is the reason, raise '
              'the sysctls fs.inotify.max_user_watches and '
              'fs.inotify.max_user_instances.')


class Agent:
    """Daemon that keeps the kernel equal to the ledger.

    The agent and kuryr-daemon share only the ledger, its lock and the kernel,
    so each may be restarted at any time. An ADD or DEL of Kuryr does not need
    the agent: each request makes its own changes before it returns. The agent
    repairs changes by other programs, and executes the requests that the CNI
    shim sends.

    :param load: reads the options from the configuration files
    """

    def __init__(self, options: config.Options,
                 load: Callable[[], config.Options]) -> None:
        self._load = load
        self._options = options
        self._metrics = Metrics(options)
        self._cni = cni_server.CNIServer()
        self._server = http.Server(self._metrics, {
            '/healthz': lambda: (self._metrics.describe_failure()
                                 or self._cni.describe_failure()),
            '/livez': lambda: (self._metrics.describe_hang()
                               or self._cni.describe_hang())})
        self._nft_events: Optional[kernel.NftEvents] = None
        self._finder: Optional[finder.Finder] = None
        #: whether the ledger may still have claims of discovered containers
        self._has_discovered = False
        self._is_stopping = False
        self._is_reloading = False
        #: earliest monotonic time of a sync for an event
        self._not_before = 0.0
        #: earliest monotonic time of a sync for a lost break0 or parent
        self._not_before_loss = 0.0
        self._pace = Pace()
        self._loss_pace = Pace(_LOSS_CREDIT)
        self._synced_at = time.monotonic()
        self._failures = 0
        #: reason why the records are not watched
        self._watch_error: Optional[str] = None
        #: monotonic time of the next search for unbound containers
        self._unserved_at = time.monotonic() + _FIRST_SEARCH

    def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle_signal)
        LOG.info('Watching %s', self._options.device)
        with kernel.Events() as events, contextlib.closing(
                self._server), contextlib.closing(
                self._cni), _open_nft_events() as self._nft_events:
            # Signals are handled from here on. The first sync can take long.
            service.notify_ready()
            while not self._is_stopping:
                self._run_with_options(events, woken)
        LOG.info('The agent ends')

    def _run_with_options(self, events: kernel.Events,
                          woken: socket.socket) -> None:
        """Run until a signal reloads the options or ends the agent."""
        options = self._options
        ledger = Ledger(options.state_dir)
        event_filter = EventFilter(options, ledger)
        reconciler = Reconciler(options, ledger)
        self._metrics.options = options
        with contextlib.suppress(exceptions.LedgerUnavailable):
            ledger.prepare()
        with ledger.heartbeat.keep() as beat, _open_inotify() as watch, \
                _open_finder(options, ledger) as self._finder:
            has_to_unbind = self._has_to_unbind(ledger)
            while not self._is_stopping and not self._is_reloading:
                # Watch before the sync. Otherwise the agent would miss a
                # record that is written during the sync.
                if watch is not None:
                    self._watch_records(watch, ledger)
                self._cni.listen(options)
                # While another agent serves CNI requests, it may also
                # discover containers, so their addresses stay bound.
                if has_to_unbind and self._cni.is_complete:
                    has_to_unbind = not records.unbind_discovered(
                        options, ledger)
                    self._has_discovered &= has_to_unbind
                self._server.listen(options.metrics_bind)
                if self._sync(reconciler, event_filter):
                    # A failed sync gives no heartbeat. Without a heartbeat,
                    # each ADD and DEL makes repairs.
                    beat()
                if self._finder is not None:
                    self._finder.note_records()
                try:
                    self._wait(events, woken, watch, event_filter)
                except Exception as err:  # an error must not end the agent
                    # The next sync also repairs changes with unread events.
                    LOG.error('Cannot wait for events: %r. Reconciling '
                              'everything instead. If this line recurs, '
                              'restart the agent, and report a bug.', err)
                    time.sleep(_RECOVERY)
        if self._is_reloading:
            self._reload_options()

    def _has_to_unbind(self, ledger: Ledger) -> bool:
        """Return whether to unbind the discovered containers of this agent.

        Unbind them if the operator has set ``discover`` to false. Containers
        of another agent stay bound, even if that agent is stopped.
        """
        if self._finder is not None:
            records.store_unit(ledger)
            self._has_discovered = True
            return False
        if self._has_discovered or records.is_this_unit(ledger):
            return True
        with contextlib.suppress(exceptions.LedgerUnavailable):
            count = sum(1 for _ in records.find_discovered(ledger))
            if count:
                LOG.info('%d addresses of containers that another agent has '
                         'found stay bound until their containers end. To '
                         'unbind them, run: kuryr-break0 cleanup', count)
        return False

    def _handle_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            self._is_reloading = True
        else:
            self._is_stopping = True

    def _wait(self, events: kernel.Events, woken: socket.socket,
              watch: Optional[kernel.Inotify],
              event_filter: EventFilter) -> None:
        """Wait until a sync is due, and meanwhile do all other work."""
        timer = time.monotonic() + self._options.resync_interval
        due = loss_due = timer
        readable = [events.fileno(), woken.fileno()]
        if self._nft_events is not None:
            readable.append(self._nft_events.fileno())
        if watch is not None:
            readable.append(watch.fileno())
        exceptional: list[int] = []
        if self._finder is not None:
            readable += self._finder.list_readable()
            exceptional += self._finder.list_exceptional()
        while not (self._is_stopping or self._is_reloading):
            timeout = min(timer, self._find_sync_time(
                due, loss_due)) - time.monotonic()
            if timeout <= 0:
                return
            ready, _, changed = select.select(
                readable, [], exceptional, self._limit_timeout(timeout))
            if not self._cni.is_complete:
                self._cni.listen(self._options)
            if time.monotonic() >= self._unserved_at:
                self._unserved_at = time.monotonic() + (
                    self._metrics.look_for_unserved())
            if self._finder is not None:
                self._find_containers(changed, ready)
            if woken.fileno() in ready:
                woken.recv(4096)
            if watch is not None and watch.fileno() in ready:
                # A failed write of a record can leave a temporary file. Each
                # sync repeats the write, so a temporary file must not cause a
                # sync.
                if any(not each.startswith(files.UNFINISHED)
                       for each in watch.read()):
                    due = min(due, time.monotonic() + _SETTLED)
            nft_events = self._nft_events
            if nft_events is not None and nft_events.fileno() in ready:
                if nft_events.get():
                    due = min(due, time.monotonic() + _BURST)
            if events.fileno() in ready:
                received = events.get()
                self._metrics.count_events(received)
                is_loss = event_filter.include_loss(received)
                now = time.monotonic()
                if any([event_filter.include(event) for event in received]):
                    due = min(due, now + _BURST)
                    # The kernel has deleted all routes too, so do not wait.
                    if is_loss:
                        loss_due = min(loss_due, now)
                # The pause after a flood must not delay any work.
                pause = self._find_sync_time(due, loss_due) - now
                if self._finder is not None:
                    pause = min(pause,
                                self._finder.find_due() - time.monotonic())
                if len(received) >= _FLOOD and pause > 0:
                    time.sleep(min(_FLOOD_PAUSE, pause))

    def _find_sync_time(self, due: float, loss_due: float) -> float:
        """Return the monotonic time of the next sync.

        :param due: monotonic time of a sync for any event
        :param loss_due: monotonic time of a sync for a lost break0 or parent
        """
        return min(max(due, self._not_before),
                   max(loss_due, self._not_before_loss))

    def _limit_timeout(self, timeout: float) -> float:
        """Return a timeout that ends before any other work is due.

        :param timeout: seconds until the next sync
        """
        if not self._cni.is_complete:
            timeout = min(timeout, _RETRY)
        timeout = min(timeout, self._unserved_at - time.monotonic())
        if self._finder is not None:
            timeout = min(timeout, self._finder.find_due() - time.monotonic())
        return max(0.0, timeout)

    def _find_containers(self, changed: list[int], ready: list[int]) -> None:
        """Read the events of the finder, and do the finder's due work.

        :param changed: descriptors with an exceptional condition
        :param ready: descriptors that are readable
        """
        assert self._finder is not None
        if changed:
            self._finder.note_mounts()
        if any(each in ready for each in self._finder.list_readable()):
            self._finder.read_events()
        if self._finder.find_due() <= time.monotonic():
            try:
                self._finder.work()
            except Exception as err:  # an error must not end the agent
                # The work stays due, or the timer makes it due again.
                self._finder.postpone()
                LOG.error('Cannot search for containers: %r. Retrying in 1 '
                          'second. If this line recurs, restart the agent, '
                          'and report a bug.', err)

    def _watch_records(self, watch: kernel.Inotify, ledger: Ledger) -> None:
        """Watch the directory of the records.

        Call this method before each sync, because another program may have
        replaced the directory.
        """
        reason = None
        try:
            ledger.prepare()
            watch.watch(ledger.path, kernel.IN_MOVE_SELF)
            watch.watch(
                ledger.records.directory, kernel.IN_MOVED_TO | kernel.IN_DELETE
                | kernel.IN_DELETE_SELF | kernel.IN_MOVE_SELF)
        except (OSError, exceptions.LedgerUnavailable) as err:
            reason = str(err)
        if reason not in (None, self._watch_error):
            LOG.warning(_UNWATCHED, reason)
        self._watch_error = reason
        watch.read()

    def _sync(self, reconciler: Reconciler, event_filter: EventFilter) -> bool:
        """Reconcile the whole node; return whether all parts succeeded."""
        began = time.monotonic()
        # Only the loss of a break0 or parent causes a sync before _not_before.
        is_early = began < self._not_before
        pace, allowed = ((self._loss_pace, self._not_before_loss)
                         if is_early else (self._pace, self._not_before))
        pace.begin()
        error: Optional[Exception] = None
        try:
            event_filter.prepare()
            outcome = reconciler.sync()
            for error in outcome.errors[:1]:
                LOG.error('Reconciliation failed in part, and will be '
                          'repeated: %s', error)
            event_filter.update(outcome)
        except Exception as err:  # an error must not end the agent
            LOG.exception('Reconciliation failed. The agent will try again. '
                          'For the remedy, run: kuryr-break0 doctor')
            error = err
        ended = time.monotonic()
        self._metrics.record_sync(ended - began, error)
        # A sync can be due at once after each failed sync, for example because
        # the changes of the failed sync cause events. In that case each
        # failure doubles the pause, up to the interval of the timer. If the
        # time from the end of the last pause to this sync is longer than that
        # pause, the next pause is the shortest one again. So the failure of a
        # rare sync does not delay other repairs.
        is_later = began - allowed > allowed - self._synced_at
        self._failures = 0 if error is None else 1 if is_later else min(
            self._failures + 1, 20)
        self._synced_at = ended
        pause = _PAUSE * 2 ** self._failures if self._failures else _PAUSE
        earliest, paced = (
            ended + min(seconds, self._options.resync_interval)
            for seconds in (pause, max(pause, pace.end())))
        if is_early:
            self._not_before = max(self._not_before, earliest)
            self._not_before_loss = paced
        else:
            self._not_before = paced
            self._not_before_loss = max(self._not_before_loss, earliest)
        return error is None

    def _reload_options(self) -> None:
        self._is_reloading = False
        try:
            self._options = self._load()
            LOG.info('Read the configuration again')
        except Exception as err:  # an error must not end the agent
            LOG.error('Keeping the previous configuration until the next '
                      'SIGHUP: %s', err)


@contextlib.contextmanager
def _open_finder(options: config.Options, ledger: Ledger
                 ) -> Iterator[Optional[finder.Finder]]:
    """Yield a finder of containers, or None if ``discover`` is false."""
    if not (options.discover and options.enabled):
        yield None
        return
    with contextlib.closing(engines.Namer(options, ledger)) as namer, \
            contextlib.closing(finder.Finder(
                options, ledger, namer.request_names)) as opened:
        yield opened


@contextlib.contextmanager
def _open_nft_events() -> Iterator[Optional[kernel.NftEvents]]:
    """Yield a socket that receives deletions of our nftables tables.

    Yield None if the socket cannot be opened.
    """
    try:
        events = kernel.NftEvents(guard.PREFIX)
    except OSError as err:
        LOG.info('Cannot receive events of nftables, so the agent restores a '
                 'deleted guard only by its timer: %s', err)
        yield None
        return
    with contextlib.closing(events):
        yield events


@contextlib.contextmanager
def _open_inotify() -> Iterator[Optional[kernel.Inotify]]:
    """Yield an inotify descriptor, or None if it cannot be opened."""
    try:
        watch = kernel.Inotify()
    except OSError as err:
        LOG.warning(_UNWATCHED, err)
        yield None
        return
    with contextlib.closing(watch):
        yield watch
