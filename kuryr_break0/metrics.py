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

"""What the agent tells by HTTP: figures for Prometheus, and its health."""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import socketserver
import threading
import time
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence
from wsgiref import simple_server

from oslo_log import log as logging
import prometheus_client
from prometheus_client import core
from prometheus_client import registry as prometheus_registry

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import journal
from kuryr_break0.journal import Done
from kuryr_break0 import netlink
from kuryr_break0 import status as status_of

LOG = logging.getLogger(__name__)

_PREFIX = 'kuryr_break0'
#: Upper limits in seconds: from a bind, some milliseconds, to lock_timeout.
_BUCKETS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
#: Seconds that one who asks may keep silent.
_SILENCE = 10


class Metrics(prometheus_registry.Collector):
    """The figures of a node.

    What is bound and routed is looked at when somebody asks for the first
    time after a sync, so that asking often costs nothing. What all processes
    have done is in their journal.

    The thread of the agent tells; those of the server ask.
    """

    def __init__(self) -> None:
        # Those would repeat for each figure when the agent started.
        prometheus_client.disable_created_metrics()
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self.registry.register(self)
        ours: dict[str, Any] = {'namespace': _PREFIX,
                                'registry': self.registry}
        timed = {**ours, 'buckets': _BUCKETS}
        prometheus_client.Info(
            'build', 'What runs.', **ours).info(
                {'version': importlib.metadata.version('kuryr-break0')})
        self._seconds = {
            Done.BIND: prometheus_client.Histogram(
                'bind_seconds', 'Binding the addresses of a pod.', **timed),
            Done.UNBIND: prometheus_client.Histogram(
                'unbind_seconds', 'Unbinding the addresses of a pod.',
                **timed)}
        self._failures = {
            Done.BIND_FAILED: prometheus_client.Counter(
                'bind_failures', 'Binds that failed.', **ours),
            Done.UNBIND_FAILED: prometheus_client.Counter(
                'unbind_failures', 'Unbinds that failed.', **ours)}
        repairs = prometheus_client.Counter(
            'repairs', 'What was not as it should be, and is again.',
            ['reason'], **ours)
        self._repairs = {each: repairs.labels(each.name.lower())
                         for each in journal.REPAIRS}
        self._sync_seconds = prometheus_client.Histogram(
            'sync_seconds', 'Looks of the agent at everything, with what it '
            'repaired.', **timed)
        self._sync_failures = prometheus_client.Counter(
            'sync_failures', 'Syncs of the agent that failed.', **ours)
        self._last_success = prometheus_client.Gauge(
            'sync_last_success_timestamp_seconds',
            'When the last one ended that did not fail.', **ours)
        self._events = prometheus_client.Counter(
            'events_received', 'Changes that the kernel has told.', **ours)
        self._losses = prometheus_client.Counter(
            'events_lost', 'Times that the kernel had more to tell than '
            'could be kept.', **ours)
        self._options: Optional[config.Options] = None
        self._reading = threading.Lock()
        self._outdated = False
        self._status: Optional[status_of.Status] = None
        self._error: Optional[str] = None
        self._succeeded: Optional[float] = None
        self._ended = time.monotonic()

    def configure(self, options: config.Options) -> None:
        """Go by these options from now on."""
        self._options = options

    def synced(self, seconds: float, error: Optional[Exception]) -> None:
        """A sync of the agent has ended.

        :param error: what it failed by; None if it did not
        """
        self._sync_seconds.observe(seconds)
        self._ended = time.monotonic()
        self._error = str(error) if error is not None else None
        if error is not None:
            self._sync_failures.inc()
        else:
            self._last_success.set_to_current_time()
            self._succeeded = time.monotonic()
        self._outdated = True
        self._read_journal()  # before it is full

    def heard(self, events: Sequence[netlink.Event]) -> None:
        """The kernel has told of these."""
        lost = sum(event.what == 'lost' for event in events)
        self._events.inc(len(events) - lost)
        self._losses.inc(lost)

    def unwell(self) -> Optional[str]:
        """Why the agent does not do its work; None if it does."""
        if self._succeeded is None:
            since = 'yet'
        else:
            age = time.monotonic() - self._succeeded
            if age <= self._patience:
                return None
            since = 'for %d s' % age
        return 'No sync has succeeded %s: %s' % (
            since, self._error or 'none has ended')

    def stuck(self) -> Optional[str]:
        """Why it should be restarted; None while it tries."""
        age = time.monotonic() - self._ended
        if age <= self._patience:
            return None
        return 'No sync has ended for %d s' % age

    @property
    def _patience(self) -> float:
        assert self._options is not None
        return self._options.patience

    def refresh(self) -> None:
        """Look at what :meth:`collect` is to tell."""
        self._read_journal()
        with self._reading:
            if self._outdated:
                self._outdated = False  # a sync may end meanwhile
                self._status = self._read_status()

    def collect(self) -> Iterator[core.Metric]:
        """What was looked at; nothing if that was not possible."""
        if self._status is not None:
            for name, text, value in _looked_at(self._status):
                yield core.GaugeMetricFamily('%s_%s' % (_PREFIX, name), text,
                                             value)

    def _read_journal(self) -> None:
        assert self._options is not None
        for what, times, seconds in journal.Journal(
                self._options.state_dir).drain():
            if what in self._repairs:
                self._repairs[what].inc(times)
                continue
            if what in self._failures:
                self._failures[what].inc(times)
            done = (Done.BIND if what in (Done.BIND, Done.BIND_FAILED)
                    else Done.UNBIND)
            self._seconds[done].observe(seconds)

    def _read_status(self) -> Optional[status_of.Status]:
        assert self._options is not None
        try:
            return status_of.read(self._options)
        except exceptions.Break0Error as err:
            LOG.error('The metrics are without addresses: %s', err)
            return None


def _looked_at(status: status_of.Status) -> Iterator[tuple[str, str, int]]:
    entries = [each.entry for each in status.addresses
               if each.entry is not None]
    yield ('ledger_entries', 'Addresses that sandboxes are recorded for.',
           len(entries))
    yield ('ledger_unreadable_entries', 'Records that cannot be read.',
           len(status.unreadable))
    yield ('addresses_desired', 'Addresses that pods have.',
           sum(not entry.sandbox_gone for entry in entries))
    yield ('addresses_routed', 'Addresses with a host route through break0.',
           sum(each.route is not None for each in status.addresses))
    yield ('addresses_foreign', 'Addresses of pods with a route of others.',
           len({route.dst for route in status.foreign}))
    yield ('addresses_out_of_sync', 'Addresses of which something is not as '
           'it should be.',
           sum(each.problem is not None for each in status.addresses))
    yield ('device_up', 'Whether break0 is there and up.',
           int(status.link is not None and status.link.up))


class Server:
    """Serves ``/metrics``, ``/healthz``, ``/livez``, in its own threads."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._endpoint: Optional[config.Endpoint] = None
        self._exposition = prometheus_client.make_wsgi_app(metrics.registry)
        self._server: Optional[_HTTPServer] = None
        self._complained = False

    def listen(self, endpoint: Optional[config.Endpoint]) -> None:
        """Serve there, if that is still to be done, and nowhere else.

        What hinders is an error in the log, once: an address that the node
        does not have yet, or a port that another process has.

        :param endpoint: where; None for nowhere
        """
        if endpoint != self._endpoint:
            self.close()
            self._endpoint = endpoint
            self._complained = False
        if endpoint is None or self._server is not None:
            return
        try:
            self._server = _HTTPServer(endpoint, self._answer)
        except OSError as err:
            if not self._complained:
                self._complained = True
                LOG.error('%s', exceptions.CannotListen(
                    endpoint=endpoint, reason=err.strerror))
            return
        LOG.info('Serving /metrics and /healthz on %s', endpoint)

    def close(self) -> None:
        """End; without having begun is fine."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def _answer(self, environ: dict[str, Any],
                start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ['PATH_INFO'] == '/metrics':
            self._metrics.refresh()
            answer: Iterable[bytes] = self._exposition(environ,
                                                       start_response)
            return answer
        judge = {'/healthz': self._metrics.unwell,
                 '/livez': self._metrics.stuck}.get(environ['PATH_INFO'])
        if judge is not None:
            reason = judge()
            status = '503 Service Unavailable' if reason else '200 OK'
        else:
            status = '404 Not Found'
            reason = 'See /metrics, /healthz and /livez'
        start_response(status, [('Content-Type', 'text/plain; charset=utf-8')])
        return [('%s\n' % (reason or 'ok')).encode()]


class _Handler(simple_server.WSGIRequestHandler):

    timeout = _SILENCE

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug('%s: ' + format, self.client_address[0], *args)


class _HTTPServer(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    """Accepts in one thread, answers each in one of its own."""

    daemon_threads = True

    def __init__(self, endpoint: config.Endpoint,
                 application: Callable[..., Any]) -> None:
        if endpoint.address.version == 6:
            self.address_family = socket.AF_INET6
        super().__init__((str(endpoint.address), endpoint.port), _Handler)
        self.set_app(application)
        self._ending = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        # WSGIServer would ask a resolver for the name of the address.
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])
        self.setup_environ()

    def _accept(self) -> None:
        # serve_forever() wakes twice a second, to see if it is to end.
        while not self._ending:
            self.handle_request()

    def end(self) -> None:
        self._ending = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes _accept()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOG.debug('%s went away', client_address[0], exc_info=True)
