# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

from tests.functional.doctor.base import DoctorTestCase
from tests.support import kubeapi
from tests.support import lab

NODENAME = 'node-1'
CONF = """\
[kubernetes]
api_root = %s
token_file =
ssl_client_crt_file =
ssl_client_key_file =
ssl_verify_server_crt = false
"""


class TestPorts(DoctorTestCase):
    """The doctor finds pods with KuryrPorts without a VIF."""

    def setUp(self) -> None:
        super().setUp()
        self.api = kubeapi.KubeAPI()
        self.api.start()
        self.addCleanup(self.api.stop)
        self.addCleanup(os.unlink, '/run/kuryr.conf')
        self.configure(self.api.url)

    def configure(self, url: str) -> None:
        with open('/run/kuryr.conf', 'w') as file:
            file.write(CONF % url)

    def examine(self, code: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call(
            '--json', '--no-probe', code=code, config='/run/kuryr.conf',
            KUBERNETES_NODE_NAME=NODENAME).stdout)
        return found

    def add(self, name: str, age: int = 120, node: str = NODENAME,
            vifs: Any = None, uid: str = '', phase: str = 'Pending',
            host_network: bool = False, **metadata: Any) -> None:
        pod = kubeapi.pod(name, node)
        pod['status']['phase'] = phase
        pod['spec']['hostNetwork'] = host_network
        made = self.api.create('pods', pod)
        kuryrport = kubeapi.kuryrport(made, vifs or {})
        kuryrport['metadata'].update(creationTimestamp=time.strftime(
            '%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - age)), **metadata)
        kuryrport['spec']['podUid'] = uid or made['metadata']['uid']
        self.api.create('kuryrports', kuryrport)

    def assert_nothing_claimed(self, reason: str = '') -> None:
        found = self.examine()
        self.assertEqual([], found['findings'])
        ports = [each for each in found['not_examined']
                 if each.startswith('pods without a port')]
        if reason:
            self.assertIn(reason, *ports)
        else:
            self.assertEqual([], ports)

    def test_no_vif_came(self) -> None:
        for name in ('web-1', 'web-2'):
            self.add(name)
        self.add('served', vifs={'eth0': {'any': 'thing'}})
        finding, = self.examine(code=1)['findings']
        self.assertEqual(('port-missing', 'error'), (finding['id'],
                                                     finding['severity']))
        self.assertEqual(['default/web-1', 'default/web-2'],
                         finding['subjects'])
        self.assertIn('"The controller"', finding['remedy'])
        self.assertIn('kubectl --namespace default describe pod web-1',
                      finding['commands'])
        for plural in ('kuryrports', 'pods'):
            for name in ('web-1', 'web-2'):
                self.api.modify(plural, 'default', name, lambda old: {
                    **old, 'status': {'vifs': {'eth0': {}}}})
        self.assert_nothing_claimed()

    def test_pods_that_do_not_wait(self) -> None:
        self.add('new', age=5)
        self.add('elsewhere', node='node-2')
        self.add('of-the-node', host_network=True)
        self.add('of-an-earlier-pod', uid='other')
        self.add('ended', phase='Succeeded')
        self.add('ending')
        self.api.delete('kuryrports', 'default', 'ending')
        self.add('gone')
        self.api.delete('pods', 'default', 'gone')
        self.add('damaged')
        self.api.modify('kuryrports', 'default', 'damaged', lambda old: {
            **old, 'spec': None, 'status': []})
        self.add('of-no-time')
        self.api._objects[('kuryrports', 'default', 'of-no-time')][
            'metadata']['creationTimestamp'] = 'yesterday'
        self.assert_nothing_claimed()

    def test_a_vif_that_comes_meanwhile(self) -> None:
        """A VIF that appears during the examination is no fault.

        A new pod seems old if the node's clock is ahead.
        """
        self.add('new')

        def serve() -> None:
            lab.until(lambda: len(self.api.requests) >= 2)
            self.api.modify('kuryrports', 'default', 'new', lambda old: {
                **old, 'status': {'vifs': {'eth0': {}}}})

        thread = threading.Thread(target=serve)
        thread.start()
        self.assert_nothing_claimed()
        thread.join()
        self.assertEqual(4, len(self.api.requests))

    def test_an_api_that_cannot_be_reached(self) -> None:
        self.add('web')
        self.api.stop()
        self.assert_nothing_claimed(
            'The Kubernetes API at %s cannot be used' % self.api.url)

    def test_an_api_that_does_not_answer(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as server:
            self.configure('http://127.0.0.1:%d' % server.getsockname()[1])
            self.assert_nothing_claimed('Read timed out')

    def test_another_program_in_its_place(self) -> None:
        self.configure(self.api.url + '/elsewhere')
        self.assert_nothing_claimed('not found')

    def test_no_api_is_configured(self) -> None:
        self.add('web')
        with open('/run/kuryr.conf', 'w') as file:
            file.write('[kubernetes]\n')
        self.assert_nothing_claimed()
        self.assertEqual([], self.api.requests)
