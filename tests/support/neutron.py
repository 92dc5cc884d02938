# SPDX-License-Identifier: Apache-2.0

"""A fake of the part of Neutron that kuryr-controller uses."""

from __future__ import annotations

import copy
import http.server
import ipaddress
import itertools
import json
import re
import threading
import time
from typing import Any, Callable, NamedTuple, Optional
from urllib import parse
import uuid

HOST = '127.0.0.1'
NETWORK, SUBNET = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
CIDR = '100.75.30.0/24'


class Request(NamedTuple):
    """A request. Functions of a test read it, and may let it fail."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: Any


class Refusal(Exception):
    """An error answer in Neutron's format."""

    def __init__(self, status: int, kind: str, message: str = '') -> None:
        super().__init__(message or kind)
        self.status = status
        self.body = {'NeutronError': {
            'type': kind, 'message': message or kind, 'detail': ''}}


class Neutron:
    """A fake Neutron on 127.0.0.1, with direct access to its ports.

    :ivar ports: the ports in Neutron's format, by ID
    :ivar fault: called with each request before it is handled; may raise
        Refusal, or wait
    :ivar after: called with each request after it is handled, before the
        answer
    :ivar delay: the minimum duration of each request, in seconds
    :ivar max_pairs: Neutron's option max_allowed_address_pair
    """

    def __init__(self, max_pairs: int = 500) -> None:
        self.ports: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Any] = lambda request: None
        self.after: Callable[[Request], Any] = lambda request: None
        self.delay = 0.0
        self.max_pairs = max_pairs
        self.lock = threading.RLock()
        self._numbers = itertools.count(71)
        self._server = _Server(self)
        self.url = 'http://%s:%d' % (HOST, self._server.server_port)

    def __enter__(self) -> Neutron:
        threading.Thread(target=self._server.serve_forever, args=(0.02,),
                         daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def node(self, address: str, **values: Any) -> dict[str, Any]:
        """Create the port of a node."""
        return self.create({'network_id': NETWORK, 'fixed_ips': [
            {'subnet_id': SUBNET, 'ip_address': address}],
            'device_owner': 'compute:nova', **values})

    def create(self, values: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            number = next(self._numbers)
            port = {'id': str(uuid.uuid4()), 'status': 'DOWN', 'tags': [],
                    'mac_address': 'fa:16:3e:00:00:%02x' % number,
                    'allowed_address_pairs': [], 'revision_number': 1,
                    'port_security_enabled': True, 'device_id': '',
                    'binding:vif_type': 'other', 'binding:vif_details': {},
                    'security_groups': [], 'admin_state_up': True, **values}
            for fixed in port['fixed_ips']:
                fixed.setdefault('ip_address', str(
                    ipaddress.ip_address('100.75.30.0') + number))
            self.ports[port['id']] = port
            return copy.deepcopy(port)

    def update(self, port_id: str, values: dict[str, Any],
               revision: Optional[int] = None) -> dict[str, Any]:
        with self.lock:
            port = self._get(port_id)
            pairs = values.get('allowed_address_pairs', ())
            if revision not in (None, port['revision_number']):
                raise Refusal(412, 'RevisionNumberConstraintFailed',
                              'Constrained to %s, but current revision is %s'
                              % (revision, port['revision_number']))
            if pairs and not port['port_security_enabled']:
                raise Refusal(409, 'AddressPairAndPortSecurityRequired')
            if len(pairs) > self.max_pairs:
                raise Refusal(400, 'AllowedAddressPairExhausted',
                              'The number of allowed address pair exceeds '
                              'the maximum %d.' % self.max_pairs)
            if len({(each['ip_address'], each['mac_address'])
                    for each in pairs}) < len(pairs):
                raise Refusal(400, 'DuplicateAddressPairInRequest')
            port.update(values, revision_number=port['revision_number'] + 1)
            return copy.deepcopy(port)

    def delete(self, port_id: str) -> None:
        with self.lock:
            self._get(port_id)
            del self.ports[port_id]

    def select(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        with self.lock:
            return [copy.deepcopy(port) for port in self.ports.values()
                    if all(_matches(port, name, values)
                           for name, values in query.items())]

    def pairs(self, port_id: str) -> list[str]:
        """Return the allowed addresses of a port, in order."""
        with self.lock:
            return sorted(each['ip_address'] for each in
                          self.ports[port_id]['allowed_address_pairs'])

    def pods(self) -> list[dict[str, Any]]:
        """Return the ports that kuryr-controller has created."""
        return self.select({'device_owner': ['compute:kuryr']})

    def _get(self, port_id: str) -> dict[str, Any]:
        try:
            return self.ports[port_id]
        except KeyError:
            raise Refusal(404, 'PortNotFound',
                          'Port %s could not be found.' % port_id) from None

    def answer(self, request: Request, revision: Optional[int]) -> Any:
        method, path, query, body = request
        match = re.fullmatch(r'/v2.0/ports(?:/([^/]+))?', path)
        if match and match[1] is None and method == 'POST':
            return {'port': self.create(body['port'])}
        if match and match[1] is None:
            return {'ports': self.select(query)}
        if match and method == 'GET':
            with self.lock:
                return {'port': copy.deepcopy(self._get(match[1]))}
        if match and method == 'PUT':
            return {'port': self.update(match[1], body['port'], revision)}
        if match and method == 'DELETE':
            return self.delete(match[1])
        if path == '/v2.0/extensions':
            return {'extensions': [{'alias': 'tag-ports-during-bulk-creation',
                                    'name': 'tags'}]}
        if path == '/v2.0/subnets/' + SUBNET:
            return {'subnet': {
                'id': SUBNET, 'network_id': NETWORK, 'cidr': CIDR,
                'ip_version': 4, 'gateway_ip': '100.75.30.1',
                'dns_nameservers': [], 'host_routes': []}}
        if path == '/v2.0/networks/' + NETWORK:
            return {'network': {'id': NETWORK, 'name': 'pods', 'mtu': 1500}}
        raise Refusal(404, 'NotFound', path)


def _matches(port: dict[str, Any], name: str, values: list[str]) -> bool:
    if name == 'limit':
        return True
    if name == 'fixed_ips':
        return any('%s=%s' % item in values for fixed in port['fixed_ips']
                   for item in fixed.items())
    return str(port.get(name)) in values


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, neutron: Neutron) -> None:
        self.neutron = neutron
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log no error: only clients that hang up cause one."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    timeout = 10
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Log no request: `Neutron.requests` has them."""

    def reply(self) -> None:
        neutron = self.server.neutron
        url = parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        request = Request(self.command, url.path, parse.parse_qs(url.query),
                          json.loads(body or 'null'))
        if url.path in ('', '/', '/v2.0', '/v2.0/'):
            self.send(200, {'versions': [{
                'id': 'v2.0', 'status': 'CURRENT', 'links': [
                    {'rel': 'self', 'href': neutron.url + '/v2.0/'}]}]})
            return
        neutron.requests.append(request)
        match = re.fullmatch(r'revision_number=(\d+)',
                             self.headers.get('If-Match', ''))
        time.sleep(neutron.delay)
        try:
            neutron.fault(request)
            answer = neutron.answer(request, int(match[1]) if match else None)
            neutron.after(request)
        except Refusal as err:
            self.send(err.status, err.body)
        else:
            self.send({'POST': 201, 'DELETE': 204}.get(self.command, 200),
                      answer)

    do_GET = do_POST = do_PUT = do_DELETE = reply

    def send(self, status: int, body: Any) -> None:
        data = b'' if status == 204 else json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)
