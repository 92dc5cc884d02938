# SPDX-License-Identifier: Apache-2.0

"""A fake of the part of the Kubernetes API that Kuryr's daemon uses."""

import argparse
import collections
import copy
import http.server
import json
import re
import threading
import time
from typing import Any, Callable, Deque, Dict, List, NamedTuple
from typing import Optional, Tuple
from urllib import parse
import uuid

Obj = Dict[str, Any]
Term = Tuple[str, bool, str]

HOST = '127.0.0.1'
# plural: (path, apiVersion, kind)
RESOURCES = {
    'pods': ('/api/v1', 'v1', 'Pod'),
    'nodes': ('/api/v1', 'v1', 'Node'),  # stored in the namespace "default"
    'events': ('/api/v1', 'v1', 'Event'),
    'kuryrports': ('/apis/openstack.org/v1', 'openstack.org/v1', 'KuryrPort')}
PATH_RE = re.compile(r'(/api/v1|/apis/openstack\.org/v1)'
                     r'(?:/namespaces/([^/]+))?/([^/]+)(?:/([^/]+))?/?')
SERVERS_OWN = ('name', 'namespace', 'uid', 'creationTimestamp',
               'deletionTimestamp')
ABOUT = {'/healthz': 'ok', '/version': {'major': '1', 'minor': '30'}}


class APIError(Exception):
    """A refused request; clients receive a Kubernetes Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {'kind': 'Status', 'apiVersion': 'v1', 'metadata': {},
                       'status': 'Failure', 'message': message,
                       'reason': reason, 'code': code}


class Change(NamedTuple):
    """A change of an object; an absent object is an empty dictionary."""

    version: int
    old: Obj
    new: Obj


class Selection(NamedTuple):
    """The selection of objects that a LIST or a WATCH requests."""

    kind: str
    namespace: Optional[str] = None
    labels: List[Term] = []
    fields: List[Term] = []

    def matches(self, obj: Obj) -> bool:
        if obj.get('kind') != self.kind or self.namespace not in (
                None, obj['metadata']['namespace']):
            return False
        labels = obj['metadata'].get('labels') or {}
        return (all((labels.get(name) == value) is equal
                    for name, equal, value in self.labels) and
                all((field(obj, path) == value) is equal
                    for path, equal, value in self.fields))

    def event(self, change: Change) -> Optional[Obj]:
        """Return the watch event of a change in this selection, or None."""
        was = self.matches(change.old)
        if self.matches(change.new):
            return {'type': 'MODIFIED' if was else 'ADDED',
                    'object': change.new}
        # Kubernetes sends the last state of an object that left the selection,
        # with the version of the change. A watch can resume from this version.
        return {'type': 'DELETED', 'object': merge_patch(
            change.old, {'metadata': {'resourceVersion': str(change.version)}}
        )} if was else None


def now() -> str:
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def selector(text: str) -> List[Term]:
    """Parse an equality-based selector into (name, equal, value) terms."""
    terms = []
    for term in filter(None, text.split(',')):
        match = re.fullmatch(r'([^=!\s]+)\s*(!=|==?)\s*([^=!\s]*)',
                             term.strip())
        if match is None:
            raise ValueError(f'unsupported selector: {term}')
        terms.append((match[1], match[2] != '!=', match[3]))
    return terms


def field(value: Any, path: str) -> str:
    """Return the text of a dotted field; empty if it is absent."""
    for part in path.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return ''
    return value if isinstance(value, str) else json.dumps(value)


def merge_patch(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def json_patch(target: Any, patch: Any) -> Any:
    """Apply the add, replace and remove operations of RFC 6902."""
    result = copy.deepcopy(target)
    try:
        for step in patch:
            *parents, last = [part.replace('~1', '/').replace('~0', '~')
                              for part in step['path'].split('/')[1:]]
            node = result
            for part in parents:
                node = node[int(part) if isinstance(node, list) else part]
            if isinstance(node, list):
                last = len(node) if last == '-' else int(last)
            if step['op'] in ('replace', 'remove'):
                del node[last]
            elif step['op'] != 'add':
                raise ValueError(step['op'])
            if step['op'] != 'remove' and isinstance(node, list):
                node.insert(last, step['value'])
            elif step['op'] != 'remove':
                node[last] = step['value']
    except (LookupError, TypeError, ValueError) as error:
        raise APIError(422, 'Invalid', f'the patch does not apply: {error!r}')
    return result


PATCHES: Dict[str, Callable[[Any, Any], Any]] = {
    'application/merge-patch+json': merge_patch,
    'application/json-patch+json': json_patch}


class KubeAPI:
    """An API server on 127.0.0.1, with direct access to its objects.

    The server can stop and start again, with the same objects and port.
    """

    def __init__(self, port: int = 0, history: int = 1000) -> None:
        self.port = port
        self._server: Optional[_Server] = None
        self._requests: Deque[Tuple[str, str]] = collections.deque(maxlen=1000)
        # Stored objects are replaced and never modified, so that the history
        # and the watches can share them. Arguments and results are copies.
        self._objects: Dict[Tuple[str, str, str], Obj] = {}
        self._history: Deque[Change] = collections.deque(maxlen=history)
        # In Kubernetes, a watch from version 0 begins with the existing
        # objects, so versions of changes begin above 0.
        self._version = 1
        self._forgotten = 1  # the newest version that the history dropped
        self._changed = threading.Condition()

    def __enter__(self) -> 'KubeAPI':
        self.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f'http://{HOST}:{self.port}'

    @property
    def requests(self) -> List[Tuple[str, str]]:
        """Return the latest requests, as (method, path with its query)."""
        return [*self._requests]

    def start(self) -> None:
        self._server = _Server(self)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,),
                         daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stopping = True
            with self._changed:
                self._changed.notify_all()
            server.shutdown()
            server.server_close()

    def create(self, plural: str, obj: Obj) -> Obj:
        metadata = {'namespace': 'default', 'uid': str(uuid.uuid4()),
                    'creationTimestamp': now(), **obj['metadata']}
        if not metadata.get('name'):
            raise APIError(422, 'Invalid', 'metadata.name: Required value')
        _, api_version, kind = RESOURCES[plural]
        key = (plural, metadata['namespace'], metadata['name'])
        with self._changed:
            if key in self._objects:
                raise APIError(409, 'AlreadyExists',
                               f'{plural} "{key[2]}" already exists')
            return self._put(key, {**obj, 'apiVersion': api_version,
                                   'kind': kind, 'metadata': metadata})

    def get(self, plural: str, namespace: str, name: str) -> Obj:
        with self._changed:
            obj = self._objects.get((plural, namespace, name))
        if obj is None:
            raise APIError(404, 'NotFound', f'{plural} "{name}" not found')
        return copy.deepcopy(obj)

    def list(self, plural: str, namespace: Optional[str] = None) -> List[Obj]:
        return self.select(Selection(RESOURCES[plural][2], namespace))[0]

    def select(self, wanted: Selection) -> Tuple[List[Obj], int]:
        """Return the selected objects, and the current version."""
        with self._changed:
            return [copy.deepcopy(obj) for _, obj in sorted(
                self._objects.items()) if wanted.matches(obj)], self._version

    def update(self, plural: str, obj: Obj) -> Obj:
        metadata = obj['metadata']
        return self.modify(plural, metadata.get('namespace', 'default'),
                           metadata['name'], lambda old: obj)

    def modify(self, plural: str, namespace: str, name: str,
               change: Callable[[Obj], Obj]) -> Obj:
        """Replace an object with the result of `change`.

        `change` must not modify its argument.
        """
        with self._changed:
            old = self.get(plural, namespace, name)
            new = copy.deepcopy(change(old))
            new.update(apiVersion=old['apiVersion'], kind=old['kind'])
            metadata = new.setdefault('metadata', {})
            version = old['metadata']['resourceVersion']
            if metadata.setdefault('resourceVersion', version) != version:
                raise APIError(409, 'Conflict', f'{plural} "{name}": the '
                               'object has been modified; please apply your '
                               'changes to the latest version and try again')
            metadata.pop('deletionTimestamp', None)
            metadata.update({part: value
                             for part, value in old['metadata'].items()
                             if part in SERVERS_OWN})
            if new == old:
                return old
            gone = 'deletionTimestamp' in metadata and (
                not metadata.get('finalizers'))
            return self._put((plural, namespace, name), {} if gone else new)

    def delete(self, plural: str, namespace: str, name: str) -> Obj:
        with self._changed:
            obj = self.get(plural, namespace, name)
            if not obj['metadata'].get('finalizers'):
                return self._put((plural, namespace, name), {})
            if 'deletionTimestamp' in obj['metadata']:
                return obj
            obj['metadata']['deletionTimestamp'] = now()
            return self._put((plural, namespace, name), obj)

    def changes(self, version: int, server: '_Server') -> List[Change]:
        """Wait for changes after `version`, or for the end of the server.

        :raises APIError: if the history does not reach back to `version`
        """
        with self._changed:
            self._changed.wait_for(
                lambda: server.stopping or self._version != version)
            # A version above the current one belongs to an earlier server. The
            # changes after it are unknown, like changes that were dropped.
            if not self._forgotten <= version <= self._version:
                raise APIError(410, 'Expired', 'too old resource version: '
                               f'{version} ({self._version})')
            return [change for change in self._history
                    if change.version > version]

    def _put(self, key: Tuple[str, str, str], obj: Obj) -> Obj:
        old = self._objects.pop(key, {})
        self._version += 1
        if obj:
            obj = self._objects[key] = copy.deepcopy(obj)
            obj['metadata']['resourceVersion'] = str(self._version)
        if len(self._history) == self._history.maxlen:
            self._forgotten = self._history[0].version
        self._history.append(Change(self._version, old, obj))
        self._changed.notify_all()
        return copy.deepcopy(obj or old)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    stopping = False
    # The kernel resets connections that exceed the queue.
    request_queue_size = 512

    def __init__(self, api: KubeAPI) -> None:
        self.api = api
        super().__init__((HOST, api.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log no error: only clients that hang up or stall cause one."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    # With Nagle's algorithm the body waits for the acknowledgement of the
    # head.
    disable_nagle_algorithm = True
    timeout = 10
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Log no request: `KubeAPI.requests` has them."""

    def answer(self) -> None:
        api = self.server.api
        api._requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.code = 200
        try:
            reply = self.dispatch(api, json.loads(body or 'null'))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            self.code = 400
            reply = APIError(400, 'BadRequest', repr(error)).status
        except APIError as error:
            self.code, reply = error.code, error.status
        if reply is not None:
            data = json.dumps(reply).encode() if reply != 'ok' else b'ok'
            self.head('Content-Length', str(len(data)))
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def head(self, name: str, value: str) -> None:
        self.send_response(self.code)
        self.send_header('Content-Type', 'application/json')
        self.send_header(name, value)
        # A persistent connection would be served after the server's stop.
        self.send_header('Connection', 'close')
        self.end_headers()

    def dispatch(self, api: KubeAPI, body: Any) -> Any:
        """Return the reply, or None after a watch, which has sent events."""
        url = parse.urlsplit(self.path)
        if url.path in ABOUT:
            return ABOUT[url.path]
        match = PATH_RE.fullmatch(parse.unquote(url.path))
        if match is None or RESOURCES.get(match[3], [''])[0] != match[1]:
            raise APIError(404, 'NotFound', f'{url.path} not found')
        _, namespace, plural, name = match.groups()
        method = self.command, bool(name)
        if method == ('GET', True):
            return api.get(plural, namespace or 'default', name)
        if method == ('DELETE', True):
            return api.delete(plural, namespace, name)
        if method == ('PUT', True):
            return api.modify(plural, namespace, name, lambda old: body)
        if method == ('PATCH', True):
            patch = PATCHES[self.headers.get_content_type()]
            return api.modify(plural, namespace, name,
                              lambda old: patch(old, body))
        if method == ('GET', False):
            return self.many(api, plural, namespace,
                             dict(parse.parse_qsl(url.query)))
        if method == ('POST', False) and namespace:
            body['metadata']['namespace'] = namespace
            self.code = 201
            return api.create(plural, body)
        raise APIError(405, 'MethodNotAllowed', f'{self.command} {url.path}')

    def many(self, api: KubeAPI, plural: str, namespace: Optional[str],
             query: Dict[str, str]) -> Optional[Obj]:
        _, api_version, kind = RESOURCES[plural]
        wanted = Selection(kind, namespace,
                           selector(query.get('labelSelector', '')),
                           selector(query.get('fieldSelector', '')))
        if query.get('watch') in ('true', '1'):
            self.watch(api, wanted, int(query.get('resourceVersion', 0)))
            return None
        items, version = api.select(wanted)
        return {'kind': f'{kind}List', 'apiVersion': api_version,
                'metadata': {'resourceVersion': str(version)}, 'items': items}

    def watch(self, api: KubeAPI, wanted: Selection, version: int) -> None:
        items: List[Obj] = []
        if version == 0:
            items, version = api.select(wanted)
        # A client that has received the head receives all later changes too.
        self.head('Transfer-Encoding', 'chunked')
        try:
            for obj in items:
                self.chunk({'type': 'ADDED', 'object': obj})
            while not self.server.stopping:
                for change in api.changes(version, self.server):
                    version = change.version
                    event = wanted.event(change)
                    if event is not None:
                        self.chunk(event)
        except APIError as error:
            self.chunk({'type': 'ERROR', 'object': error.status})
        self.wfile.write(b'0\r\n\r\n')

    def chunk(self, event: Obj) -> None:
        line = json.dumps(event).encode() + b'\n'
        self.wfile.write(b'%x\r\n%b\r\n' % (len(line), line))


def pod(name: str, node: str, namespace: str = 'default',
        uid: Optional[str] = None, **metadata: Any) -> Obj:
    """Return a pod that waits on its node for its network."""
    return {'apiVersion': 'v1', 'kind': 'Pod',
            'metadata': {'name': name, 'namespace': namespace,
                         'uid': uid or str(uuid.uuid4()), **metadata},
            'spec': {'nodeName': node, 'hostNetwork': False,
                     'containers': [{'name': name, 'image': 'pause'}]},
            'status': {'phase': 'Pending', 'conditions': [
                {'type': 'PodScheduled', 'status': 'True',
                 'lastTransitionTime': now()}]}}


def kuryrport(pod: Obj, vifs: Dict[str, Obj],
              node: Optional[str] = None) -> Obj:
    """Return a pod's KuryrPort in the form that Kuryr's controller creates."""
    metadata = pod['metadata']
    node = node or pod['spec']['nodeName']
    source = metadata.get('annotations', {}).get('kubernetes.io/config.source')
    return {'apiVersion': 'openstack.org/v1', 'kind': 'KuryrPort',
            'metadata': {
                'name': metadata['name'],
                'namespace': metadata['namespace'],
                'finalizers': ['kuryr.openstack.org/kuryrport-finalizer'],
                'labels': {'kuryr.openstack.org/nodeName': node},
                'ownerReferences': [{
                    'apiVersion': pod['apiVersion'], 'kind': pod['kind'],
                    'name': metadata['name'], 'uid': metadata['uid']}]},
            'spec': {'podUid': metadata['uid'], 'podNodeName': node,
                     'podStatic': source not in (None, 'api')},
            'status': {'vifs': {
                ifname: {'default': ifname == 'eth0', 'vif': vif}
                for ifname, vif in vifs.items()}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--port', type=int, default=0,
                        help='port to listen on (default: any that is free)')
    with KubeAPI(parser.parse_args().port) as api:
        print(api.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == '__main__':
    main()
