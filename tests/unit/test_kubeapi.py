# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import itertools
import json
import socket
import threading
import time
from typing import Any, Dict, Iterator, List, Tuple
import unittest
from urllib import parse

from kuryr_kubernetes import config
from kuryr_kubernetes.controller.handlers import vif as vif_handler
from kuryr_kubernetes import exceptions
from kuryr_kubernetes import k8s_client
import requests

from tests import kubeapi
from tests import lab

PODS = '/api/v1/pods'
DEFAULT = '/api/v1/namespaces/default/pods'
KURYRPORTS = '/apis/openstack.org/v1/namespaces/default/kuryrports'
MERGE = 'application/merge-patch+json'
JSON = 'application/json-patch+json'
# Only waited for by a test that is to fail.
TIMEOUT = lab.PATIENCE

Event = Dict[str, Any]


class KubeAPICase(unittest.TestCase):
    history = 1000

    def setUp(self) -> None:
        self.api = kubeapi.KubeAPI(history=self.history)
        self.api.start()
        self.addCleanup(self.api.stop)

    def pod(self, name: str, node: str = 'n1', **kwargs: Any) -> kubeapi.Obj:
        return self.api.create('pods', kubeapi.pod(name, node, **kwargs))

    def ask(self, method: str, path: str, expected: int = 200,
            **kwargs: Any) -> Any:
        """Return the answer to a request, which must have this code."""
        response = requests.request(method, self.api.url + path,
                                    timeout=TIMEOUT, **kwargs)
        answer = response.json()
        self.assertEqual(expected, response.status_code, answer)
        if expected >= 400:
            self.assertEqual(
                ('Status', 'v1', 'Failure', expected),
                tuple(answer[part] for part in (
                    'kind', 'apiVersion', 'status', 'code')))
        return answer

    def patch(self, path: str, kind: str, patch: Any,
              expected: int = 200) -> Any:
        return self.ask('PATCH', path, expected, data=json.dumps(patch),
                        headers={'Content-Type': kind})

    def watch(self, path: str, **params: str) -> Iterator[Event]:
        """Start a watch, and return the events that it gives."""
        response = requests.get(
            self.api.url + path, params={'watch': 'true', **params},
            stream=True, timeout=TIMEOUT)
        self.addCleanup(response.close)
        self.assertEqual(200, response.status_code)
        return map(json.loads, response.iter_lines())

    def assertEvents(self, expected: List[Tuple[str, str]],
                     events: Iterator[Event]) -> List[kubeapi.Obj]:
        """Check what comes next, and return the objects of it."""
        found = list(itertools.islice(events, len(expected)))
        self.assertEqual(expected, [
            (event['type'], event['object']['metadata'].get('name'))
            for event in found])
        return [event['object'] for event in found]


class SelectorsTestCase(KubeAPICase):
    def names(self, **params: str) -> List[str]:
        return [item['metadata']['name'] for item in self.ask(
            'GET', PODS, params=params)['items']]

    def test_labels(self) -> None:
        self.pod('a', labels={'app': 'web', 'tier': 'x'})
        self.pod('b', labels={'app': 'web'})
        self.pod('c', labels={'app': 'db'})
        self.pod('d')
        for query, expected in (('app=web', 'ab'), ('app==web', 'ab'),
                                ('app!=web', 'cd'), ('app=web,tier=x', 'a'),
                                ('app=web, tier!=x', 'b'), ('app=', ''),
                                ('', 'abcd')):
            with self.subTest(query):
                self.assertEqual([*expected], self.names(labelSelector=query))

    def test_fields(self) -> None:
        self.pod('a', 'n1')
        self.pod('b', 'n2')
        self.pod('c', 'n2', namespace='other')
        for query, expected in (
                ('spec.nodeName=n2', 'bc'), ('spec.nodeName!=n2', 'a'),
                ('metadata.name==a', 'a'), ('spec.hostNetwork=false', 'abc'),
                ('spec.nodeName=n2,metadata.namespace=other', 'c'),
                ('status.hostIP=', 'abc'), ('status.hostIP!=', '')):
            with self.subTest(query):
                self.assertEqual([*expected], self.names(fieldSelector=query))
        self.assertEqual([], self.names(fieldSelector='spec.nodeName=n2',
                                        labelSelector='app=web'))


class WatchTestCase(KubeAPICase):
    def test_what_is_present_comes_first(self) -> None:
        pods = [self.pod('a'), self.pod('b')]
        for params in {}, {'resourceVersion': '0'}:
            with self.subTest(params):
                events = self.watch(PODS, **params)
                self.assertEqual(pods, self.assertEvents(
                    [('ADDED', 'a'), ('ADDED', 'b')], events))
                self.pod('c')
                self.assertEvents([('ADDED', 'c')], events)
                self.api.delete('pods', 'default', 'c')
                self.assertEvents([('DELETED', 'c')], events)

    def test_list_and_watch_leave_no_gap(self) -> None:
        for number in range(20):
            self.pod(f'{number:03}')
        listed = threading.Event()

        def write() -> None:
            for number in range(20, 140):
                if number == 120:
                    listed.wait(TIMEOUT)
                self.pod(f'{number:03}')

        writer = threading.Thread(target=write)
        writer.start()
        self.addCleanup(writer.join)
        self.addCleanup(listed.set)
        listing = self.ask('GET', PODS)
        listed.set()
        names = [pod['metadata']['name'] for pod in listing['items']]
        self.assertTrue(20 <= len(names) <= 120)
        events = self.watch(
            PODS, resourceVersion=listing['metadata']['resourceVersion'])
        self.assertEvents([('ADDED', f'{number:03}')
                           for number in range(len(names), 140)], events)
        self.assertEqual([f'{number:03}' for number in range(len(names))],
                         names)

    def test_resume(self) -> None:
        start = self.ask('GET', PODS)['metadata']['resourceVersion']
        self.pod('a')
        events = self.watch(PODS, resourceVersion=start)
        seen, = self.assertEvents([('ADDED', 'a')], events)
        self.patch(f'{DEFAULT}/a', MERGE, {'status': {'phase': 'Running'}})
        self.api.create('kuryrports', kubeapi.kuryrport(seen, {}))
        self.pod('b')
        self.api.delete('pods', 'default', 'a')
        rest = [('MODIFIED', 'a'), ('ADDED', 'b'), ('DELETED', 'a')]
        # The interrupted watch and the resumed one see the same.
        found = self.assertEvents(rest, events)
        version = seen['metadata']['resourceVersion']
        for obj, event in zip(found, rest):
            again = self.watch(PODS, resourceVersion=version)
            self.assertEqual(obj, self.assertEvents([event], again)[0])
            version = obj['metadata']['resourceVersion']
        again = self.watch(PODS, resourceVersion=version)
        self.pod('c')
        self.assertEvents([('ADDED', 'c')], again)

    def test_finalizers(self) -> None:
        self.pod('a', finalizers=['f', 'g'])
        events = self.watch(DEFAULT)
        self.assertEvents([('ADDED', 'a')], events)
        self.ask('DELETE', f'{DEFAULT}/a')
        doomed, = self.assertEvents([('MODIFIED', 'a')], events)
        self.assertTrue(doomed['metadata']['deletionTimestamp'])
        self.assertEqual(doomed, self.ask('GET', f'{DEFAULT}/a'))
        # Neither another deletion nor an update changes that it is doomed.
        self.assertEqual(doomed, self.ask('DELETE', f'{DEFAULT}/a'))
        self.patch(f'{DEFAULT}/a', MERGE, {'metadata': {
            'deletionTimestamp': None, 'finalizers': ['g']}})
        still, = self.assertEvents([('MODIFIED', 'a')], events)
        self.assertEqual(doomed['metadata']['deletionTimestamp'],
                         still['metadata']['deletionTimestamp'])
        self.patch(f'{DEFAULT}/a', MERGE, {'metadata': {'finalizers': None}})
        self.assertEvents([('DELETED', 'a')], events)
        self.ask('GET', f'{DEFAULT}/a', 404)

    def test_stop_ends_watches_and_a_start_goes_on(self) -> None:
        pod = self.pod('a')
        events = self.watch(PODS)
        self.assertEvents([('ADDED', 'a')], events)
        url = self.api.url
        began = time.monotonic()
        self.api.stop()
        self.assertEqual([], list(events))
        self.assertLess(time.monotonic() - began, TIMEOUT)
        with self.assertRaises(requests.ConnectionError):
            requests.get(url + PODS, timeout=TIMEOUT)
        self.pod('b')
        self.api.start()
        self.assertEqual(url, self.api.url)
        self.assertEvents([('ADDED', 'b')], self.watch(
            PODS, resourceVersion=pod['metadata']['resourceVersion']))

    def test_silence(self) -> None:
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            with socket.create_connection((kubeapi.HOST, self.api.port),
                                          TIMEOUT) as client:
                client.sendall(b'nonsense\r\n\r\n')
                self.assertIn(b'400', client.recv(1000))
            before = {*threading.enumerate()}
            with socket.create_connection((kubeapi.HOST, self.api.port),
                                          TIMEOUT) as client:
                client.sendall(f'GET {PODS}?watch=1 HTTP/1.1\r\n\r\n'.encode())
                self.assertIn(b'200', client.recv(1000))
                watch, = {*threading.enumerate()} - before
            # Writing to the client that has left fails soon, if not at once.
            deadline = time.monotonic() + TIMEOUT
            for number in itertools.count():
                self.pod(f'{number}')
                watch.join(0.01)
                if not watch.is_alive():
                    break
                self.assertLess(time.monotonic(), deadline)
        self.assertEqual('', stderr.getvalue())


class ShortHistoryTestCase(KubeAPICase):
    history = 3

    def test_too_old(self) -> None:
        versions = [self.pod(name)['metadata']['resourceVersion']
                    for name in 'abcde']
        self.assertEvents([('ADDED', 'c'), ('ADDED', 'd'), ('ADDED', 'e')],
                          self.watch(PODS, resourceVersion=versions[1]))
        for version in versions[0], '1000':
            with self.subTest(version):
                event, = self.watch(PODS, resourceVersion=version)
                self.assertEqual(('ERROR', 'Status', 410, 'Expired'), (
                    event['type'], event['object']['kind'],
                    event['object']['code'], event['object']['reason']))


class KuryrTestCase(KubeAPICase):
    """What Kuryr's own code makes of the server."""

    history = 3

    def setUp(self) -> None:
        super().setUp()
        config.CONF.set_override('token_file', '', 'kubernetes')
        self.addCleanup(config.CONF.clear_override, 'token_file',
                        'kubernetes')
        self.client = k8s_client.K8sClient(self.api.url)
        self.addCleanup(self.client.session.close)

    def test_watch_starts_anew_after_too_old(self) -> None:
        selector = parse.quote_plus('spec.nodeName=n1')
        events = self.client.watch(f'{PODS}?fieldSelector={selector}')
        self.addCleanup(events.close)
        self.pod('a')
        self.assertEvents([('ADDED', 'a')], events)
        # With the lock held, the server's end of the watch can't keep up with
        # what the history forgets.
        with self.api._changed:
            for name in 'bcdef':
                self.pod(name, 'n1' if name == 'f' else 'n2')
        self.assertEqual('ERROR', next(events)['type'])
        self.assertEvents([('ADDED', 'a'), ('ADDED', 'f')], events)
        self.assertEqual(2, len(self.api.requests))

    def test_finalizers_and_patches(self) -> None:
        pod = self.pod('a')
        self.assertTrue(self.client.add_finalizer(pod, 'f'))
        # The pod at hand is stale now: Kuryr is to see that and try again.
        self.assertTrue(self.client.add_finalizer(pod, 'g'))
        self.client.delete(f'{DEFAULT}/a')
        latest = self.client.get(f'{DEFAULT}/a')
        self.assertEqual(['f', 'g'], latest['metadata']['finalizers'])
        self.assertEqual({'k': 'v'}, self.client.annotate(
            f'{DEFAULT}/a', {'k': 'v'}, pod['metadata']['resourceVersion']))
        for finalizer in 'f', 'g':
            latest = self.client.get(f'{DEFAULT}/a')
            self.assertTrue(self.client.remove_finalizer(latest, finalizer))
        with self.assertRaises(exceptions.K8sResourceNotFound):
            self.client.get(f'{DEFAULT}/a')

    def test_events(self) -> None:
        pod = self.pod('a')
        self.client.add_event(pod, 'Why', 'What')
        event, = self.api.list('events', 'default')
        self.assertEqual(('Event', 'Why', pod['metadata']['uid']), (
            event['kind'], event['reason'], event['involvedObject']['uid']))

    def test_kuryrport_is_as_the_controller_makes_it(self) -> None:
        vifs = {'eth0': {'versioned_object.name': 'VIFMacvlanNested'},
                'eth1': {'versioned_object.name': 'VIFSriov'}}
        static: Dict[str, Any] = {
            'annotations': {'kubernetes.io/config.source': 'file'}}
        for name, metadata in ('a', {}), ('b', static):
            with self.subTest(name):
                pod = self.pod(name, **metadata)
                handler = vif_handler.VIFHandler.__new__(
                    vif_handler.VIFHandler)
                handler.k8s = self.client
                handler._add_kuryrport_crd(pod)
                status = self.client.patch_crd(
                    'status', f'{KURYRPORTS}/{name}', {'vifs': {
                        'eth0': {'default': True, 'vif': vifs['eth0']},
                        'eth1': {'default': False, 'vif': vifs['eth1']}}})
                expected = self.api.get('kuryrports', 'default', name)
                self.assertEqual(expected['status'], status)
                for given in 'uid', 'creationTimestamp', 'resourceVersion':
                    del expected['metadata'][given]
                self.assertEqual(expected,
                                 kubeapi.kuryrport(pod, vifs, 'n1'))
