# SPDX-License-Identifier: Apache-2.0

"""Serves the metrics and the health of the agent by HTTP."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Any, Callable, Iterable, NamedTuple, Optional

import prometheus_client
import waitress
from waitress import channel
from waitress import wasyncore

from kuryr_break0.agent.metrics import Metrics
from kuryr_break0 import log
from kuryr_break0.option_types import Endpoint
from kuryr_break0.pace import Pace

LOG = log.get_logger(__name__)

#: Seconds of a connection until its first byte, and of a request from its
#: first byte until its answer has been read.
_TIMEOUT = 5
#: Connections at once, threads that answer, and bytes of a request's header.
_CONNECTIONS, _THREADS, _HEADER = 32, 2, 8192
#: Connections that the kernel keeps until they are accepted.
_BACKLOG = 1024
#: Ends the header of a request.
_BLANK = b'\r\n\r\n'


class _Connection(channel.HTTPChannel):  # type: ignore[misc]
    """A connection that ends some seconds after its last request began.

    The time-out of waitress is one of silence, so a client that sends a byte
    every few seconds, or that does not read its answer, keeps its connection.
    Tried with waitress 2.1.2, which Debian 12 has, 3.0.0 and 3.0.2.

    :ivar began: monotonic time of its start, or of the first byte of its last
        request
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began = time.monotonic()
        self._end = b''  # of the data before, a part of _BLANK

    def received(self, data: bytes) -> Any:
        """Parse data; disconnect a client that sends more than one request.

        A request that has a body is refused too. To parse hundreds of requests
        takes tens of milliseconds, and the answers may not fit into memory.
        """
        if self.request is None:
            self.began = time.monotonic()
        joined = self._end + data
        if 0 <= joined.find(_BLANK) < len(joined) - len(_BLANK):
            self.handle_close()
            return False
        self._end = joined[1 - len(_BLANK):]
        return super().received(data)


class _Answer(NamedTuple):
    status: str
    headers: list[tuple[str, str]]
    body: Iterable[bytes]


class Exposition:
    """Answers ``/metrics`` with a bounded part of a processor."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._make = prometheus_client.make_wsgi_app(
            metrics.registry, disable_compression=True)
        self._making = threading.Lock()
        self._pace = Pace()
        self._not_before = 0.0
        self._last: Optional[_Answer] = None

    def answer(self, environ: dict[str, Any]) -> _Answer:
        """Return the figures, or those of the last answer.

        While one thread reads the figures, the other one repeats the last
        answer, and is free for ``/livez``. Requests that come faster than the
        part of a processor allows get the last answer too.

        :param environ: the WSGI environment of the request
        """
        if self._making.acquire(blocking=self._last is None):
            try:
                self._metrics.refresh()
                if (self._last is None
                        or time.monotonic() >= self._not_before):
                    self._pace.begin()
                    self._last = self._made(environ)
                    self._not_before = time.monotonic() + self._pace.end()
            finally:
                self._making.release()
        assert self._last is not None
        return self._last

    def _made(self, environ: dict[str, Any]) -> _Answer:
        head: list[Any] = []
        # The answer may be repeated to a client that asks for all figures.
        body = self._make({**environ, 'QUERY_STRING': ''},
                          lambda *args: head.extend(args))
        return _Answer(head[0], head[1], body)


class Server:
    """Serves ``/metrics``, ``/healthz``, ``/livez``, in its own threads.

    :param judges: return why the agent is not well, by the path
    """

    def __init__(self, metrics: Metrics,
                 judges: dict[str, Callable[[], Optional[str]]]) -> None:
        self._judges = judges
        self._endpoint: Optional[Endpoint] = None
        self._exposition = Exposition(metrics)
        self._server: Any = None  # of waitress
        self._complained = False

    def listen(self, endpoint: Optional[Endpoint]) -> None:
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
            self._start(endpoint)
        except OSError as err:
            if not self._complained:
                self._complained = True
                LOG.error('Metrics cannot be served on %s yet: %s. See '
                          'what there is: ip address; ss -ltnp. Set [break0] '
                          'metrics_bind to another one, or to nothing.',
                          endpoint, err.strerror)
            return
        LOG.info('Serving /metrics and /healthz on %s', endpoint)

    def _start(self, endpoint: Endpoint) -> None:
        """Serve on one socket, in threads of its own, and bounded.

        :raises OSError: if it cannot be listened on
        """
        # A client could fill the log with the warnings of waitress.
        logging.getLogger('waitress').setLevel(logging.ERROR)
        with contextlib.ExitStack() as stack:
            # With the interface of a link-local one, which bind(2) needs.
            family, kind, _, _, where = socket.getaddrinfo(
                str(endpoint.address), endpoint.port, type=socket.SOCK_STREAM,
                flags=socket.AI_NUMERICHOST)[0]
            listening = stack.enter_context(socket.socket(family, kind))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            sockets: dict[int, Any] = {}
            server = waitress.create_server(
                self._answer, map=sockets, sockets=[listening],
                threads=_THREADS,
                # It counts the socket that listens, and that which wakes it.
                connection_limit=_CONNECTIONS + 2,
                max_request_header_size=_HEADER, max_request_body_size=1,
                ident=None, backlog=_BACKLOG, log_socket_errors=False,
                clear_untrusted_proxy_headers=True)
            server.channel_class = _Connection
            stack.pop_all()
        self._server = server
        self._thread = threading.Thread(
            target=self._serve, args=(server, sockets), daemon=True)
        self._thread.start()

    def _serve(self, server: Any, sockets: dict[int, Any]) -> None:
        timeout: float = _TIMEOUT
        while self._server is server:
            wasyncore.loop(timeout, use_poll=True, map=sockets, count=1)
            timeout = _end_late(server.active_channels)
        server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(sockets)

    def close(self) -> None:
        """End; without having begun is fine."""
        if self._server is not None:
            server, self._server = self._server, None
            server.pull_trigger()
            self._thread.join()

    def _answer(self, environ: dict[str, Any],
                start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ['PATH_INFO'] == '/metrics':
            status, headers, body = self._exposition.answer(environ)
            start_response(status, headers)
            return body
        judge = self._judges.get(environ['PATH_INFO'])
        if judge is not None:
            reason = judge()
            status = '503 Service Unavailable' if reason else '200 OK'
        else:
            status = '404 Not Found'
            reason = 'See /metrics, /healthz and /livez'
        start_response(status, [('Content-Type', 'text/plain; charset=utf-8')])
        return [('%s\n' % (reason or 'ok')).encode()]


def _end_late(connections: dict[int, _Connection]) -> float:
    """End connections that wait for their client too long, or take all places.

    The oldest go first. A connection stays while its request is answered,
    since that ends without the client.

    :param connections: all of the server, by descriptor
    :returns: seconds until the next one may be late
    """
    waiting = sorted((each for each in connections.values()
                      if not each.requests), key=lambda each: each.began)
    late = time.monotonic() - _TIMEOUT
    # The newest has not been read yet.
    while waiting and (waiting[0].began <= late or len(waiting) > 1
                       and len(connections) >= _CONNECTIONS):
        # Not will_close, which waits until the client reads.
        waiting.pop(0).handle_close()
    return waiting[0].began - late if waiting else _TIMEOUT
