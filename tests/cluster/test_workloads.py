# SPDX-License-Identifier: Apache-2.0

"""Pods of Deployments, StatefulSets and CronJobs start and end."""

from __future__ import annotations

import time
from typing import Optional

from tests.cluster import base
from tests.cluster import cluster as clusters
from tests.cluster import kubernetes
from tests.support import lab

MANY = 30


class TestDeployment(base.ClusterTestCase):

    def deploy_many(self) -> None:
        """Start many pods on the first node, which has routes for them."""
        pods = self.deploy('web', MANY, self.first)
        self.assertEqual(set().union(*map(clusters.addresses, pods)),
                         self.first.routes())
        self.assertEqual(set(), self.second.routes())
        for pod in pods:
            self.assertEqual(pod['metadata']['name'], self.fetch(
                clusters.address(pod), self.first.name))

    def test_many_pods_scaled_to_zero(self) -> None:
        self.deploy_many()
        kubernetes.patch('deployments', 'web', {'spec': {'replicas': 0}})
        self.until(lambda: not self.cluster.pods('web')
                   and not self.cluster.leftovers())

    def test_rollout(self) -> None:
        before = self.deploy('web', 6)
        kubernetes.patch('deployments', 'web', {'spec': {'template': {
            'metadata': {'annotations': {'version': '2'}}}}})
        old = {pod['metadata']['name'] for pod in before}
        self.until(lambda: len(self.cluster.ready('web')) == 6
                   and not old & set(kubernetes.names('pods')))
        self.assert_all_reach(self.cluster.pods('web'))

    def test_many_pods_deleted_by_force(self) -> None:
        self.deploy_many()
        kubernetes.patch('deployments', 'web', {'spec': {'replicas': 0}})
        kubernetes.kubectl(self.control, 'delete', 'pods', '--all',
                           '--grace-period=0', '--force', '--wait=false')
        self.until(lambda: not self.cluster.pods('web')
                   and not self.cluster.leftovers())


class TestTwoNodes(base.ClusterTestCase):

    def test_all_reach_all(self) -> None:
        pods = (self.deploy('first', 2, self.first)
                + self.deploy('second', 2, self.second))
        self.assert_all_reach(pods)
        for node in self.cluster.nodes:
            self.assertEqual(set().union(*(
                clusters.addresses(pod) for pod in pods
                if pod['spec']['nodeName'] == node.name)), node.routes())

    def test_an_address_moves_to_the_other_node(self) -> None:
        """A pod is deleted on one node, and the other node gets its address.

        The subnet has no other free address meanwhile.
        """
        neutron = self.cluster.neutron
        before, = self.deploy('before', 1, self.first)
        address = clusters.address(before)
        self.assertEqual(before['metadata']['name'],
                         self.fetch(address, self.second.name))
        pools = neutron.pools()
        self.addCleanup(neutron.set_pools, pools)
        kubernetes.delete('deployments', 'before')
        self.until(lambda: not neutron.pods())
        neutron.set_pools([{'start': address, 'end': address}])
        after, = self.deploy('after', 1, self.second)
        self.assertEqual(address, clusters.address(after))
        for place in ('', self.first.name, self.second.name):
            self.assertEqual(after['metadata']['name'],
                             self.fetch(address, place), place)
        self.assertEqual((set(), clusters.addresses(after)),
                         (self.first.routes(), self.second.routes()))


class TestKinds(base.ClusterTestCase):

    def test_host_network(self) -> None:
        """A pod of the host's network has no route, and reaches all pods."""
        pods = self.deploy('web', 4)
        kubernetes.create('pods', {
            'apiVersion': 'v1', 'kind': 'Pod',
            'metadata': {'name': 'host'}, 'spec': {
                **clusters.template('host', self.first.name)['spec'],
                'hostNetwork': True, 'containers': [{
                    'name': 'web', 'image': clusters.IMAGE,
                    'imagePullPolicy': 'Never',
                    'command': ['sleep', '100000']}]}})
        self.until(lambda: clusters.is_ready(next(
            pod for pod in kubernetes.items('pods')
            if pod['metadata']['name'] == 'host')))
        for pod in pods:
            done = kubernetes.kubectl(
                self.control, 'exec', 'host', '--', 'ping', '-c', '1', '-W',
                '2', clusters.address(pod))
            self.assertIn('1 packets received', done.stdout)

    def test_services(self) -> None:
        """kube-proxy with iptables serves a ClusterIP and a NodePort."""
        pods = self.deploy('web', 4)
        names = {pod['metadata']['name'] for pod in pods}
        kubernetes.create('services', {
            'apiVersion': 'v1', 'kind': 'Service',
            'metadata': {'name': 'web'}, 'spec': {
                'type': 'NodePort', 'selector': {'app': 'web'}, 'ports': [
                    {'port': 80, 'nodePort': 30080}]}})
        service, = [each for each in kubernetes.items('services')
                    if each['metadata']['name'] == 'web']
        address = service['spec']['clusterIP']
        for node in self.cluster.nodes:
            self.assert_answered_by(names, address, node.name, 80)
            self.assert_answered_by(names, node.address, '', 30080)

    def assert_answered_by(self, names: set[str], address: str, netns: str,
                           port: int) -> None:
        """Assert that each endpoint answers, also on the same node."""
        answers: set[Optional[str]] = set()

        def are_all_there() -> bool:
            answers.add(self.fetch(address, netns, port))
            return answers >= names

        self.until(are_all_there)

    def test_stateful_set(self) -> None:
        kubernetes.create('statefulsets', {
            'apiVersion': 'apps/v1', 'kind': 'StatefulSet',
            'metadata': {'name': 'db'}, 'spec': {
                'serviceName': 'db', 'replicas': 3,
                'selector': {'matchLabels': {'app': 'db'}},
                'template': clusters.template('db')}})
        self.cluster.until_ready('db', 3)
        uid = {pod['metadata']['name']: pod['metadata']['uid']
               for pod in self.cluster.pods('db')}
        # The new pod has the same name, and starts while the old sandbox ends.
        for seconds in (None, 0):
            kubernetes.delete('pods', 'db-1', seconds)
            self.until(lambda: [
                pod for pod in self.cluster.ready('db')
                if pod['metadata']['name'] == 'db-1'
                and pod['metadata']['uid'] != uid['db-1']])
            self.cluster.until_ready('db', 3)
            uid.update({pod['metadata']['name']: pod['metadata']['uid']
                        for pod in self.cluster.pods('db')})
        self.assert_all_reach(self.cluster.pods('db'))

    def test_cron_job(self) -> None:
        """Pods of a CronJob start and end each minute during the test."""
        pods = self.deploy('web', 2)
        kubernetes.create('cronjobs', {
            'apiVersion': 'batch/v1beta1', 'kind': 'CronJob',
            'metadata': {'name': 'tick'}, 'spec': {
                'schedule': '*/1 * * * *', 'successfulJobsHistoryLimit': 0,
                'jobTemplate': {'spec': {'template': {'spec': {
                    'restartPolicy': 'Never',
                    'terminationGracePeriodSeconds': 1, 'containers': [{
                        'name': 'tick', 'image': clusters.IMAGE,
                        'imagePullPolicy': 'Never', 'command': [
                            'ping', '-c', '5', lab.LAN]}]}}}}}})
        seen: set[str] = set()
        ends = time.monotonic() + 300
        with self.watched(pods):
            while time.monotonic() < ends:
                seen.update(name for name in kubernetes.names('pods')
                            if name.startswith('tick'))
                time.sleep(1)
        self.assertGreaterEqual(len(seen), 4)
        kubernetes.delete('cronjobs', 'tick')
        self.until(lambda: not [name for name in kubernetes.names('pods')
                                if name.startswith('tick')])
        self.assertEqual([], self.cluster.unanswered_probes())


class TestCrash(base.ClusterTestCase):

    restarts_containers = True

    def test_one_of_two_containers(self) -> None:
        """The sandbox stays, and so do its address and route."""
        spec = clusters.template('web')['spec']['containers']
        self.cluster.deploy('pair', 1, self.first, containers=[
            {**spec[0], 'name': 'web'},
            {'name': 'crash', 'image': clusters.IMAGE,
             'imagePullPolicy': 'Never',
             'command': ['sh', '-c', 'sleep 3; exit 1']}])

        def crashed() -> bool:
            return any(clusters.restarts(pod) >= 2
                       for pod in self.cluster.pods('pair'))

        self.until(lambda: self.cluster.pods('pair') and self.cluster.pods(
            'pair')[0]['status'].get('podIP'))
        pod, = self.cluster.pods('pair')
        self.until(lambda: self.fetch(clusters.address(pod), self.first.name))
        with self.watched(self.cluster.pods('pair')):
            self.until(crashed)
        self.assertEqual(clusters.addresses(pod), self.first.routes())
        kubernetes.delete('deployments', 'pair')
        self.until(lambda: not self.cluster.pods('pair'))
