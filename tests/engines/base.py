# SPDX-License-Identifier: Apache-2.0

"""Runs Debian's container engines on a lab's node; see tools/in-root-lab."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import Any, Callable, Optional
import unittest

import grpc

from tests.functional import base
from tests.functional.cni import base as cni_base
from tests.support import images
from tests.support import lab
from tests.support import program

CONF = cni_base.CONF


def is_root() -> bool:
    """Return whether the process is root of the machine itself."""
    with open('/proc/self/uid_map') as file:
        return os.geteuid() == 0 and file.read().split()[2] == '4294967295'


@unittest.skipUnless(is_root(), 'container engines need root of the machine')
class EngineTestCase(base.LabTestCase):
    """A node with container engines.

    Without root of the machine, as on a workstation, these tests are skipped.
    CI has root.
    """

    #: [break0] options of the agent
    conf = 'metrics_bind =\n'

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.configure(self.conf)
        self.addCleanup(self.kill_all)

    def configure(self, text: str) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\n' + text)

    @staticmethod
    def kill_all() -> None:
        """Kill the processes that engines leave on this node."""
        own = os.stat('/proc/self/ns/mnt').st_ino
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                name = os.readlink('/proc/%s/exe' % pid)
                if ('/run/' in open('/proc/%s/cmdline' % pid).read()
                        and any(each in name for each in (
                            'conmon', 'containerd', 'dockerd'))
                        and os.stat('/proc/%s/ns/mnt' % pid).st_ino == own):
                    os.kill(int(pid), 9)
            except OSError:
                continue

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a server of the node, which runs until the test ends."""
        with open('/run/%s.log' % os.path.basename(command[0]), 'ab') as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)
        return server

    def start_agent(self) -> subprocess.Popen[bytes]:
        agent = self.start(program.BREAK0, '--config-file', CONF, 'agent')
        self.until(cni_base.is_served)
        return agent

    def until(self, condition: Callable[[], Any]) -> float:
        """Wait until a condition holds; return the duration in seconds."""
        return lab.until(condition, self.logs)

    @staticmethod
    def logs() -> str:
        found = []
        for name in sorted(os.listdir('/run')):
            if name.endswith('.log'):
                with open('/run/' + name, errors='replace') as file:
                    found.append('%s:\n%s' % (name, file.read()[-3000:]))
        return '\n'.join(found)

    def assert_reaches(self, address: str, inside: Callable[..., bool]
                       ) -> None:
        """Assert that node and container reach each other."""
        node = lab.NODE6 if ':' in address else lab.NODE
        self.assertTrue(self.lab.ping(address), (address, self.logs()))
        self.assertTrue(inside('ping', '-c', '1', '-W', '1', node),
                        (address, self.logs()))

    def routed(self) -> dict[str, str]:
        """Return the parent of each address with a route through a break0."""
        return {address: link['link'] for link in self.lab.ip('link')
                if link['ifname'].startswith('break0')
                for address in self.lab.routes(link['ifname'])}

    def assert_nothing_left(self) -> None:
        self.until(lambda: not self.routed() and not self.bound())
        self.assertEqual([], [
            each for each in self.lab.ip('neigh', 'show', 'nud', 'permanent')
            if each['dev'].startswith('break0')])
        self.assertEqual([], self.problems())


class Engine:
    """An engine with a command-line client."""

    def __init__(self, test: EngineTestCase) -> None:
        self.test = test
        self.command: list[str] = []
        self.environ: dict[str, str] = {}

    def __call__(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.command, *args], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env={**os.environ, **self.environ})
        if check and done.returncode:
            raise AssertionError('%s: exit %d\n%s\n%s' % (
                ' '.join(args), done.returncode, done.stdout,
                self.test.logs()))
        return done.stdout.strip()

    def run(self, name: str, *options: str) -> None:
        self('run', '--detach', '--name', name, *options, 'box', 'sleep',
             '1000')

    def inside(self, name: str) -> Callable[..., bool]:
        """Return a function that runs a command in a container.

        The function returns whether the command succeeds.
        """
        def run(*command: str) -> bool:
            return subprocess.run(
                [*self.command, 'exec', name, *command],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, **self.environ}).returncode == 0

        return run

    def attachment(self, name: str, network: str) -> dict[str, Any]:
        """Return the container's settings in a network, from inspect."""
        found: dict[str, Any] = json.loads(self(
            'inspect', '--format', '{{json .NetworkSettings.Networks}}',
            name))[network]
        return found

    def address(self, name: str, network: str = 'lan') -> str:
        found: str = self.attachment(name, network)['IPAddress']
        return found


class Podman(Engine):
    """Podman, with its CNI backend or with netavark."""

    def __init__(self, test: EngineTestCase, backend: str) -> None:
        super().__init__(test)
        # crun mistakes a machine with both cgroup hierarchies for a machine
        # without cgroups.
        subprocess.run(['umount', '/sys/fs/cgroup/unified'],
                       stderr=subprocess.DEVNULL)
        with open('/run/containers.conf', 'w') as file:
            file.write('''
[network]
network_backend = "%s"
cni_plugin_dirs = ["%s", "%s"]
network_config_dir = "/run/net.d"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
''' % (backend, cni_base.BIN, cni_base.PLUGINS))
        os.makedirs('/run/net.d', exist_ok=True)
        self.command = [
            'podman', '--root', '/run/podman/root', '--runroot',
            '/run/podman/run', '--tmpdir', '/run/podman/tmp',
            '--storage-driver', 'vfs']
        self.environ = {'CONTAINERS_CONF': '/run/containers.conf',
                        'PODMAN_IGNORE_CGROUPSV1_WARNING': '1'}
        self('import', images.tar('/run'), 'box')
        test.addCleanup(self, 'rm', '--force', '--all', '--time', '0',
                        check=False)

    def run(self, name: str, *options: str) -> None:
        # ping needs CAP_NET_RAW. Later releases of Podman do not grant it by
        # default.
        super().run(name, '--replace', '--cap-add', 'NET_RAW', *options)


class Docker(Engine):
    """Docker, by default without its bridge and its iptables."""

    def __init__(self, test: EngineTestCase, bridge: bool = False) -> None:
        super().__init__(test)
        self._options = () if bridge else (
            '--bridge=none', '--iptables=false', '--ip6tables=false')
        self.server = self.start()
        self.command = ['docker', '--host', 'unix:///run/docker.sock']
        self.until_served()
        self('import', images.tar('/run'), 'box')
        test.addCleanup(self.remove_all)

    def start(self) -> subprocess.Popen[bytes]:
        return self.test.start(
            'dockerd', *self._options, '--storage-driver', 'vfs',
            '--data-root', '/run/docker-data', '--exec-root',
            '/run/docker-exec', '--pidfile', '/run/docker.pid',
            '--shutdown-timeout', '1', '--host', 'unix:///run/docker.sock')

    def until_served(self) -> None:
        self.test.until(lambda: self.test.lab.run(
            *self.command, 'version', check=False).returncode == 0)

    def restart(self) -> None:
        self.server.terminate()
        self.server.wait()
        self.server = self.start()
        self.until_served()

    def run_with_mac(self, name: str, mac: str, address: str,
                     address6: str) -> None:
        """Run a container with a MAC address and IP addresses.

        Uses the API, since the client may have another release than the
        server, and the API field for the address depends on the release.
        """
        attachment = {'MacAddress': mac, 'IPAMConfig': {
            'IPv4Address': address, 'IPv6Address': address6}}
        # The top-level MacAddress is for releases before 25.
        body = {'Image': 'box', 'Cmd': ['sleep', '1000'], 'MacAddress': mac,
                'HostConfig': {'NetworkMode': 'lan'},
                'NetworkingConfig': {'EndpointsConfig': {
                    'lan': attachment}}}
        data = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect('/run/docker.sock')
            client.sendall(
                b'POST /containers/create?name=%s HTTP/1.0\r\n'
                b'Content-Type: application/json\r\n'
                b'Content-Length: %d\r\n\r\n%s' % (
                    name.encode(), len(data), data))
            answer = client.makefile('rb').read()
        assert b' 201 ' in answer.split(b'\r\n')[0], answer
        self('start', name)

    def remove_all(self) -> None:
        names = self('ps', '--all', '--quiet', check=False).split()
        if names:
            self('rm', '--force', *names, check=False)


class Containerd:
    """containerd, by the CRI that kubelet uses."""

    SERVICE = '/runtime.v1.RuntimeService/'

    def __init__(self, test: EngineTestCase, bin_dir: str) -> None:
        self.test = test
        with open('/run/containerd.toml', 'w') as file:
            file.write('''
version = 2
root = "/run/containerd-root"
state = "/run/containerd-state"
[grpc]
  address = "/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "%s"
  conf_dir = "/run/net.d"
''' % bin_dir)
        test.start('containerd', '--config', '/run/containerd.toml')
        test.until(lambda: test.lab.run(
            'ctr', '--address', '/run/containerd.sock', 'version',
            check=False).returncode == 0)
        for arguments in (
                ('image', 'import', images.saved(
                    '/run', 'docker.io/lab/pause:1', '/bin/sleep', '1000')),
                ('image', 'tag', 'docker.io/lab/pause:1', 'lab/pause:1')):
            test.lab.run('ctr', '--address', '/run/containerd.sock',
                         '--namespace', 'k8s.io', *arguments, check=(
                             arguments[1] == 'import'))
        self._channel = grpc.insecure_channel('unix:///run/containerd.sock')
        test.addCleanup(self._channel.close)

    def call(self, method: str, request: bytes) -> dict[int, bytes]:
        """Call a method, and return its answer's fields by number."""
        answer = self._channel.unary_unary(self.SERVICE + method)(
            request, timeout=lab.PATIENCE, wait_for_ready=True)
        return _fields(answer)

    def run_sandbox(self, name: str, namespace: str = 'shop', uid: str = 'uid',
                    linux: bytes = b'') -> str:
        """Run a sandbox, and return its id.

        :param linux: more fields of LinuxPodSandboxConfig
        """
        metadata = message(1, name) + message(2, uid) + message(3, namespace)
        linux = message(1, '/break0-lab') + linux
        request = message(1, message(1, metadata) + message(8, linux))
        return self.call('RunPodSandbox', request)[1].decode()

    def netns(self, sandbox: str) -> str:
        """Return the path of a sandbox's namespace, from verbose status."""
        status = self._channel.unary_unary(self.SERVICE + 'PodSandboxStatus')(
            message(1, sandbox) + b'\x10\x01', timeout=lab.PATIENCE)
        start = status.index(b'/var/run/netns/')
        path = status[start:].split(b'"')[0].decode()
        return '/run/netns/' + os.path.basename(path)

    def address(self, sandbox: str) -> str:
        status = self.call('PodSandboxStatus', message(1, sandbox))[1]
        return _fields(_fields(status)[5])[1].decode()


def message(number: int, value: Any) -> bytes:
    """Encode a protobuf field with a string or a message as value."""
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found + bytes([value]))


def _fields(data: bytes) -> dict[int, bytes]:
    """Return a protobuf message's length-delimited fields, by number."""
    found: dict[int, bytes] = {}
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            value |= (data[place] & 127) << shift
            shift += 7
            place += 1
            if not data[place - 1] & 128:
                return value

    while place < len(data):
        tag = varint()
        size: Optional[int] = varint()
        if tag & 7 == 2:
            assert size is not None
            found.setdefault(tag >> 3, data[place:place + size])
            place += size
    return found
