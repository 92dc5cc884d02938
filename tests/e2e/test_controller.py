# SPDX-License-Identifier: Apache-2.0

"""Tests the real kuryr-k8s-controller with the driver of this package.

The Kubernetes API and Neutron are fakes. Kuryr's handlers, pools and retries
are real, and so are kuryr-daemon and the lab's node.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import Any
import unittest

import requests

from kuryr_break0.kuryr import pod_vif
from tests.support import kubeapi
from tests.support import kuryr
from tests.support import lab
from tests.support import neutron

CONF = """\
[DEFAULT]
debug = true
log_file = %(log)s
use_stderr = false
[kubernetes]
api_root = %(api)s
token_file =
ssl_client_crt_file =
ssl_client_key_file =
ssl_verify_server_crt = false
enabled_handlers = vif,kuryrport
pod_vif_driver = %(driver)s
vif_pool_driver = noop
[neutron]
auth_type = none
endpoint = %(neutron)s
[neutron_defaults]
project = project
pod_subnet = %(subnet)s
service_subnet = %(subnet)s
pod_security_groups = group
[pod_vif_nested]
worker_nodes_subnets = %(subnet)s
[oslo_concurrency]
lock_path = %(locks)s
"""


class ControllerTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.node = kuryr.Node()
        self.addCleanup(self.node.__exit__)
        self.api = self.node.api
        self.api.create('nodes', {'metadata': {'name': kuryr.NODENAME,
                                               'labels': {}}})
        self.neutron = neutron.Neutron()
        self.neutron.__enter__()
        self.addCleanup(self.neutron.__exit__)
        self.port = self.neutron.node(lab.NODE)['id']
        self.log = os.path.join(self.node.dir, 'controller.log')
        self.controller: Any = None
        self.addCleanup(self.kill_controller)

    def start_controller(self, driver: str = pod_vif.NAME) -> None:
        conf = os.path.join(self.node.dir, 'controller.conf')
        with open(conf, 'w') as file:
            file.write(CONF % {
                'log': self.log, 'api': self.api.url, 'driver': driver,
                'neutron': self.neutron.url, 'subnet': neutron.SUBNET,
                'locks': os.path.join(self.node.dir, 'locks')})
        self.controller = subprocess.Popen(
            [os.path.join(kuryr.BIN, 'kuryr-k8s-controller'),
             '--config-file', conf], cwd=self.node.dir,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_controller(self) -> None:
        if self.controller is not None:
            self.controller.kill()
            self.controller.wait()
            self.controller = None

    def output(self) -> str:
        with contextlib.suppress(FileNotFoundError), open(self.log) as file:
            return file.read()
        return ''

    def alive(self) -> int:
        """Return the HTTP status of the controller's liveness probe."""
        return requests.get('http://127.0.0.1:8082/alive',
                            timeout=lab.PATIENCE).status_code

    def add_pod(self, name: str) -> kuryr.Pod:
        """Create a pod like Kubernetes, with its namespace on the node."""
        manifest = kubeapi.pod(name, kuryr.NODENAME)
        manifest['status']['hostIP'] = lab.NODE
        made = self.api.create('pods', manifest)
        return kuryr.Pod(name, {}, self.node.lab.add_netns(name),
                         made['metadata']['uid'])

    def delete_pod(self, name: str) -> None:
        self.api.delete('pods', 'default', name)

    def pods(self) -> set[str]:
        return {each['metadata']['name'] for each in self.api.list('pods')}

    def vifs(self) -> dict[str, dict[str, Any]]:
        """Return the active VIFs, by pod."""
        found = {each['metadata']['name']: each['status']['vifs'].get('eth0')
                 for each in self.api.list('kuryrports')}
        return {name: value['vif']['versioned_object.data']
                for name, value in found.items() if value
                and value['vif']['versioned_object.data']['active']}

    def wait_for(self, *names: str) -> None:
        lab.until(lambda: set(names) <= set(self.vifs()), self.output)

    def wait_until_gone(self, *left: str) -> None:
        """Wait until only these pods are in API and Neutron."""
        lab.until(lambda: self.pods() == set(left), self.output)
        lab.until(lambda: set(self.vifs()) == set(left), self.output)
        self.assertEqual(len(left), len(self.neutron.pods()), self.output())
        self.assertEqual(len(left), len(self.neutron.pairs(self.port)))

    def refusing_first(self, method: str, action: Any) -> None:
        """Call an action at the first request for ports with a method."""
        left = [action]

        def fault(request: neutron.Request) -> None:
            if request.method == method and '/ports' in request.path and left:
                left.pop()()

        self.neutron.fault = fault


class TestPods(ControllerTestCase):

    def test_from_a_pod_to_a_ping(self) -> None:
        """Thirty pods that start at once are bound, and leave nothing."""
        self.node.start_daemon()
        self.start_controller()
        pods = [self.add_pod('pod-%d' % number) for number in range(30)]
        self.wait_for(*(pod.name for pod in pods))
        answers = self.node.requests(pods, 'ADD')
        self.assertEqual({202}, {each.status for each in answers},
                         self.node.errors() + self.output())
        addresses = self.neutron.pairs(self.port)
        self.assertEqual(30, len(addresses))
        self.node.lab.settle()
        for address in addresses[:3]:
            self.assertTrue(self.node.lab.ping(address))
        self.assertNotIn('unhealthy', self.output())
        for pod in pods:
            self.delete_pod(pod.name)
        self.node.requests(pods, 'DEL')
        self.wait_until_gone()
        self.assertNotIn('unhealthy', self.output())

    def test_the_driver_of_kuryr(self) -> None:
        """Kuryr's own driver fails as install/controller.rst documents."""
        self.start_controller('nested-macvlan')
        self.add_pod('pod')
        lab.until(lambda: 'unhealthy' in self.output(), self.output)
        self.assertIn(
            "Report handler unhealthy KuryrPortHandler: AttributeError: "
            "'NestedMacvlanPodVIFDriver' object has no attribute "
            "'_tag_on_creation'", self.output())
        self.assertEqual({}, self.vifs())
        # An unhealthy probe makes kubelet restart the controller.
        self.assertNotEqual(200, self.alive())
        # The option for our driver is the only change needed.
        self.kill_controller()
        self.start_controller()
        self.wait_for('pod')


class TestInterrupted(ControllerTestCase):

    def test_killed_within_a_request(self) -> None:
        """A port without a VIF is deleted with its pod."""
        self.refusing_first('PUT', lambda: self.controller.kill())
        self.start_controller()
        self.add_pod('pod')
        lab.until(lambda: self.controller.poll() is not None, self.output)
        self.assertEqual({}, self.vifs())
        self.assertEqual(1, len(self.neutron.pods()))
        self.start_controller()
        self.wait_for('pod')
        self.assertEqual(2, len(self.neutron.pods()))
        self.delete_pod('pod')
        self.wait_until_gone()

    def test_deleted_while_its_port_is_made(self) -> None:
        def delete() -> None:
            self.delete_pod('pod')
            lab.until(lambda: 'deletionTimestamp' in self.api.get(
                'kuryrports', 'default', 'pod')['metadata'])

        for method in ('POST', 'PUT'):
            with self.subTest(method):
                self.refusing_first(method, delete)
                if self.controller is None:
                    self.start_controller()
                self.add_pod('pod')
                lab.until(lambda: self.api.list('kuryrports'), self.output)
                lab.until(lambda: not self.api.list('kuryrports'),
                          self.output)
                self.wait_until_gone()
                self.node.lab.run('ip', 'netns', 'del', 'pod')


class TestFullNode(ControllerTestCase):

    def test_a_full_node(self) -> None:
        """Waiting pods can be deleted, or get the pair of a deleted pod."""
        self.neutron.max_pairs = 1
        self.start_controller()
        self.add_pod('first')
        self.wait_for('first')
        for name in ('second', 'third'):
            self.add_pod(name)
        full = ('Pod default/%s gets no port on node node-1 (100.75.30.51): '
                'the port of the node has as many allowed address pairs')
        lab.until(lambda: all(full % name in self.output()
                              for name in ('second', 'third')), self.output)
        self.delete_pod('third')
        lab.until(lambda: 'third' not in self.pods(), self.output)
        self.assertEqual(['first'], list(self.vifs()))
        self.delete_pod('first')
        self.wait_for('second')
        self.wait_until_gone('second')
        # An unhealthy handler would make kubelet restart the controller.
        self.assertNotIn('unhealthy', self.output())
        self.assertEqual(200, self.alive())
