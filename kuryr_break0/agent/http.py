# SPDX-License-Identifier: Apache-2.0

"""Serves the metrics and the health of the agent over HTTP."""

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
from kuryr_break0 import option_types
from kuryr_break0.pace import Pace

LOG = log.get_logger(__name__)

#: Timeout in seconds: from accept(2) to the first byte of a request, and from
#: that byte until the client has read the answer.
_TIMEOUT = 5
#: Maximum number of connections, number of threads that answer, and maximum
#: size of a request's header in bytes.
_CONNECTIONS, _THREADS, _HEADER = 32, 2, 8192
#: Maximum number of connections that wait for accept(2).
_BACKLOG = 1024
#: End of the header of a request.
_BLANK = b'\r\n\r\n'


class _Connection(channel.HTTPChannel):  # type: ignore[misc]
    """A connection with a deadline for each request.

    Waitress itself disconnects a client only after a time without data. A
    client that sends one byte per second, or does not read its answer, would
    keep its connection. This class works with waitress 2.1.2 (Debian 12),
    3.0.0 and 3.0.2.

    :ivar began: monotonic time of the start of the connection, or of the first
        byte of its last request
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began = time.monotonic()
        self._end = b''  # last bytes received; may be the start of _BLANK

    def received(self, data: bytes) -> Any:
        """Parse data; disconnect a client that sends data after the header.

        Such data is a body or the next request. Pipelined requests could fill
        the memory with answers, and parsing hundreds of requests takes tens of
        milliseconds.
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
    """Handler of ``/metrics`` that limits its use of the processor."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._application = prometheus_client.make_wsgi_app(
            metrics.registry, disable_compression=True)
        self._lock = threading.Lock()
        self._pace = Pace()
        self._not_before = 0.0
        self._last: Optional[_Answer] = None

    def answer(self, environ: dict[str, Any]) -> _Answer:
        """Return current metrics, or repeat the last answer.

        While one thread collects metrics, the other thread repeats the last
        answer, so that it can also answer ``/livez``. If requests would use
        more of the processor than :class:`Pace` grants, they get the last
        answer too.

        :param environ: the WSGI environment of the request
        """
        if self._lock.acquire(blocking=self._last is None):
            try:
                self._metrics.refresh()
                if (self._last is None
                        or time.monotonic() >= self._not_before):
                    self._pace.begin()
                    self._last = self._collect(environ)
                    self._not_before = time.monotonic() + self._pace.end()
            finally:
                self._lock.release()
        assert self._last is not None
        return self._last

    def _collect(self, environ: dict[str, Any]) -> _Answer:
        head: list[Any] = []
        # Remove the query, which could select a part of the metrics. Other
        # clients can get the same answer, and need all metrics.
        body = self._application({**environ, 'QUERY_STRING': ''},
                                 lambda *args: head.extend(args))
        return _Answer(head[0], head[1], body)


class Server:
    """Server of ``/metrics`` and health checks, in its own threads.

    :param checks: functions by path, such as ``/healthz``. Each returns the
        reason why the agent is not healthy, or None
    """

    def __init__(self, metrics: Metrics,
                 checks: dict[str, Callable[[], Optional[str]]]) -> None:
        self._checks = checks
        self._endpoint: Optional[option_types.Endpoint] = None
        self._exposition = Exposition(metrics)
        self._server: Any = None  # waitress.server.BaseWSGIServer
        self._has_logged = False

    def listen(self, endpoint: Optional[option_types.Endpoint]) -> None:
        """Make sure that the server listens on an endpoint, and on no other.

        If the node lacks the address, or another process uses the port, log
        an error once. The next call tries again.

        :param endpoint: None to stop the server
        """
        if endpoint != self._endpoint:
            self.close()
            self._endpoint = endpoint
            self._has_logged = False
        if endpoint is None or self._server is not None:
            return
        try:
            self._start(endpoint)
        except OSError as err:
            if not self._has_logged:
                self._has_logged = True
                LOG.error('Metrics cannot be served on %s yet: %s. The agent '
                          'will try again. List addresses and ports of this '
                          'node: ip address; ss -ltnp. To change the address '
                          'or to serve no metrics, set [break0] metrics_bind.',
                          endpoint, err.strerror)
            return
        LOG.info('Serving /metrics and /healthz on %s', endpoint)

    def _start(self, endpoint: option_types.Endpoint) -> None:
        """Start the threads of the server, with limits for its clients.

        :raises OSError: if the endpoint cannot be bound
        """
        # waitress logs a warning for each bad request, so a client could fill
        # the log.
        logging.getLogger('waitress').setLevel(logging.ERROR)
        with contextlib.ExitStack() as stack:
            # bind(2) needs the scope of a link-local address.
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
                # Waitress also counts the listening socket and its own wake-up
                # pipe.
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
            timeout = _close_late(server.active_channels)
        server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(sockets)

    def close(self) -> None:
        """Stop the server, if it is running."""
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
        check = self._checks.get(environ['PATH_INFO'])
        if check is not None:
            reason = check()
            status = '503 Service Unavailable' if reason else '200 OK'
        else:
            status = '404 Not Found'
            reason = 'See /metrics, /healthz and /livez'
        start_response(status, [('Content-Type', 'text/plain; charset=utf-8')])
        return [('%s\n' % (reason or 'ok')).encode()]


def _close_late(connections: dict[int, _Connection]) -> float:
    """Close the connections of late clients.

    If the maximum number of connections is open, also close the oldest
    connections that wait for their clients. A connection whose request the
    server is processing stays open, because the server causes the delay.

    :param connections: all connections of the server, by descriptor
    :returns: seconds until the next connection may be late
    """
    waiting = sorted((each for each in connections.values()
                      if not each.requests), key=lambda each: each.began)
    late = time.monotonic() - _TIMEOUT
    # The newest connection stays: the server has not read its request yet.
    while waiting and (waiting[0].began <= late or len(waiting) > 1
                       and len(connections) >= _CONNECTIONS):
        # Do not set will_close: waitress would then wait until the client has
        # read its answer.
        waiting.pop(0).handle_close()
    return waiting[0].began - late if waiting else _TIMEOUT
