# SPDX-License-Identifier: Apache-2.0

"""Tests the commands of the page "Install on a Kuryr cluster".

``tests.cluster.image`` has run the commands that need the network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any
import unittest

import psutil
import requests

from tests.cluster import base
from tests.cluster import cluster as clusters
from tests.cluster import image
from tests.cluster import kubernetes
from tests.cluster import node as nodes
from tests.support import lab
from tests.support import pages

IMAGES = os.path.join(clusters.kept_programs(), 'images')
#: Path of the clone on the machine on which the operator works.
CLONE = '/opt/clone'
NAMESPACE = 'kube-system'

#: The operator's kuryr.conf, for Kuryr's ConfigMap.
KURYR_CONF = '''\
[kubernetes]
api_root = %s
token_file = /var/run/secrets/kubernetes.io/serviceaccount/token
ssl_ca_crt_file = /var/run/secrets/kubernetes.io/serviceaccount/ca.crt
ssl_verify_server_crt = true
pod_vif_driver = nested-macvlan
[binding]
link_iface = eth0
[vif_plug_ovs_privileged]
helper_command = privsep-helper
[vif_plug_linux_bridge_privileged]
helper_command = privsep-helper
''' % kubernetes.URL

HOSTS = '''\
127.0.0.1 localhost
%s registry.example.org
''' % lab.LAN

REGISTRY_CONF = '''\
version: 0.1
storage:
  filesystem:
    rootdirectory: /var/lib/cluster/registry
http:
  addr: %s:80
''' % lab.LAN

#: The parts of outputs that differ between clusters, such as the widths of
#: tables, and the replacement of each part.
_VARIES = (
    (re.compile(r'([0-9a-f]{2}:){5}[0-9a-f]{2}'), 'MAC'),
    (re.compile(r'cni-[0-9a-f-]+'), 'cni-ID'),
    (re.compile(r'100\.75\.30\.\d+|fd00:30::[0-9a-f]+'), 'ADDRESS'),
    (re.compile(r'web-[12]'), 'POD'),
    (re.compile(r'^\+[-+]+\+$', re.MULTILINE), ''))


def comparable(output: str) -> list[list[str]]:
    """Return the words of each line of an output, without differing parts.

    :returns: lines in alphabetical order, since the rows of a table are in the
        order of their addresses
    """
    for expression, name in _VARIES:
        output = expression.sub(name, output)
    return sorted(line.split() for line in output.splitlines()
                  if line.strip())


@unittest.skipUnless(os.path.isdir(IMAGES + '/clone'),
                     'needs tests.cluster.image')
class TestDaemonSet(base.ClusterTestCase):
    """Kuryr's DaemonSet replaces kuryr-daemon and the agent."""

    maxDiff = None

    def setUp(self) -> None:
        super().setUp()
        self.control.write('/etc/hosts', HOSTS)
        self.clone = self.control.path(CLONE)
        shutil.rmtree(self.clone, ignore_errors=True)
        shutil.copytree(IMAGES + '/clone', self.clone)
        self.control.write('/etc/registry.yml', REGISTRY_CONF)
        self.registry = self.control.add(
            'registry', ['docker-registry', 'serve', '/etc/registry.yml'],
            is_ready=self._registry_answers)
        self.registry.start()
        self.addCleanup(self.registry.kill)
        self.control.write('/etc/kuryr.conf', KURYR_CONF)
        self.control.run('mount', '-t', 'tmpfs', 'run', IMAGES + '/run')
        self.addCleanup(self.control.run, 'umount', '--lazy', IMAGES + '/run')
        self.run_shell('docker push kuryr/cni:latest '
                       'registry.example.org/kuryr/cni:latest')
        for node in self.cluster.nodes:
            self._stop_kuryr(node)
        self._start_stock()

    @staticmethod
    def _registry_answers() -> bool:
        try:
            return requests.get('http://%s/v2/' % lab.LAN, timeout=5).ok
        except requests.ConnectionError:
            return False

    def _stop_kuryr(self, node: nodes.Node) -> None:
        """Bring a node into its state before the deployment of Kuryr."""
        run = node.machine.run
        node.agent.terminate()
        node.break0('cleanup')
        node.daemon.terminate()
        self.addCleanup(node.agent.start)
        self.addCleanup(node.daemon.start)
        self.addCleanup(node.install)
        run('rm', '/opt/cni/bin/kuryr-cni', '/etc/cni/net.d/10-kuryr.conflist')
        node.machine.write('/etc/hosts', HOSTS)
        node.machine.write(
            '/etc/containerd/certs.d/registry.example.org/hosts.toml',
            '[host."http://registry.example.org"]\n'
            'capabilities = ["pull", "resolve"]\n')
        # The nodes must have Kuryr's own image already, since its
        # imagePullPolicy is Never.
        for command in (
                'pull --plain-http registry.example.org/kuryr/cni:latest',
                'tag registry.example.org/kuryr/cni:latest '
                'docker.io/kuryr/cni:latest'):
            run('ctr', '--namespace', 'k8s.io', 'images', *command.split())

    def _start_stock(self) -> None:
        """Deploy Kuryr without break0, as its documentation says."""
        self.addCleanup(self._remove_stock)
        self.run_shell(
            'tar xzf kuryr-kubernetes-*.tar.gz\n'
            'etc/kubernetes/generate kuryr-kubernetes-10.0.0 stock '
            '/etc/kuryr.conf')
        self._shorten('stock')
        self.run_shell(
            'for each in certificates_secret cni_service_account config_map '
            'cni_ds; do kubectl apply -f stock/$each.yml; done')
        self.until_rolled_out()

    def _remove_stock(self) -> None:
        self.run_shell(
            'kubectl delete --ignore-not-found -f stock/cni_ds.yml '
            '-f stock/cni_service_account.yml -f stock/config_map.yml '
            '-f stock/certificates_secret.yml')
        self.until(lambda: not self.pods_of_kuryr())

    def _shorten(self, directory: str) -> None:
        """Let kubelet probe Kuryr's container after 1 s instead of 60 s."""
        path = os.path.join(self.clone, directory, 'cni_ds.yml')
        with open(path) as file:
            text = file.read()
        assert 'initialDelaySeconds: 60' in text
        with open(path, 'w') as file:
            file.write(text.replace('initialDelaySeconds: 60',
                                    'initialDelaySeconds: 1'))

    def run_shell(self, script: str) -> str:
        """Run commands as the operator does, at the top of the clone.

        :returns: the output of the commands
        :raises AssertionError: with output and errors, if a command fails
        """
        environ = image.environ(IMAGES)
        environ['KUBECONFIG'] = kubernetes.CONFIG
        process = self.control.popen(
            ['sh', '-ec', 'cd %s\n%s' % (CLONE, script)], environ=environ,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = process.communicate()
        self.assertEqual(0, process.returncode,
                         '\n'.join((script, output, errors)))
        return str(output)

    #: The command of the page that gets the name of a node's pod.
    get_pod = ''

    def follow(self, title: str) -> None:
        """Run the commands of a section, and compare their output."""
        for step in pages.steps(image.PAGE, title):
            if step.command.startswith('pip '):
                continue
            command = step.command.replace(
                '/path/to/kuryr.conf', '/etc/kuryr.conf').replace(
                'NODE', self.first.name)
            if '$pod' in command:  # each command has a shell of its own
                command = '%s\n%s' % (self.get_pod, command)
            elif command.startswith('pod='):
                self.get_pod = command
            output = self.run_shell(command)
            print(command, output, sep='\n')
            if step.command.startswith('etc/kubernetes/generate'):
                self._shorten('generated')
            elif ' rollout status ' in step.command:
                self.until_rolled_out()
            if step.output:
                with self.subTest(step.command):
                    self.assertEqual(comparable(step.output),
                                     comparable(output), output)

    def edit(self, before: str, after: str) -> None:
        """Edit kustomization.yaml."""
        path = os.path.join(self.clone, 'etc/kubernetes/kustomization.yaml')
        with open(path) as file:
            text = file.read()
        self.assertEqual(1, text.count(before), before)
        with open(path, 'w') as file:
            file.write(text.replace(before, after))

    @staticmethod
    def pods_of_kuryr() -> list[dict[str, Any]]:
        return kubernetes.items('pods', 'app=kuryr-cni', NAMESPACE)

    def pod_of(self, node: nodes.Node) -> dict[str, Any]:
        """Return the pod of kuryr-cni-ds on a node."""
        return next(each for each in self.pods_of_kuryr()
                    if each['spec']['nodeName'] == node.name
                    and 'deletionTimestamp' not in each['metadata'])

    def until_rolled_out(self) -> None:
        """Wait until each node has one pod, which is ready and up to date.

        If a busy node is not ready, ``kubectl rollout status`` ends without
        waiting for its pod.
        """
        def is_rolled_out() -> bool:
            pods = self.pods_of_kuryr()
            daemon_set, = kubernetes.items('daemonsets', '', NAMESPACE)
            spec = daemon_set['spec']['template']['spec']
            return len(pods) == len(self.cluster.nodes) and all(
                clusters.is_ready(pod) and str(
                    daemon_set['metadata']['generation'])
                == pod['metadata']['labels']['pod-template-generation']
                and [each['name'] for each in spec['containers']]
                == [each['name'] for each in pod['spec']['containers']]
                for pod in pods)

        self.until(is_rolled_out, lambda: self.run_shell(
            'kubectl -n kube-system describe pods; kubectl -n kube-system '
            'logs -l app=kuryr-cni --all-containers --tail=20 || true'))

    def start_pods(self) -> list[dict[str, Any]]:
        """Start the pods of the page, without probes of kubelet."""
        for name in ('web-1', 'web-2'):
            template = clusters.template(name)
            for probe in ('livenessProbe', 'readinessProbe'):
                del template['spec']['containers'][0][probe]
            template['metadata']['name'] = name
            template['spec']['nodeName'] = self.first.name
            kubernetes.create('pods', {'apiVersion': 'v1', 'kind': 'Pod',
                                       **template})
        self.until(lambda: all(map(clusters.is_ready,
                                   kubernetes.items('pods'))))
        return kubernetes.items('pods')

    def test_page(self) -> None:
        pods = self.start_pods()
        for pod in pods:
            self.assertIsNone(self.fetch(clusters.address(pod),
                                         self.first.name))
        self.follow('1. Build the image')
        self.follow("2. Get Kuryr's DaemonSet")
        self.edit('# - OS_BREAK0__ALLOWED_CIDRS=10.0.0.0/16,fd00:10::/64',
                  '- OS_BREAK0__ALLOWED_CIDRS=100.75.30.0/24,fd00:30::/64')
        self.follow('4. Apply it')
        self.follow('5. Check the nodes')
        self.assert_all_reach(pods)
        self.follow('Upgrade')
        for each in self.pods_of_kuryr():
            self.assertEqual(
                {'registry.example.org/kuryr/cni-break0:2'},
                {container['image'] for container
                 in each['spec']['containers']})
        self.assert_all_reach(pods)
        self.check_health()
        self.follow('Remove')
        for node in self.cluster.nodes:
            self.assertEqual('', node.machine.run(
                'ip', 'link', 'show', 'type', 'macvlan').stdout)
        for pod in pods:
            self.assertIsNone(self.fetch(clusters.address(pod),
                                         self.first.name))

    def tearDown(self) -> None:
        """Skip the checks of the base class, because break0 is removed here.

        The cleanups start kuryr-daemon with break0, and then delete the pods.
        Do not delete them earlier: kubelet repeats a DEL without CNI_NETNS,
        and stock Kuryr would then delete eth0 of the node. The kernel cannot
        delete a physical NIC, but this eth0 is a veth.
        """

    def check_health(self) -> None:
        """Check that kubelet restarts an agent that is suspended."""
        agent, = (each for each in psutil.Process(
            self.second.machine.pid).children(recursive=True)
            if each.cmdline()[-1:] == ['agent'])
        agent.suspend()

        def restarts() -> int:
            return sum(status['restartCount'] for status in self.pod_of(
                self.second)['status']['containerStatuses']
                if status['name'] == 'kuryr-break0-agent')

        self.until(lambda: restarts() == 1)
        self.until_rolled_out()
