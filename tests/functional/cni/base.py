# SPDX-License-Identifier: Apache-2.0

"""A CNI runtime for tests, with macvlan of containernetworking-plugins."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import socket
import subprocess
from typing import Any, Optional

from tests.functional import base
from tests.support import lab
from tests.support import program

PLUGINS = '/usr/lib/cni'
BIN = '/run/cni-bin'
CONF = '/run/kuryr.conf'
LOG = pathlib.Path('/run/agent.log')
SOCKET = '/run/kuryr-break0/cni.sock'
PROJECT = pathlib.Path(__file__).parents[3]
SHIM = PROJECT / 'build/cni/break0'
SHIM_SOURCE = PROJECT / 'kuryr_break0/cni/shim.c'
ID = 'c0ffee0123'
OTHER_ID = 'c0ffee4567'


def network(name: str = 'lan', version: str = '1.0.0', master: str = 'eth0',
            mode: str = 'bridge', subnets: tuple[str, ...] = (
                '100.75.30.128/25', 'fd00:30::1:0/112'),
            **keys: Any) -> dict[str, Any]:
    """Return a network configuration list: macvlan, then break0 with keys."""
    return {'cniVersion': version, 'name': name, 'plugins': [
        {'type': 'macvlan', 'master': master, 'mode': mode, 'ipam': {
            'type': 'host-local', 'dataDir': '/run/ipam',
            'ranges': [[{'subnet': subnet}] for subnet in subnets],
            'routes': []}},
        {'type': 'break0', **keys}]}


class Failed(Exception):
    """A plugin answered with an error."""

    def __init__(self, output: str, stderr: str) -> None:
        self.answer: dict[str, Any] = json.loads(output)
        self.code = self.answer['code']
        self.text = self.answer['msg']
        # If error 11 comes from the shim, only the agent's log has the cause.
        log = LOG.read_text() if self.code == 11 and LOG.exists() else ''
        super().__init__(output + stderr + log)


class Runtime:
    """A CNI runtime of one node.

    :param plugin: path of the plugin chained after macvlan
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.results: dict[tuple[str, str, str], Any] = {}

    def call(self, command: Optional[str], config: Any, *,
             container: Optional[str] = ID, ifname: Optional[str] = 'eth0',
             netns: Optional[str] = None, args: Optional[str] = None,
             plugin: Optional[str] = None, **environ: str) -> Any:
        """Run a plugin, and return its answer.

        :raises Failed: if the plugin answers with an error
        """
        data = (config if isinstance(config, bytes)
                else json.dumps(config).encode())
        variables = {'CNI_COMMAND': command, 'CNI_CONTAINERID': container,
                     'CNI_IFNAME': ifname, 'CNI_NETNS': netns,
                     'CNI_ARGS': args, 'CNI_PATH': PLUGINS, **environ}
        done = program.run(
            program.of_script(plugin or self.plugin), input=data,
            timeout=lab.PATIENCE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={'PATH': os.environ['PATH'], **{
                name: value for name, value in variables.items()
                if value is not None}})
        output, stderr = done.stdout.decode(), done.stderr.decode()
        assert 'Traceback' not in output + stderr, output + stderr
        if done.returncode:
            raise Failed(output, stderr)
        return json.loads(output) if output.strip() else None

    @staticmethod
    def single(listed: dict[str, Any], number: int = 1,
               previous: Any = None, **keys: Any) -> dict[str, Any]:
        """Return the configuration for one plugin of a list."""
        found = {'cniVersion': listed['cniVersion'], 'name': listed['name'],
                 **copy.deepcopy(listed['plugins'][number]), **keys}
        if previous is not None:
            found['prevResult'] = previous
        return found

    def add(self, listed: dict[str, Any], netns: str, container: str = ID,
            ifname: str = 'eth0', args: Optional[str] = None) -> Any:
        """Attach a container, and return the result of break0.

        break0 must return macvlan's result unchanged.
        """
        previous = self.macvlan('ADD', listed, netns, container, ifname)
        self.results[listed['name'], container, ifname] = previous
        result = self.call('ADD', self.single(listed, previous=previous),
                           container=container, ifname=ifname, netns=netns,
                           args=args)
        assert result == previous, result
        return result

    def macvlan(self, command: str, listed: dict[str, Any], netns: str,
                container: str = ID, ifname: str = 'eth0') -> Any:
        kind = listed['plugins'][0]['type']
        return self.call(command, self.single(listed, 0), netns=netns,
                         container=container, ifname=ifname,
                         plugin='%s/%s' % (PLUGINS, kind))

    def remove(self, listed: dict[str, Any], netns: Optional[str],
               container: str = ID, ifname: str = 'eth0',
               with_result: bool = True) -> None:
        """Detach a container, in reverse order of the plugins."""
        previous = self.results.get((listed['name'], container, ifname))
        self.call('DEL', self.single(
            listed, previous=previous if with_result else None),
            container=container, ifname=ifname, netns=netns)
        if netns is not None:
            self.macvlan('DEL', listed, netns, container, ifname)

    def check(self, listed: dict[str, Any], netns: str, container: str = ID,
              ifname: str = 'eth0') -> None:
        self.call('CHECK', self.single(
            listed, previous=self.results[listed['name'], container, ifname]),
            container=container, ifname=ifname, netns=netns)


def addresses(result: Any) -> list[str]:
    """Return the addresses of a result, without prefix lengths."""
    return [each['address'].partition('/')[0] for each in result['ips']]


def is_served() -> bool:
    """Return whether an agent accepts CNI requests."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(SOCKET) == 0


class CNITestCase(base.LabTestCase):
    """A node with a CNI runtime."""

    #: [break0] options
    conf = ''
    #: Function that starts an agent
    start_program: Any = staticmethod(program.start)

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        os.mkdir(BIN)
        self.configure(self.conf)
        self.runtime = Runtime(self.install())

    def configure(self, text: str) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\n' + text)

    def install(self) -> str:
        """Install the plugin and its dependencies, and return its path."""
        raise AssertionError('a subclass says how')

    def installed(self, *args: str) -> str:
        done = program.run(
            [program.BREAK0, '--config-file', CONF, 'cni-install',
             '--bin-dir', BIN,
             *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.assertEqual(0, done.returncode, done.stdout)
        return BIN + '/break0'

    def start_agent(self) -> subprocess.Popen[bytes]:
        """Start an agent, and wait until it serves CNI requests."""
        inode = self.socket_inode()
        with LOG.open('ab') as log:
            agent = self.start_program([program.BREAK0, '--config-file', CONF,
                                        'agent'], stderr=log)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        lab.until(lambda: self.socket_inode() != inode and is_served(),
                  self.log)
        return agent

    @staticmethod
    def socket_inode() -> Optional[int]:
        try:
            return os.stat(SOCKET).st_ino
        except FileNotFoundError:
            return None

    @staticmethod
    def log() -> str:
        return LOG.read_text()

    def assert_reachable(self, address: str, netns: str,
                         expected: bool = True) -> None:
        self.lab.settle()
        node = lab.NODE6 if ':' in address else lab.NODE
        self.assertEqual((expected, expected), (
            self.lab.ping(address), self.lab.ping(node, netns)), address)

    def assert_fails(self, code: int, pattern: str, command: Optional[str],
                     config: Any, **kwargs: Any) -> None:
        with self.assertRaises(Failed) as failed:
            self.runtime.call(command, config, **kwargs)
        self.assertEqual(code, failed.exception.code, failed.exception)
        self.assertRegex(failed.exception.text, pattern)
        self.assertNotIn('\n', failed.exception.text)


class WithShim:
    """The plugin is the shim, and an agent answers its requests."""

    def install(self: Any) -> str:
        self.agent = self.start_agent()
        path: str = self.installed('--shim', str(SHIM))
        return path


class InOneProcess:
    """The plugin runs without an agent."""

    def install(self: Any) -> str:
        path: str = self.installed('--without-agent')
        return path


class Given:
    """The plugin is another executable, with its server already running."""

    def install(self: Any) -> str:
        return os.environ['CNI_PLUGIN']
