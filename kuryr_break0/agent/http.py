# SPDX-License-Identifier: Apache-2.0

"""Serves the metrics and the health of the agent by HTTP."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Callable, Iterable, Optional

import prometheus_client
import waitress
from waitress import wasyncore

from kuryr_break0.agent.metrics import Metrics
from kuryr_break0 import log
from kuryr_break0.option_types import Endpoint

LOG = log.get_logger(__name__)

#: Seconds that a client may send nothing.
_TIMEOUT = 10
#: Connections at once, threads that answer, and bytes of a request's header.
_CONNECTIONS, _THREADS, _HEADER = 32, 2, 8192


class Server:
    """Serves ``/metrics``, ``/healthz``, ``/livez``, in its own threads.

    :param judges: return why the agent is not well, by the path
    """

    def __init__(self, metrics: Metrics,
                 judges: dict[str, Callable[[], Optional[str]]]) -> None:
        self._metrics = metrics
        self._judges = judges
        self._endpoint: Optional[Endpoint] = None
        self._exposition = prometheus_client.make_wsgi_app(metrics.registry)
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

        Idle connections end after a while, and no more than some are
        accepted at once: whoever opens hundreds waits, and the agent keeps
        its descriptors and its memory.

        :raises OSError: if it cannot be listened on
        """
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
                threads=_THREADS, connection_limit=_CONNECTIONS,
                channel_timeout=_TIMEOUT, cleanup_interval=_TIMEOUT // 2,
                max_request_header_size=_HEADER, max_request_body_size=1,
                ident=None, backlog=_CONNECTIONS,
                clear_untrusted_proxy_headers=True)
            stack.pop_all()
        self._server = server
        self._thread = threading.Thread(
            target=self._serve, args=(server, sockets), daemon=True)
        self._thread.start()

    def _serve(self, server: Any, sockets: dict[int, Any]) -> None:
        while self._server is server:
            wasyncore.loop(_TIMEOUT // 2, use_poll=True, map=sockets, count=1)
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
            self._metrics.refresh()
            answer: Iterable[bytes] = self._exposition(environ, start_response)
            return answer
        judge = self._judges.get(environ['PATH_INFO'])
        if judge is not None:
            reason = judge()
            status = '503 Service Unavailable' if reason else '200 OK'
        else:
            status = '404 Not Found'
            reason = 'See /metrics, /healthz and /livez'
        start_response(status, [('Content-Type', 'text/plain; charset=utf-8')])
        return [('%s\n' % (reason or 'ok')).encode()]
