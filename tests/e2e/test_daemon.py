# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os

import requests

from tests.e2e.base import DaemonTestCase
from tests.e2e.base import macvlans
from tests.e2e.base import POD
from tests.support import kuryr
from tests.support import lab


class TestPod(DaemonTestCase):

    def test_its_life(self) -> None:
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        done = self.node.cni(pod, 'ADD')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual('%s/24' % POD,
                         json.loads(done.stdout)['ips'][0]['address'])
        self.assert_reachable(pod)
        self.assertTrue(self.node.lab.ping(lab.LAN, pod.name))
        done = self.node.cni(pod, 'DEL')
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual({}, self.node.lab.routes())
        self.assertEqual(['break0'], macvlans(self.node))

    def test_stock_kuryr_cannot(self) -> None:
        # This test is the control: with Kuryr alone, the pod is unreachable.
        bin_dir = kuryr.stock_environment(os.path.join(self.node.dir, 'venv'))
        self.node.start_daemon(bin_dir=bin_dir)
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.assert_reachable(pod, False)
        self.assertTrue(self.node.lab.ping(lab.LAN, pod.name))
        self.assertEqual([], macvlans(self.node))

    def test_a_kuryr_cni_without_the_package(self) -> None:
        bin_dir = kuryr.stock_environment(os.path.join(self.node.dir, 'venv'))
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        for command in ('ADD', 'DEL'):
            done = self.node.cni(pod, command, bin_dir)
            self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertIn('Unbound ' + POD, self.node.output())

    def test_the_answer_and_the_log(self) -> None:
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        answer = self.node.request(pod, 'ADD')
        self.assertEqual('VIFMacvlanNested',
                         json.loads(answer.body)['versioned_object.name'])
        self.assertNotIn('VIFMacvlanBreak0', answer.body)
        output = self.node.output()
        self.assertEqual(1, output.count(
            'VIFMacvlanNested VIFs are bound by '
            'kuryr_break0.kuryr.driver.Break0MacvlanDriver: break0 is '
            'enabled'))
        self.assertIn('Bound %s to break0 for %s/eth0' %
                      (POD, pod.container_id), output)

    def test_disabled(self) -> None:
        self.node.start_daemon('enabled = false')
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.assertEqual([], macvlans(self.node))
        self.assert_reachable(pod, False)
        self.assertIn('Break0MacvlanDriver: without break0, because [break0] '
                      'enabled is false', self.node.output())

    def test_numbered_by_the_environment(self) -> None:
        self.node.start_daemon(OS_BREAK0__ADDR='100.75.30.7')
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.assert_reachable(pod)
        self.assertTrue(self.node.lab.ping('100.75.30.7', pod.name))

    def test_after_a_restart_of_the_daemon(self) -> None:
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.node.kill_daemon()
        self.node.start_daemon()
        self.assert_reachable(pod)
        self.delete(pod)
        self.assertEqual({}, self.node.lab.routes())

    def test_a_late_del_of_an_earlier_sandbox(self) -> None:
        # A restarted Kuryr does not know a pod's latest sandbox.
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        earlier = pod.container_id
        self.add(pod)
        self.delete(pod)
        pod.container_id = 'the-sandbox-after-it'
        self.add(pod)
        self.node.kill_daemon()
        self.node.start_daemon()
        self.delete(pod, CNI_CONTAINERID=earlier,
                    CNI_NETNS='/run/netns/gone')
        self.assert_reachable(pod)

    def test_an_empty_netns_leaves_the_node_its_nic(self) -> None:
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.delete(pod, CNI_NETNS='')
        self.assertIsNotNone(self.node.lab.link(lab.PARENT))
        self.assertEqual({}, self.node.lab.routes())


class TestFailures(DaemonTestCase):

    def setUp(self) -> None:
        super().setUp()
        # A name conflict: break0 is a veth.
        self.node.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                          'peer', 'name', 'peer0')

    def alive(self) -> int:
        # The health service may start later than the daemon.
        lab.until(lambda: kuryr.serves('127.0.0.1:8090'))
        return requests.get('http://127.0.0.1:8090/alive',
                            timeout=lab.PATIENCE).status_code

    def test_the_pod_goes_on(self) -> None:
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.assertTrue(self.node.lab.ping(lab.LAN, pod.name))
        self.assertIn('The interface break0 exists and is a veth',
                      self.node.output())

    def test_strict_says_try_again_and_the_daemon_lives(self) -> None:
        self.node.start_daemon('strict = true')
        pod = self.node.add_pod('pod', POD)
        # Three counted failures would make Kuryr restart the daemon.
        for _ in range(5):
            answer = self.node.request(pod, 'ADD')
            self.assertEqual(504, answer.status)
            self.assertEqual(11, json.loads(answer.body)['code'])
            self.assertIn('a veth', answer.body)
        self.assertEqual(200, self.alive())
        self.assertEqual(['lo'], [
            link['ifname']
            for link in self.node.lab.ip('link', 'show', netns=pod.name)])
        self.node.lab.run('ip', 'link', 'del', 'break0')
        self.add(pod)
        self.assert_reachable(pod)

    def test_an_invalid_option(self) -> None:
        self.node.start_daemon('addr = 100.75.30.7/24')
        pod = self.node.add_pod('pod', POD)
        self.add(pod)
        self.assertIn("[break0] addr: '100.75.30.7/24' is a network",
                      self.node.output())
        self.assertIn('Break0MacvlanDriver: without break0, because an '
                      'option is invalid', self.node.output())
        self.assertIn('Pod default/pod (%s/eth0) with %s may not be reachable'
                      % (pod.container_id, POD), self.node.output())


class TestBursts(DaemonTestCase):

    options = 'pod_binding = kuryr'

    def assert_all(self, status: int, answers: list[kuryr.Answer]) -> None:
        failed = [answer for answer in answers if answer.status != status]
        self.assertEqual([], failed, self.node.errors())

    def test_the_first_thirty_make_one_break0(self) -> None:
        self.start_patient_daemon(self.options)
        pods = [self.node.add_pod('pod-%d' % number, '100.75.30.%d' % number)
                for number in range(100, 130)]
        answers = self.node.requests(pods, 'ADD')
        self.assert_all(202, answers)
        self.assertEqual(['break0'], macvlans(self.node))
        self.assertEqual(1, self.node.output().count('Created break0'))
        self.assertEqual({'100.75.30.%d' % number
                          for number in range(100, 130)},
                         set(self.node.lab.routes()))

    def test_bursts_lose_none(self) -> None:
        # Stock Kuryr loses 18 of 240 pods here: other pods' new interfaces
        # interrupt its dump of the node's interfaces.
        self.start_patient_daemon(self.options)
        for burst in range(3):
            pods = [self.node.add_pod('pod-%d-%d' % (burst, number),
                                      '100.75.30.%d' % number)
                    for number in range(100, 130)]
            self.assert_all(202, self.node.requests(pods, 'ADD'))
            self.assertEqual(30, len(self.node.lab.routes()))
            self.assert_all(204, self.node.requests(pods, 'DEL'))
            self.assertEqual({}, self.node.lab.routes())
            for pod in pods:
                self.node.delete_pod(pod)


class TestDirectBursts(TestBursts):

    options = 'pod_binding = auto'


class TestOtherProcesses(DaemonTestCase):
    """A shared virtual environment does not change the rest of Kuryr."""

    def test_the_controller_is_as_before(self) -> None:
        # MultiVIFPool refers to VIF classes by name.
        printed = self.probe('''
            from kuryr_kubernetes.controller.drivers import vif_pool
            from kuryr_kubernetes import objects
            import os_vif
            from os_vif.objects import base
            from unittest import mock
            objects.register_locally_defined_vifs()
            os_vif.initialize()
            assert 'kuryr_break0' in os_vif._EXT_MANAGER.names()
            from tests.support import kuryr
            vif = base.VersionedObject.obj_from_primitive(
                kuryr.macvlan_vif('100.75.30.71').obj_to_primitive())
            pool = vif_pool.MultiVIFPool()
            driver = mock.Mock()
            pool._vif_drvs = {'nested-macvlan': driver}
            pool.release_vif({'metadata': {}}, vif)
            driver.release_vif.assert_called_once()
            print(type(vif).__name__)
        ''')
        self.assertEqual('VIFMacvlanNested', printed)

    def test_vlan_pods_on_the_node_are_kuryrs(self) -> None:
        printed = self.probe('''
            from kuryr_kubernetes.cni.binding import base as b_base
            from kuryr_kubernetes.cni.daemon import service
            from kuryr_kubernetes import config, objects
            from kuryr_kubernetes.objects import vif as k_vif
            import os_vif
            from os_vif.objects import base
            config.init([])
            objects.register_locally_defined_vifs()
            os_vif.initialize()
            from tests.support import kuryr
            for vif in (kuryr.macvlan_vif('100.75.30.71'),
                        k_vif.VIFVlanNested(vlan_id=7, vif_name='tap7')):
                vif = base.VersionedObject.obj_from_primitive(
                    vif.obj_to_primitive())
                print(type(vif).__name__, vif.obj_name(),
                      type(b_base._get_binding_driver(vif)).__name__)
        ''')
        self.assertEqual(
            'VIFMacvlanBreak0 VIFMacvlanNested Break0MacvlanDriver\n'
            'VIFVlanNested VIFVlanNested VlanDriver', printed)

    def test_without_an_entry_point_kuryr_alone_binds(self) -> None:
        # A VIF class without a driver would fail every pod.
        printed = self.probe('''
            from kuryr_kubernetes.cni.daemon import service
            import os_vif
            from os_vif.objects import base
            from stevedore import driver
            import sys
            from unittest import mock
            with mock.patch.object(driver, 'DriverManager',
                                   side_effect=driver.NoMatches('gone')):
                os_vif.initialize()
            from tests.support import kuryr
            vif = base.VersionedObject.obj_from_primitive(
                kuryr.macvlan_vif('100.75.30.71').obj_to_primitive())
            print(type(vif).__name__)
        ''')
        self.assertEqual('VIFMacvlanNested', printed)
