# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from typing import Any, Optional

from kuryr_kubernetes.objects import vif as k_vif

from tests.e2e.base import AdoptTestCase
from tests.e2e.base import OTHER
from tests.e2e.base import POD
from tests.e2e.base import POD6
from tests.e2e.base import SUBNETS
from tests.support import kuryr
from tests.support import lab


class TestWithTheDaemon(AdoptTestCase):

    def setUp(self) -> None:
        super().setUp()
        # Kuryr alone binds the pods. A kuryr-daemon with break0 then replaces
        # it, and the pods continue to run.
        self.node.start_daemon('enabled = false')
        self.node.lab.add_ipv6()
        self.pod = self.node.add_pod('pod', vif=kuryr.macvlan_vif(
            POD, POD6, subnets=SUBNETS))
        self.other = self.node.add_pod('other', OTHER, extra_vifs={
            'eth1': kuryr.macvlan_vif('100.75.30.73')})
        for pod in (self.pod, self.other):
            self.add(pod)
            self.assert_reachable(pod, False)
        self.node.lab.settle()
        self.node.kill_daemon()
        self.node.start_daemon()

    def test_life_of_adopted_pods(self) -> None:
        self.assertEqual({'default/pod/eth0': 'adopted',
                          'default/other/eth0': 'adopted',
                          'default/other/eth1': 'adopted'}, self.outcomes())
        for pod in (self.pod, self.other):
            self.assert_reachable(pod)
        self.assertTrue(self.node.lab.ping(POD6))
        self.assertTrue(self.node.lab.ping(lab.NODE6, 'pod'))
        status = json.loads(self.call('status', '--json'))
        self.assertEqual(
            {POD: 'default/pod', POD6: 'default/pod', OTHER: 'default/other',
             '100.75.30.73': 'default/other'},
            {each['address']: each['pod'] for each in status['addresses']})
        # A second run changes nothing.
        before = self.node.lab.state()
        self.assertEqual({'bound'}, set(self.outcomes().values()))
        self.assertEqual(before, self.node.lab.state())
        # The DEL of an adopted pod unbinds the pod, though the DEL has an
        # unknown container ID.
        self.delete(self.pod)
        self.assertEqual({OTHER, '100.75.30.73'},
                         set(self.node.lab.routes()))
        self.delete(self.other)
        self.assertEqual({}, self.node.lab.routes())
        self.assertEqual([], json.loads(
            self.call('status', '--json'))['addresses'])

    def test_a_late_del_of_another_sandbox(self) -> None:
        self.adopt()
        earlier = self.node.lab.add_netns('earlier')
        for netns in ('/run/netns/gone', '', earlier):
            self.delete(self.pod, CNI_CONTAINERID='an-earlier-one',
                        CNI_NETNS=netns)
            self.assert_reachable(self.pod)
        self.call('status')

    def test_a_new_sandbox_takes_over(self) -> None:
        self.adopt()
        first = self.pod.netns
        self.node.lab.del_netns('pod')
        # The driver waits at most a second for the MAC address to be free.
        self.node.lab.until_free(str(self.pod.vifs['eth0'].address))
        self.pod.name, self.pod.netns = 'pod', self.node.lab.add_netns('new')
        self.pod.container_id = 'the-sandbox-after-it'
        self.add(self.pod)
        self.delete(self.pod, CNI_CONTAINERID='the-adopted-one',
                    CNI_NETNS=first)
        self.assertTrue(self.node.lab.ping(POD))
        self.assertTrue(self.node.lab.ping(lab.NODE, 'new'))
        self.delete(self.pod)
        self.assertNotIn(POD, self.node.lab.routes())

    def test_a_pod_with_an_ended_namespace(self) -> None:
        self.adopt()
        self.node.lab.del_netns('pod')
        self.delete(self.pod)
        self.assertEqual({OTHER, '100.75.30.73'},
                         set(self.node.lab.routes()))

    def test_pods_of_the_daemon_stay_untouched(self) -> None:
        late = self.node.add_pod('late', '100.75.30.74')
        self.add(late)
        # status exits with 1, since the other pods are not bound.
        before = self.status_of('100.75.30.74', code=1)
        self.assertEqual(late.container_id, before['container_id'])
        self.assertEqual('bound', self.outcomes()['default/late/eth0'])
        self.assertEqual(before, self.status_of('100.75.30.74'))
        self.delete(late)
        self.assertEqual({POD, POD6, OTHER, '100.75.30.73'},
                         set(self.node.lab.routes()))

    def status_of(self, address: str, code: int = 0) -> Any:
        return next(each for each in json.loads(
            self.call('status', '--json', code=code))['addresses']
            if each['address'] == address)


class TestWhatIsFound(AdoptTestCase):
    """adopt needs only the API and namespaces, and no daemon."""

    def setUp(self) -> None:
        super().setUp()
        self.node.write_conf()

    def test_dry_run(self) -> None:
        self.running_pod('pod', POD)
        self.node.lab.settle()
        before = self.node.lab.state()
        self.assertEqual({'default/pod/eth0': 'adopted'},
                         self.outcomes('--dry-run', code=1))
        self.assertEqual(before, self.node.lab.state())
        self.adopt()
        self.assertEqual({'default/pod/eth0': 'bound'},
                         self.outcomes('--dry-run'))

    def test_a_table(self) -> None:
        self.running_pod('pod', POD)
        printed = self.call('adopt')
        for text in ('default/pod', POD, 'adopted', '/run/netns/pod'):
            self.assertIn(text, printed)

    def test_a_node_without_pods(self) -> None:
        self.running_pod('pod', POD)
        for name in ('node-2', ''):
            done = self.call('adopt', code=3, KUBERNETES_NODE_NAME=name)
            self.assertIn('node %r' % name, done)
            self.assertIn('Nodes with KuryrPorts: node-1', done)

    def test_skipped_pods(self) -> None:
        self.running_pod('deleted', '100.75.30.81')
        port = self.node.api.get('kuryrports', 'default', 'deleted')
        self.assertTrue(port['metadata']['finalizers'])
        self.node.api.delete('kuryrports', 'default', 'deleted')
        self.running_pod('gone', '100.75.30.82')
        self.node.api.delete('pods', 'default', 'gone')
        self.running_pod('host', '100.75.30.83')
        self.change_pod('host', lambda pod: pod['spec'].update(
            hostNetwork=True))
        self.running_pod('ended', '100.75.30.84')
        self.change_pod('ended', lambda pod: pod['status'].update(
            phase='Succeeded'))
        self.node.add_pod('vlan', vif=k_vif.VIFVlanNested(
            vlan_id=7, vif_name='tap7'))
        self.running_pod('again', '100.75.30.85')
        self.node.api.delete('pods', 'default', 'again')
        self.node.api.create('pods', kuryr.kubeapi.pod('again',
                                                       kuryr.NODENAME))
        self.running_pod('early', '100.75.30.86')
        port = self.node.api.get('kuryrports', 'default', 'early')
        port['status']['vifs'] = {}
        self.node.api.update('kuryrports', port)
        found = self.adopt()
        self.assertEqual({'skipped'}, {each['outcome']
                                       for each in found.values()})
        self.assertEqual(
            {'default/deleted/': 'it is being deleted',
             'default/gone/': 'its pod is gone',
             'default/host/': 'it uses the network of the node',
             'default/ended/': 'it has ended',
             'default/vlan/eth0': 'it is a VIFVlanNested',
             'default/again/': 'it belongs to an earlier pod with this name',
             'default/early/': 'it has no VIF yet'},
            {name: each['reason'] for name, each in found.items()})
        self.assertIsNone(self.node.lab.link('break0'))

    def change_pod(self, name: str, change: Any) -> None:
        pod = self.node.api.get('pods', 'default', name)
        change(pod)
        self.node.api.update('pods', pod)

    def test_one_that_is_not_found(self) -> None:
        self.running_pod('pod', POD)
        self.node.add_pod('other', OTHER)  # no macvlan
        found = self.adopt()
        self.assertEqual('adopted', found['default/pod/eth0']['outcome'])
        self.assertEqual('not found', found['default/other/eth0']['outcome'])
        self.assertIn('with its MAC address fa:16:3e:',
                      found['default/other/eth0']['reason'])
        self.assertEqual({POD}, set(self.node.lab.routes()))

    def test_one_on_another_parent(self) -> None:
        self.node.lab.run('ip', 'link', 'add', 'eth1', 'up', 'type', 'veth',
                          'peer', 'name', 'nic1', 'netns', 'lan')
        pod = self.running_pod('pod', POD)
        self.node.lab.run('ip', 'link', 'del', lab.PARENT, netns='pod')
        self.node.lab.add_macvlan(
            'pod', mac=str(pod.vifs['eth0'].address), parent='eth1')
        found = self.adopt()['default/pod/eth0']
        self.assertEqual('not found', found['outcome'])
        self.assertIn('on eth0', found['reason'])

    def test_a_pod_with_an_unreadable_vif(self) -> None:
        self.running_pod('pod', POD)
        self.running_pod('bad', OTHER)
        port = self.node.api.get('kuryrports', 'default', 'bad')
        port['status']['vifs']['eth0']['vif']['versioned_object.name'] = 'X'
        self.node.api.update('kuryrports', port)
        found = self.adopt(code=1)
        self.assertEqual(('failed', 'adopted'),
                         (found['default/bad/eth0']['outcome'],
                          found['default/pod/eth0']['outcome']))

    def test_an_address_of_a_manual_bind(self) -> None:
        self.node.lab.add_pod('web', OTHER, POD)
        self.call('bind', POD, '--owner', 'web', '--netns', '/run/netns/web')
        self.running_pod('pod', POD)
        for args in (('--dry-run',), ()):
            found = self.adopt(*args, code=1)['default/pod/eth0']
            self.assertEqual('failed', found['outcome'])
            self.assertIn('belongs to web/eth0', found['reason'])

    def test_the_name_of_the_interface_is_that_in_the_namespace(self) -> None:
        # The runtime chooses CNI_IFNAME; the name of Kuryr's VIF is eth0.
        self.running_pod('pod', POD)
        for args in (('down',), ('name', 'net0'), ('up',)):
            self.node.lab.run('ip', 'link', 'set', 'net0' if args == ('up',)
                              else lab.PARENT, *args, netns='pod')
        self.adopt()
        self.assertTrue(self.node.lab.ping(POD))
        self.call('status')


class TestNamespaces(AdoptTestCase):
    """adopt finds the namespaces of pods."""

    def setUp(self) -> None:
        super().setUp()
        self.node.write_conf()
        self.pod = self.running_pod('pod', POD)

    def sleeper(self, netns: Optional[str] = None
                ) -> subprocess.Popen[bytes]:
        """Start a process in a namespace, as a container's engine does."""
        process = subprocess.Popen(
            [*(('nsenter', '--net=' + netns) if netns else ()),
             'sleep', '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def unname(self) -> subprocess.Popen[bytes]:
        """Delete the namespace's name, so that only processes keep it.

        :returns: the process that entered the namespace first
        """
        first = self.sleeper('/run/netns/pod')
        self.wait_for(first)
        # Start times of processes have a resolution of 10 ms.
        time.sleep(0.05)
        self.wait_for(self.sleeper('/run/netns/pod'))
        self.node.lab.run('ip', 'netns', 'del', 'pod')
        return first

    def wait_for(self, process: subprocess.Popen[bytes]) -> None:
        own = os.stat('/proc/thread-self/ns/net').st_ino
        lab.until(lambda: os.stat(
            '/proc/%d/ns/net' % process.pid).st_ino != own)

    def test_the_process_that_has_been_there_for_longest(self) -> None:
        first = self.unname()
        found = self.adopt()['default/pod/eth0']
        self.assertEqual('adopted', found['outcome'])
        self.assertEqual('/proc/%d/ns/net' % first.pid, found['netns'])
        self.assertTrue(self.node.lab.ping(POD))
        self.call('status')

    def test_docker_mode(self) -> None:
        first = self.unname()
        os.mkdir('/run/host_proc')
        self.node.lab.run('mount', '--rbind', '/proc', '/run/host_proc')
        with open(self.node.conf, 'a') as conf:
            conf.write('[cni_daemon]\ndocker_mode = true\n'
                       'netns_proc_dir = /run/host_proc\n')
        self.assertEqual('/run/host_proc/%d/ns/net' % first.pid,
                         self.adopt()['default/pod/eth0']['netns'])

    def test_a_file_that_is_no_namespace(self) -> None:
        with open('/run/netns/stale', 'w'):
            pass
        self.assertEqual({'default/pod/eth0': 'adopted'}, self.outcomes())


class TestTheAPI(AdoptTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.node.write_conf()

    def test_the_requests_to_the_api(self) -> None:
        self.call('adopt', code=3)  # there is no pod
        self.assertEqual(
            [('GET', '/apis/openstack.org/v1/kuryrports?labelSelector='
              'kuryr.openstack.org%2FnodeName%3Dnode-1'),
             ('GET', '/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1')],
            self.node.api.requests[:2])

    def test_it_is_not_there(self) -> None:
        self.node.api.stop()
        err = self.call('adopt', code=3)
        self.assertIn('The Kubernetes API at %s cannot be used' %
                      self.node.api.url, err)
        self.assertEqual(1, err.count('\n'), err)

    def test_it_is_another_program(self) -> None:
        for answer in b'[]', b'null', b'{}', b'<html>':
            with socket.create_server(('127.0.0.1', 0)) as server:
                def serve(answer: bytes = answer) -> None:
                    client = server.accept()[0]
                    with client:
                        client.recv(2 ** 16)
                        client.sendall(b'HTTP/1.0 200 OK\r\n\r\n' + answer)

                thread = threading.Thread(target=serve)
                thread.start()
                with open(self.node.conf, 'a') as conf:
                    conf.write('[kubernetes]\napi_root = http://127.0.0.1:%d'
                               '\n' % server.getsockname()[1])
                err = self.call('adopt', code=3)
                thread.join()
            self.assertIn('cannot be used: ', err)
            self.assertEqual(1, err.count('\n'), err)

    def test_no_token(self) -> None:
        with open(self.node.conf, 'a') as conf:
            conf.write('[kubernetes]\ntoken_file = /run/none\n')
        self.assertIn('/run/none', self.call('adopt', code=3))
