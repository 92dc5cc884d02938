# SPDX-License-Identifier: Apache-2.0

"""A node of the cluster: kubelet, containerd, kube-proxy, Kuryr, the agent."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import subprocess

from tests.cluster import kubernetes
from tests.cluster import machine as machines
from tests.support import lab

CONF = '/etc/kuryr/kuryr.conf'
RECORDS = '/run/kuryr-break0/addresses'
SOCKET = '/run/containerd/containerd.sock'

KURYR_CONF = '''\
[DEFAULT]
debug = true
use_stderr = true
[kubernetes]
api_root = %(api)s
token_file = /etc/kuryr/token
ssl_verify_server_crt = false
[binding]
link_iface = %(parent)s
[oslo_concurrency]
lock_path = /run/kuryr-locks
[break0]
allowed_cidrs = 100.75.30.0/24, fd00:30::/64
%(break0)s
'''

CONFLIST = json.dumps({'cniVersion': '0.3.1', 'name': 'kuryr', 'plugins': [
    {'type': 'kuryr-cni', 'kuryr_conf': CONF, 'debug': True}]})

CONTAINERD = '''\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "cluster/box:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
'''


class Node:
    """A node; its NIC is on the LAN, which is a bridge of the lab.

    :param number: from 1; determines the name and the addresses
    :param kept: the directory of the programs
    :param image: the archive of the image of sandboxes and pods
    :param parent: the name of the node's NIC
    :param bin_dir: the directory of kuryr-daemon and kuryr-break0
    """

    def __init__(self, number: int, directory: str, kept: str, image: str,
                 bin_dir: str, parent: str) -> None:
        self.parent = parent
        self.name = 'node-%d' % number
        self.address = '100.75.30.%d' % (50 + number)
        self.address6 = 'fd00:30::%d' % (50 + number)
        self.mac = 'fa:16:3e:00:00:%02x' % number
        self._port = 'port-%d' % number
        self._image = image
        self._kept = kept
        self._bin = bin_dir
        self.machine = machines.Machine(self.name, directory)
        add = self.machine.add
        self.containerd = add('containerd', ['containerd'], is_ready=lambda: (
            self.machine.run('ctr', 'version', check=False).returncode == 0))
        self.kubelet = add('kubelet', [
            kept + '/bin/kubelet',
            '--kubeconfig=' + kubernetes.CONFIG,
            '--container-runtime=remote',
            '--container-runtime-endpoint=unix://' + SOCKET,
            '--hostname-override=' + self.name, '--node-ip=' + self.address,
            '--cgroup-driver=cgroupfs', '--cgroups-per-qos=false',
            '--enforce-node-allocatable=', '--eviction-hard=',
            '--fail-swap-on=false', '--resolv-conf=',
            '--make-iptables-util-chains=false',
            '--authentication-token-webhook=true', '--sync-frequency=5s',
            '--node-status-update-frequency=2s',
            # The subnet has fewer addresses, so no node reaches this limit.
            '--max-pods=200', '--kube-api-qps=50', '--kube-api-burst=100',
            '--feature-gates=IPv6DualStack=true', '--registry-qps=0',
            '--event-qps=50'],
            is_ready=self._is_node_ready)
        self.proxy = add('kube-proxy', [
            kept + '/bin/kube-proxy',
            '--kubeconfig=' + kubernetes.CONFIG,
            '--proxy-mode=iptables', '--conntrack-max-per-core=0',
            '--hostname-override=' + self.name, '--healthz-port=0'])
        self.daemon = add('kuryr-daemon', [
            bin_dir + '/kuryr-daemon', '--config-file', CONF],
            environ={'KUBERNETES_NODE_NAME': self.name, 'HOME': '/run'},
            is_family=True, is_ready=lambda: self._accepts(5036))
        self.agent = add('agent', [
            bin_dir + '/kuryr-break0', '--config-file', CONF, 'agent'],
            is_ready=lambda: self._accepts(9817))

    def boot(self) -> None:
        """Create the machine, and connect it to the LAN."""
        self.machine.boot()
        run = self.machine.run
        subprocess.run(['ip', 'netns', 'del', self.name],
                       stderr=subprocess.DEVNULL)
        # The kernel deletes the namespace of an earlier boot, and with it the
        # other end of this pair, some time after the namespace has ended.
        lab.until(lambda: self._port not in (
            name for _, name in socket.if_nameindex()))
        self._lan('ip', 'netns', 'attach', self.name, str(self.machine.pid))
        self._lan('ip', 'link', 'add', self.parent, 'netns', self.name,
                  'address', self.mac, 'type', 'veth', 'peer', 'name',
                  self._port)
        self._lan('ip', 'link', 'set', self._port, 'master', 'lan', 'up')
        # Kubernetes needs this of a node: packets for a NodePort are forwarded
        # to the pod.
        run('sysctl', '--quiet', '--write', 'net.ipv4.ip_forward=1')
        run('ip', 'link', 'set', self.parent, 'up')
        run('ip', 'address', 'add', self.address + '/24', 'dev', self.parent)
        run('ip', 'address', 'add', self.address6 + '/64', 'dev', self.parent,
            'nodad')
        run('ip', 'route', 'add', 'default', 'via', lab.LAN)
        run('ip', 'route', 'add', 'default', 'via', lab.LAN6)

    def install(self) -> None:
        """Put configuration and programs on the disk, once."""
        write = self.machine.write
        write(kubernetes.CONFIG, kubernetes.KUBECONFIG, 0o600)
        write('/etc/kuryr/token', kubernetes.TOKEN, 0o600)
        write('/etc/cni/net.d/10-kuryr.conflist', CONFLIST)
        write('/etc/containerd/config.toml', CONTAINERD)
        self.machine.copy(self._kept + '/bin/kuryr-cni',
                          '/opt/cni/bin/kuryr-cni')
        self.machine.copy('/usr/lib/cni/loopback', '/opt/cni/bin/loopback')
        self.configure('')

    def configure(self, break0: str) -> None:
        """Write kuryr.conf.

        :param break0: further lines of the section ``[break0]``
        """
        self.machine.write(CONF, KURYR_CONF % {
            'api': kubernetes.URL, 'parent': self.parent, 'break0': break0})

    def prepare(self) -> None:
        """Start containerd, with the image of the pods."""
        self.containerd.start()
        self.machine.run('ctr', '--namespace', 'k8s.io', 'images', 'import',
                         self._image)

    def start(self) -> None:
        """Start all other programs, which need the API."""
        for each in (self.daemon, self.kubelet, self.agent, self.proxy):
            each.start(wait=False)
        for each in (self.daemon, self.kubelet, self.agent):
            each.wait_ready()

    def halt(self) -> None:
        """Kill all processes, without warning."""
        self.machine.halt()

    def remove_break0(self, stock: str) -> None:
        """Let Kuryr alone bind pods.

        :param stock: the bin directory of a Kuryr without kuryr-break0
        """
        self.agent.kill()
        self.break0('cleanup')
        self._use(stock)

    def install_break0(self) -> None:
        """Let kuryr-break0 bind pods, unless it does so already."""
        if self.daemon.command[0] != self._bin + '/kuryr-daemon':
            self._use(self._bin)
            self.agent.start()

    def _use(self, bin_dir: str) -> None:
        self.daemon.command[0] = bin_dir + '/kuryr-daemon'
        self.daemon.restart()

    def _is_node_ready(self) -> bool:
        answer = kubernetes.call('GET', kubernetes.path('nodes', self.name),
                                 check=False)
        return answer.ok and any(
            each['type'] == 'Ready' and each['status'] == 'True'
            for each in answer.json()['status'].get('conditions', ()))

    def sandboxes(self) -> list[str]:
        """Return the names of the pods' network namespaces."""
        return os.listdir(self.machine.path('/run/netns'))

    def recorded(self) -> set[str]:
        """Return the addresses that have a record in the ledger."""
        found = set()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.machine.path(RECORDS)):
                with contextlib.suppress(ValueError):
                    found.add(str(ipaddress.ip_address(
                        name.replace('.json', ''))))
        return found

    def admitted(self) -> set[str]:
        """Return the addresses that have a guard entry."""
        done = self.machine.run('nft', '-j', 'list', 'table', 'netdev',
                                'kuryr-break0-break0', check=False)
        if done.returncode:
            return set()
        return {pair['concat'][1]
                for each in json.loads(done.stdout)['nftables']
                for pair in each.get('set', {}).get('elem', ())
                if each['set']['name'] in ('pairs4', 'pairs6')}

    @staticmethod
    def _lan(*command: str) -> None:
        """Run a command in the namespace of the LAN."""
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT)
        assert not done.returncode, (command, done.stdout)

    def _accepts(self, port: int) -> bool:
        """Return whether a program of the node listens on a local port."""
        answers: list[bool] = []

        def connect() -> None:
            with contextlib.suppress(OSError):
                socket.create_connection(('127.0.0.1', port), 5).close()
                answers.append(True)

        lab.Lab.in_netns(connect, self.name)
        return bool(answers)

    def break0(self, *args: str, check: bool = True) -> str:
        """Run kuryr-break0 on the node, and return its output."""
        return self.machine.run(
            self._bin + '/kuryr-break0', '--config-file', CONF, *args,
            check=check, environ={'KUBERNETES_NODE_NAME': self.name}).stdout

    def routes(self) -> set[str]:
        """Return the addresses that have a host route through break0."""
        return {route['dst'] for family in ('-4', '-6')
                for route in self.machine.ip(family, 'route', 'show', 'table',
                                             'all')
                if route.get('dev') == 'break0'
                and route.get('protocol') == '176'}

    def neighbours(self) -> set[str]:
        """Return the addresses that have a permanent neighbour on break0."""
        return {each['dst'] for each in self.machine.ip(
            'neighbour', 'show', 'nud', 'permanent')
            if each['dev'] == 'break0'}
