# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Repairs at once what is changed on the node, and looks now and then."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import Any, Callable, Optional

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0.manager import Break0Manager
from kuryr_break0.metrics import Metrics
from kuryr_break0.metrics import Server
from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)

#: A burst of events is one repair: it begins when nothing has come for the
#: first number of seconds, at the latest after the second.
_QUIET = 0.02
_BURST = 0.2
#: Seconds after which an entry that is new must have its route. A bind takes
#: a thousandth of that, so one that has none was killed.
_SETTLED = 1.0


class Agent:
    """Keeps the node right, beside kuryr-daemon.

    The two share the ledger, its lock and the kernel, and nothing else, so
    either may be restarted at any time. What a pod's ADD or DEL changes is
    done when that returns; the agent is for all that happens otherwise.

    :param load: reads the options anew
    """

    def __init__(self, load: Callable[[], config.Options]) -> None:
        self._load = load
        self._options = load()
        self._metrics = Metrics()
        self._server = Server(self._metrics)
        self._stop = False
        self._reload = False
        self._ledger_changed = False

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                       signal.SIGIO):
            signal.signal(number, self._signalled)
        LOG.info('Watching over %s', self._options.device)
        with netlink.Events() as events, contextlib.closing(self._server):
            while not self._stop:
                self._work(events, woken)
        LOG.info('Ending')

    def _work(self, events: netlink.Events, woken: socket.socket) -> None:
        """Work with the options as they are now."""
        ledger = Ledger(self._options.state_dir, self._options.lock_timeout)
        self._metrics.configure(self._options)
        with ledger.attend() as alive:
            while not self._stop and not self._reload:
                # Again each time, since the directory may be another one.
                watched = ledger.watch()
                # What changes from now on may be too late for the sync.
                self._ledger_changed = False
                self._server.listen(self._options.metrics_bind)
                self._sync()
                alive()
                self._wait(events, woken)
                if watched is not None:
                    os.close(watched)
        if self._reload:
            self._reload_options()

    def _signalled(self, number: int, frame: Any) -> None:
        if number == signal.SIGIO:
            self._ledger_changed = True
        elif number == signal.SIGHUP:
            self._reload = True
        else:
            self._stop = True

    def _wait(self, events: netlink.Events, woken: socket.socket) -> None:
        """Return when there may be something to repair."""
        due = time.monotonic() + self._options.resync_interval
        burst_ends = float('inf')
        while not (self._stop or self._reload):
            if self._ledger_changed:
                self._ledger_changed = False
                due = min(due, time.monotonic() + _SETTLED)
            timeout = min(due, burst_ends) - time.monotonic()
            if burst_ends < float('inf'):
                timeout = min(timeout, _QUIET)
            ready, _, _ = select.select([events.fileno(), woken.fileno()],
                                        [], [], max(timeout, 0))
            if woken.fileno() in ready:
                woken.recv(4096)
            if events.fileno() in ready:
                heard = events.get()
                self._metrics.heard(heard)
                if (any(map(self._matters, heard))
                        and burst_ends == float('inf')):
                    burst_ends = time.monotonic() + _BURST
            elif burst_ends < float('inf') and not ready:
                return
            if time.monotonic() >= min(due, burst_ends):
                return

    def _matters(self, event: netlink.Event) -> bool:
        """Whether an event may be of something to repair.

        Not the making of a pod's interface, of which there are many events,
        nor that a route or neighbour of ours was set.
        """
        if event.what == 'link':
            return (event.gone
                    or event.ifname == self._options.device)
        if event.what == 'route':
            ours = event.protocol == self._options.route_protocol
            return event.dst is not None and (event.gone or not ours)
        if event.what == 'neighbour':
            return event.gone and event.ifindex == netlink.index_of(
                self._options.device)
        return True

    def _sync(self) -> None:
        began = time.monotonic()
        error: Optional[Exception] = None
        try:
            Break0Manager(self._options).sync()
        except exceptions.Break0Error as err:
            LOG.error('Not all could be repaired: %s', err)
            error = err
        except Exception as err:  # must not end what is to mend
            LOG.exception('Not all could be repaired')
            error = err
        self._metrics.synced(time.monotonic() - began, error)

    def _reload_options(self) -> None:
        self._reload = False
        try:
            self._options = self._load()
            LOG.info('Read the configuration again')
        except Exception as err:  # the one from before is still good
            LOG.error('The configuration stays as it was: %s', err)
