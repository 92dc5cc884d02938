# SPDX-License-Identifier: Apache-2.0

"""Serves the metrics and the health of the agent by HTTP."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any, Callable, Iterable, Optional
from wsgiref import simple_server

from oslo_log import log as logging
import prometheus_client

from kuryr_break0.agent.metrics import Metrics
from kuryr_break0 import config
from kuryr_break0 import exceptions

LOG = logging.getLogger(__name__)

#: Seconds that a client may send nothing.
_TIMEOUT = 10


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

    timeout = _TIMEOUT

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
