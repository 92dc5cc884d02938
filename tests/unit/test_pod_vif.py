# SPDX-License-Identifier: Apache-2.0

"""The driver of kuryr-controller, with Kuryr's own pools and openstacksdk."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, Iterator, Optional
import unittest
from unittest import mock
import uuid

from kuryr_kubernetes import clients
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes.controller.drivers import base as k_drivers
from kuryr_kubernetes.controller.drivers import vif_pool
from kuryr_kubernetes import exceptions as k_exc
from kuryr_kubernetes import objects
from kuryr_kubernetes import utils as k_utils
from openstack import exceptions as os_exc
import os_vif

from kuryr_break0.kuryr import address_pairs
from kuryr_break0.kuryr import pod_vif
from tests.support import kubeapi
from tests.support import lab
from tests.support import neutron
from tests.support import overlay

NODE, OTHER_NODE = '100.75.30.51', '100.75.30.52'
CONF = """\
[kubernetes]
api_root = %(api)s
token_file =
ssl_client_crt_file =
ssl_client_key_file =
ssl_verify_server_crt = false
pod_vif_driver = %(driver)s
vif_pool_driver = noop
[neutron]
auth_type = none
endpoint = %(neutron)s
[pod_vif_nested]
worker_nodes_subnets = %(subnet)s
"""
#: Creates the pools as kuryr-controller does. Prints our imported modules
#: twice, and the driver of nested macvlans in Kuryr's table.
PROGRAM = """\
import sys
from kuryr_kubernetes import clients, config
config.CONF(['--config-file', sys.argv[1]], project='kuryr-k8s')
from kuryr_kubernetes.controller.drivers import base, vif_pool
clients.setup_clients()
base.VIFPoolDriver.get_instance(specific_driver='multi_pool').set_vif_driver()
def show():
    print(*sorted(name for name in sys.modules
                  if name.startswith('kuryr_break0')))
show()
import os_vif
os_vif.initialize()
show()
print(vif_pool.VIF_TYPE_TO_DRIVER_MAPPING['VIFMacvlanNested'])
"""


def pod(name: str, node: str = NODE) -> Any:
    made = kubeapi.pod(name, 'node-1')
    made['status']['hostIP'] = node
    return made


class ControllerTestCase(unittest.TestCase):
    """The pools of kuryr-controller in this process, and a fake Neutron."""

    MAX_PAIRS = 500

    def setUp(self) -> None:
        super().setUp()
        self.neutron = neutron.Neutron(self.MAX_PAIRS)
        self.enterContext_(self.neutron)
        self.api = kubeapi.KubeAPI()
        self.enterContext_(self.api)
        self.api.create('nodes', {'metadata': {'name': 'node-1',
                                               'labels': {}}})
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.conf = os.path.join(directory.name, 'kuryr.conf')
        self.configure(pod_vif.NAME)
        k_config.CONF(['--config-file', self.conf], project='kuryr-k8s')
        os_vif.initialize()
        objects.register_locally_defined_vifs()
        clients.setup_clients()
        k_drivers._DRIVER_MANAGERS.clear()
        pod_vif.NestedMacvlanDriver._nodes.clear()
        self.pools = vif_pool.MultiVIFPool()
        self.pools.set_vif_driver()
        self.node = self.neutron.node(NODE)['id']
        self.subnets = {neutron.SUBNET: k_utils.get_subnet(neutron.SUBNET)}
        self.neutron.requests.clear()
        quick = mock.patch.object(address_pairs, '_DELAYS', (0.01,) * 4)
        quick.start()
        self.addCleanup(quick.stop)

    def enterContext_(self, manager: Any) -> None:
        manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)

    def configure(self, driver: str) -> None:
        with open(self.conf, 'w') as file:
            file.write(CONF % {
                'api': self.api.url, 'driver': driver,
                'neutron': self.neutron.url, 'subnet': neutron.SUBNET})

    def request(self, pod: Any) -> Any:
        """Return the VIF of a pod, or the error."""
        try:
            return self.pools.request_vif(pod, 'project', self.subnets, [])
        except Exception as err:
            return err

    def request_all(self, pods: list[Any]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(len(pods)) as pool:
            return list(pool.map(self.request, pods))

    def release(self, pod: Any, vif: Any) -> Optional[Exception]:
        try:
            self.pools.release_vif(pod, vif, 'project')
        except Exception as err:
            return err
        return None

    def release_all(self, pods: list[Any], vifs: list[Any]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(len(pods)) as pool:
            return list(pool.map(self.release, pods, vifs))

    def addresses(self, vifs: list[Any]) -> list[str]:
        return sorted(str(vif.network.subnets.objects[0].ips.objects[0]
                          .address) for vif in vifs)

    def pairs(self) -> list[str]:
        return self.neutron.pairs(self.node)

    def count(self, method: str, path: str = '') -> int:
        return sum(each.method == method and path in each.path
                   for each in self.neutron.requests)

    def waiting(self, node: str = NODE) -> int:
        """Return the number of changes that wait for another change."""
        return len(pod_vif.NestedMacvlanDriver._nodes[node]._waiting)

    def refuse(self, method: str, status: int, *, times: int = 1000,
               path: str = '/v2.0/ports/', handled: bool = False) -> None:
        """Let requests fail, either before or after they are handled."""
        left = [None] * times

        def fault(request: neutron.Request) -> None:
            if request.method == method and request.path.startswith(path):
                if left:
                    left.pop()
                    raise neutron.Refusal(status, 'Fault')

        if handled:
            self.neutron.after = fault
        else:
            self.neutron.fault = fault

    def assert_nothing_left(self) -> None:
        self.neutron.fault = self.neutron.after = lambda request: None
        self.assertEqual([], self.neutron.pods())
        self.assertEqual([], self.pairs())


class TestBurst(ControllerTestCase):

    def hold(self, method: str, until: Any) -> None:
        """Hold the first request of a method until a condition holds."""
        held = threading.Lock()

        def fault(request: neutron.Request) -> None:
            if request.method == method and held.acquire(blocking=False):
                lab.until(until)

        self.neutron.fault = fault

    def test_thirty_pods_at_once(self) -> None:
        """The first pair is written alone, and all waiting pairs together."""
        pods = [pod('pod-%d' % number) for number in range(30)]
        self.hold('PUT', lambda: self.waiting() == 29)
        vifs = self.request_all(pods)
        self.assertEqual(self.addresses(vifs), self.pairs())
        self.assertEqual(30, len(self.neutron.pods()))
        self.assertEqual([30, 2, 2, 0], [self.count(method) for method in (
            'POST', 'GET', 'PUT', 'DELETE')])
        for vif in vifs:
            self.pools.activate_vif(vif)
            self.assertTrue(vif.active)

        self.neutron.requests.clear()
        self.hold('PUT', lambda: self.waiting() == 29)
        self.assertEqual([None] * 30, self.release_all(pods, vifs))
        self.assert_nothing_left()
        self.assertEqual([2, 30], [self.count(method) for method in (
            'PUT', 'DELETE')])

    def test_a_node_does_not_wait_for_another(self) -> None:
        other = self.neutron.node(OTHER_NODE)['id']
        self.neutron.fault = lambda request: (
            request.method == 'PUT' and request.path.endswith(self.node)
            and lab.until(lambda: self.neutron.pairs(other)))
        vifs = self.request_all([pod('a'), pod('b', OTHER_NODE)])
        self.assertEqual(self.addresses(vifs[:1]), self.pairs())
        self.assertEqual(self.addresses(vifs[1:]), self.neutron.pairs(other))

    def test_drivers_of_one_process_share_the_lock(self) -> None:
        """Kuryr creates another driver for a NetworkAttachmentDefinition."""
        drivers = [pod_vif.NestedMacvlanDriver() for _ in range(2)]
        self.assertIs(drivers[0]._pairs(NODE), drivers[1]._pairs(NODE))

    def test_a_thread_that_is_killed(self) -> None:
        """The pair of a killed thread stays, and the next update succeeds."""
        pairs = pod_vif.NestedMacvlanDriver()._pairs(NODE)
        killed = threading.Event()

        def fault(request: neutron.Request) -> None:
            if request.method == 'PUT' and not killed.is_set():
                lab.until(lambda: self.waiting() == 1)
                killed.set()

        self.neutron.fault = fault
        update = pairs._update

        def kill(changes: Any) -> None:
            update(changes)
            if any(change.mac == 'fa:16:3e:00:00:01' for change in changes):
                raise SystemExit

        with mock.patch.object(pairs, '_update', kill):
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                first = pool.submit(pairs.assign, 'fa:16:3e:00:00:01', ['a'])
                lab.until(lambda: self.count('PUT'))
                second = pool.submit(pairs.assign, 'fa:16:3e:00:00:02', ['b'])
                self.assertIsInstance(first.exception(), SystemExit)
                self.assertIsNone(second.exception())
        self.assertEqual(['a', 'b'], self.pairs())
        self.assertEqual(0, self.waiting())


class TestConflicts(ControllerTestCase):

    def meddle(self, times: int) -> None:
        """Let another controller change the port before it is written."""
        left = [None] * times

        def fault(request: neutron.Request) -> None:
            if request.method == 'PUT' and left:
                left.pop()
                port = self.neutron.ports[self.node]
                self.neutron.update(self.node, {'allowed_address_pairs': [
                    *port['allowed_address_pairs'],
                    {'ip_address': '10.0.0.%d' % len(left),
                     'mac_address': 'fa:16:3e:ff:ff:ff'}]})

        self.neutron.fault = fault

    def test_it_is_read_again(self) -> None:
        self.meddle(3)
        vifs = self.request_all([pod('pod-%d' % each) for each in range(5)])
        self.assertEqual(sorted([*self.addresses(vifs), '10.0.0.0',
                                 '10.0.0.1', '10.0.0.2']), self.pairs())
        self.assertEqual(5, len(self.neutron.pods()))

    def test_an_endless_one(self) -> None:
        self.meddle(1000)
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            err = self.request(pod('pod'))
        self.assertIsInstance(err, k_exc.PortNotReady)
        self.assertIn('Pod default/pod gets no port on node node-1 (%s): '
                      'PreconditionFailed' % NODE, '\n'.join(logs.output))
        self.assertEqual([], self.neutron.pods())
        # The driver adds the pair and removes it, each with a limit of
        # attempts.
        self.assertLessEqual(self.count('PUT'), 5)


class TestFullNode(ControllerTestCase):

    MAX_PAIRS = 10

    def test_the_eleventh_pod(self) -> None:
        pods = [pod('pod-%d' % number) for number in range(30)]
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            results = self.request_all(pods)
        served = [(each, vif) for each, vif in zip(pods, results)
                  if not isinstance(vif, Exception)]
        vifs = [vif for _, vif in served]
        self.assertEqual(10, len(vifs))
        self.assertEqual(self.addresses(vifs), self.pairs())
        self.assertEqual(10, len(self.neutron.pods()))
        self.assertEqual(20, len(logs.records))
        for record in logs.records:
            self.assertRegex(record.getMessage(), (
                r'\APod default/pod-\d+ gets no port on node node-1 \(%s\): '
                r'[^\n]* Set max_allowed_address_pair, [^\n]*\Z' % NODE))
        events = self.api.list('events')
        self.assertEqual({'NoPort'}, {each['reason'] for each in events})
        self.assertIn('max_allowed_address_pair', events[0]['message'])

        # The removal of a pair makes room for the next pair at once.
        first, *_ = (each for each, vif in zip(pods, results)
                     if isinstance(vif, Exception))
        self.assertIsNone(self.release(*served[0]))
        self.assertEqual(self.addresses([*vifs[1:], self.request(first)]),
                         self.pairs())

    def test_a_limit_that_was_lowered(self) -> None:
        pods = [pod('pod-%d' % number) for number in range(5)]
        vifs = self.request_all(pods)
        self.neutron.max_pairs = 2
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            err = self.release(pods[0], vifs[0])
        self.assertIsInstance(err, k_exc.PortNotReady)
        self.assertIn('max_allowed_address_pair', logs.output[0])
        self.neutron.max_pairs = 5
        self.assertEqual([None] * 5, self.release_all(pods, vifs))
        self.assert_nothing_left()


class TestFaults(ControllerTestCase):

    def assert_fails(self, *texts: str, **values: Any) -> None:
        """Assert that a failing request logs one line and leaves no items."""
        failing = pod('pod')
        for name, value in values.items():
            failing[name].update(value)
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            err = self.request(failing)
        self.assertIsInstance(err, k_exc.PortNotReady, err)
        for text in ('Pod default/pod gets no port on node node-1', *texts):
            self.assertIn(text, logs.records[-1].getMessage())
            self.assertIn(text, str(err))
        # After an exception with this name, Kuryr repeats the request, and
        # does not report the handler as unhealthy.
        self.assertEqual('PortNotReady', type(err).__name__)
        self.assert_nothing_left()

    def test_a_passing_one(self) -> None:
        for method, status in (('PUT', 500), ('PUT', 503), ('PUT', 404),
                               ('GET', 500)):
            with self.subTest(method=method, status=status):
                self.refuse(method, status, times=2, path='/v2.0/ports')
                asking = pod('pod')
                vif = self.request(asking)
                self.assertEqual(self.addresses([vif]), self.pairs())
                self.refuse('DELETE', 500, times=2)
                self.assertIsNone(self.release(asking, vif))
                self.assert_nothing_left()

    def test_an_update_that_fails(self) -> None:
        for status in (400, 401, 403, 409, 500):
            with self.subTest(status):
                self.refuse('PUT', status)
                self.assert_fails(str(status))

    def test_an_update_with_a_lost_answer(self) -> None:
        self.refuse('PUT', 500, times=1, handled=True)
        vif = self.request(pod('pod'))
        self.assertEqual(self.addresses([vif]), self.pairs())
        self.assertEqual(1, self.count('PUT'))

    def test_neutron_fails_after_the_update(self) -> None:
        """The written pair is removed together with the port."""
        self.refuse('PUT', 500, times=1, handled=True)
        unreadable = [None] * 4

        def fault(request: neutron.Request) -> None:
            if request.method == 'GET' and self.pairs() and unreadable:
                unreadable.pop()
                raise neutron.Refusal(500, 'Fault')

        self.neutron.fault = fault
        self.assert_fails('500')
        self.assertEqual(2, self.count('PUT'))

    def test_an_update_that_arrives_late(self) -> None:
        """The client has given up the update, and has sent later updates."""
        k_config.CONF.set_override('timeout', 1, 'neutron')
        self.addCleanup(k_config.CONF.clear_override, 'timeout', 'neutron')
        clients.setup_openstacksdk()
        late = threading.Event()
        statuses: list[int] = []

        def fault(request: neutron.Request) -> None:
            if request.method == 'PUT' and not late.is_set():
                late.set()
                lab.until(lambda: len(self.pairs()) == 2)
                try:
                    self.neutron.update(self.node, request.body['port'],
                                        revision=1)
                except neutron.Refusal as err:
                    statuses.append(err.status)

        self.neutron.fault = fault
        vifs = self.request_all([pod('first'), pod('second')])
        lab.until(lambda: statuses)
        self.assertEqual([412], statuses)
        self.assertEqual(self.addresses(vifs), self.pairs())

    def test_one_of_several_pods_is_refused(self) -> None:
        refused = []

        def fault(request: neutron.Request) -> None:
            with self.neutron.lock:
                if request.method == 'POST' and not refused:
                    refused.append(request.body['port']['device_id'])
                macs = [each['mac_address'] for each in self.neutron.select(
                    {'device_id': refused})]
            if request.method == 'PUT' and any(
                    pair['mac_address'] in macs for pair in
                    request.body['port']['allowed_address_pairs']):
                raise neutron.Refusal(400, 'InvalidInput')

        self.neutron.fault = fault
        pods = [pod('pod-%d' % number) for number in range(9)]
        with self.assertLogs('kuryr_break0', 'ERROR'):
            results = self.request_all(pods)
        vifs = [vif for vif in results if not isinstance(vif, Exception)]
        self.assertEqual(8, len(vifs))
        self.assertEqual(self.addresses(vifs), self.pairs())
        self.assertEqual(8, len(self.neutron.pods()))

    def test_the_port_of_the_node_is_unknown(self) -> None:
        self.assert_fails('worker_nodes_subnets',
                          status={'hostIP': '10.9.9.9'})

    def test_no_subnets_of_nodes(self) -> None:
        k_config.CONF.set_override('worker_nodes_subnets', [],
                                   'pod_vif_nested')
        self.addCleanup(k_config.CONF.clear_override, 'worker_nodes_subnets',
                        'pod_vif_nested')
        self.assert_fails('worker_nodes_subnets')

    def test_the_port_of_the_node_is_deleted_meanwhile(self) -> None:
        def fault(request: neutron.Request) -> None:
            if request.method == 'PUT':
                self.neutron.fault = lambda request: None
                self.neutron.delete(self.node)

        self.neutron.fault = fault
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.assertIsInstance(self.request(pod('pod')),
                                  k_exc.PortNotReady)
        self.assertIn('no port in Neutron has this address', logs.output[0])
        self.assertEqual([], self.neutron.pods())

    def test_the_port_of_the_node_is_created_anew(self) -> None:
        def fault(request: neutron.Request) -> None:
            if request.method == 'PUT':
                self.neutron.fault = lambda request: None
                self.neutron.delete(self.node)
                self.node = self.neutron.node(NODE)['id']

        self.neutron.fault = fault
        vif = self.request(pod('pod'))
        self.assertEqual(self.addresses([vif]), self.pairs())

    def test_a_port_that_cannot_be_bound(self) -> None:
        create = self.neutron.create
        with mock.patch.object(self.neutron, 'create', lambda values: create(
                {**values, 'binding:vif_type': 'binding_failed'})):
            self.assert_fails('could not bind')

    def test_a_port_in_another_subnet(self) -> None:
        create = self.neutron.create
        with mock.patch.object(self.neutron, 'create', lambda values: create(
                {**values, 'fixed_ips': [{'subnet_id': 'other'}]})):
            self.assert_fails('No valid subnets')

    def test_the_controller_ends(self) -> None:
        """The exception that ends a greenlet is no subclass of Exception."""
        with mock.patch.object(address_pairs.AddressPairs, '_settle',
                               side_effect=[SystemExit, None]):
            with self.assertRaises(SystemExit):
                self.pools.request_vif(pod('pod'), 'project', self.subnets,
                                       [])
        self.assert_nothing_left()

    def test_neutron_fails_to_create_a_port(self) -> None:
        for status in (500, 503):
            self.refuse('POST', status, path='/v2.0/ports')
            self.assert_fails(str(status))
        self.neutron.fault = self.hang_up
        self.assert_fails('Unable to establish connection')

    def hang_up(self, request: neutron.Request) -> None:
        raise ConnectionAbortedError

    def test_kuryr_judges_a_port_that_cannot_be_created(self) -> None:
        """Kuryr waits until quota is free, or a security group exists."""
        for status, error in ((409, os_exc.ConflictException),
                              (404, os_exc.ResourceNotFound)):
            self.refuse('POST', status, path='/v2.0/ports')
            self.assertIsInstance(self.request(pod('pod')), error)
        self.assert_nothing_left()

    def test_a_port_that_cannot_be_deleted(self) -> None:
        def fault(request: neutron.Request) -> None:
            if request.method in ('PUT', 'DELETE'):
                raise neutron.Refusal(500, 'Fault')

        self.neutron.fault = fault
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.request(pod('pod'))
        port, = self.neutron.pods()
        self.assertIn('Port %s of pod default/pod could not be deleted' %
                      port['id'], '\n'.join(logs.output))
        self.assertIn('openstack port delete %s' % port['id'],
                      '\n'.join(logs.output))

    def test_the_address_of_the_node_is_not_known_yet(self) -> None:
        early = pod('pod')
        del early['status']['hostIP']
        self.assertIsInstance(self.request(early), k_exc.PortNotReady)
        self.assertEqual([], self.neutron.requests)

    def test_no_pools(self) -> None:
        with self.assertRaisesRegex(k_exc.InvalidKuryrConfiguration,
                                    'vif_pool_driver'):
            pod_vif.NestedMacvlanDriver().request_vifs(
                pod('pod'), 'project', self.subnets, [], 5, semaphore=None)


class TestPairs(ControllerTestCase):

    def test_foreign_entries_stay(self) -> None:
        others = [{'ip_address': '10.0.0.0/24',
                   'mac_address': 'FA:16:3E:AA:AA:AA'},
                  {'ip_address': '100.75.30.9',
                   'mac_address': 'fa:16:3e:bb:bb:bb'}]
        self.neutron.update(self.node, {'allowed_address_pairs': others})
        asking = pod('pod')
        vif = self.request(asking)
        now = self.neutron.ports[self.node]['allowed_address_pairs']
        self.assertEqual(others, now[:2])
        self.assertEqual(3, len(now))
        self.assertIsNone(self.release(asking, vif))
        self.assertEqual(
            others, self.neutron.ports[self.node]['allowed_address_pairs'])

    def test_an_outdated_one_of_the_mac_address(self) -> None:
        asking = pod('pod')
        vif = self.request(asking)
        self.neutron.update(self.node, {'allowed_address_pairs': [
            {'ip_address': address, 'mac_address': str(vif.address).upper()}
            for address in ('100.75.30.8', '100.75.30.9')]})
        self.assertIsNone(self.release(asking, vif))
        self.assert_nothing_left()

    def test_all_addresses_of_a_port(self) -> None:
        """Addresses in subnets unknown to Kuryr (SLAAC) get pairs too."""
        create = self.neutron.create
        with mock.patch.object(self.neutron, 'create', lambda values: create(
                {**values, 'fixed_ips': [
                    *values['fixed_ips'],
                    {'subnet_id': 'six', 'ip_address': '2001:db8::71'}]})):
            asking = pod('pod')
            vif = self.request(asking)
        self.assertEqual([*self.addresses([vif]), '2001:db8::71'],
                         self.pairs())
        self.assertIsNone(self.release(asking, vif))
        self.assert_nothing_left()

    def test_a_node_without_port_security(self) -> None:
        """Neutron refuses pairs on the node's port and forwards all frames."""
        self.neutron.update(self.node, {'port_security_enabled': False})
        asking = pod('pod')
        vif = self.request(asking)
        self.assertEqual(1, len(self.neutron.pods()))
        self.assertIsNone(self.release(asking, vif))
        self.assert_nothing_left()


class TestRelease(ControllerTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.pod = pod('pod')
        self.vif = self.request(self.pod)

    def test_the_port_was_deleted_meanwhile(self) -> None:
        self.neutron.delete(self.vif.id)
        self.assertIsNone(self.release(self.pod, self.vif))
        self.assert_nothing_left()

    def test_the_port_of_the_node_was_deleted(self) -> None:
        self.neutron.delete(self.node)
        self.assertIsNone(self.release(self.pod, self.vif))
        self.assertEqual([], self.neutron.pods())

    def test_twice(self) -> None:
        for _ in range(2):
            self.assertIsNone(self.release(self.pod, self.vif))
        self.assert_nothing_left()

    def test_the_node_is_gone(self) -> None:
        """For a gone node, Kuryr ignores errors and repeats no request."""
        del self.pod['status']
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            self.assertIsNone(self.release(self.pod, self.vif))
        self.assertIn(str(self.vif.address), logs.output[0])
        self.assertEqual([], self.neutron.pods())

    def test_a_part_fails(self) -> None:
        """If one part of a release fails, the other part succeeds.

        The next release repeats the failed part.
        """
        for method in ('PUT', 'DELETE'):
            with self.subTest(method):
                asking = pod('pod')
                vif = self.request(asking)
                self.refuse(method, 500)
                with self.assertLogs('kuryr_break0', 'ERROR'):
                    err = self.release(asking, vif)
                self.assertIsInstance(err, k_exc.PortNotReady)
                self.assertEqual('PortNotReady', type(err).__name__)
                self.assertEqual(method == 'DELETE', vif.id in self.neutron
                                 .ports)
                self.assertEqual(method == 'DELETE', self.addresses([vif])[0]
                                 not in self.pairs())
                self.neutron.fault = lambda request: None
                self.assertIsNone(self.release(asking, vif))
        self.assertIsNone(self.release(self.pod, self.vif))
        self.assert_nothing_left()

    def test_the_ports_of_a_controller_that_was_killed(self) -> None:
        """The ports name the pod, and no VIF names the ports."""
        kuryrport = {'uid': str(uuid.uuid4()), 'ownerReferences': [
            {'kind': 'Pod', 'uid': self.pod['metadata']['uid']}]}
        other = pod('other')
        others = self.request(other)
        for metadata in ({}, kuryrport,
                         {'deletionTimestamp': kubeapi.now()}):
            with self.subTest(metadata):
                self.request(self.pod)  # a second time
                ended = {**self.pod, 'metadata': {**self.pod['metadata'],
                                                  **metadata}}
                if 'deletionTimestamp' in metadata:
                    self.assertIsNone(self.request(ended))
                else:
                    self.assertIsNone(self.release(ended, self.vif))
                self.assertEqual([others.id], [
                    each['id'] for each in self.neutron.pods()])
                self.assertEqual(self.addresses([others]), self.pairs())

    def test_they_cannot_be_listed(self) -> None:
        self.neutron.fault = self.refuse_lists
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            err = self.release(self.pod, self.vif)
        self.assertIsInstance(err, k_exc.PortNotReady)
        self.assertIn('cannot be listed', logs.output[0])
        self.neutron.fault = lambda request: None
        self.assertIsNone(self.release(self.pod, self.vif))
        self.assert_nothing_left()

    @contextlib.contextmanager
    def blind(self, answers: int) -> Iterator[None]:
        """Let Neutron deny that any port exists, for some answers."""
        left = [None] * answers
        select = self.neutron.select

        def fault(request: neutron.Request) -> None:
            if request.method == 'DELETE' and left:
                left.pop()
                raise neutron.Refusal(404, 'PortNotFound')

        def show(query: dict[str, list[str]]) -> list[Any]:
            if not left:
                return select(query)
            left.pop()
            return []

        self.neutron.fault = fault
        with mock.patch.object(self.neutron, 'select', show):
            yield
        self.neutron.fault = lambda request: None

    def test_neutron_denies_all_ports(self) -> None:
        with self.blind(1000), self.assertLogs('kuryr_break0', 'ERROR'):
            self.assertIsInstance(self.release(self.pod, self.vif),
                                  k_exc.PortNotReady)
        self.assertIn(self.vif.id, self.neutron.ports)
        self.assertEqual(self.addresses([self.vif]), self.pairs())
        self.assertIsNone(self.release(self.pod, self.vif))
        self.assert_nothing_left()

    def test_neutron_denies_all_ports_for_some_answers(self) -> None:
        for answers in range(1, 12):
            with self.subTest(answers):
                asking = pod('pod')
                vif = self.request(asking)
                with self.blind(answers):
                    for _ in range(answers):
                        if self.release(asking, vif) is None:
                            break
                self.assertNotIn(vif.id, self.neutron.ports)
                self.assertEqual(self.addresses([self.vif]), self.pairs())

    def refuse_lists(self, request: neutron.Request) -> None:
        if 'device_id' in request.query:
            raise neutron.Refusal(403, 'Forbidden')


class TestImports(ControllerTestCase):
    """Only a controller with our driver imports the driver's modules."""

    def run_with(self, driver: str) -> list[str]:
        self.configure(driver)
        return subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', PROGRAM, self.conf],
            check=True, cwd=overlay.ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL).stdout.splitlines()

    def test_another_driver(self) -> None:
        at_first, with_plugins, alias = self.run_with('nested-macvlan')
        self.assertEqual('', at_first)
        # os-vif loads all of its plugins in each process.
        self.assertEqual(
            'kuryr_break0 kuryr_break0.kuryr '
            'kuryr_break0.kuryr.os_vif_plugin kuryr_break0.log '
            'kuryr_break0.texts', with_plugins)
        self.assertEqual('nested-macvlan', alias)

    def test_ours(self) -> None:
        loaded, _, alias = self.run_with(pod_vif.NAME)
        self.assertEqual(
            'kuryr_break0 kuryr_break0.kuryr '
            'kuryr_break0.kuryr.address_pairs kuryr_break0.kuryr.pod_vif '
            'kuryr_break0.log kuryr_break0.texts', loaded)
        self.assertEqual(pod_vif.NAME, alias)

    def test_a_node(self) -> None:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c',
             'import sys\n'
             'from kuryr_kubernetes.cni.daemon import service\n'
             'from kuryr_break0.kuryr import api, driver, os_vif_plugin\n'
             'from kuryr_break0.agent import loop\n'
             'from kuryr_break0.cli import adopt\n'
             'import os_vif\n'
             'os_vif.initialize()\n'
             'print(*(name for name in sys.modules if name.startswith(\n'
             '    ("kuryr_break0.kuryr.pod_vif", "kuryr_kubernetes."\n'
             '     "controller.drivers.nested"))))'],
            check=True, cwd=overlay.ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self.assertEqual('\n', done.stdout)
