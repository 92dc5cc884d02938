# SPDX-License-Identifier: Apache-2.0

"""From the release before to this one and back, with pods and connections."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, Callable, Iterator
import unittest

import psutil

from tests.functional import base
from tests import lab

#: Made by tests/earlier: the package when records had format 1.
EARLIER = os.path.join(os.path.dirname(os.path.dirname(sys.executable)),
                       'earlier')
CONF = '/run/kuryr.conf'
PODS = {'one': ('100.75.30.71', 'fd00:30::71'),
        'two': ('100.75.30.72', 'fd00:30::72')}


@unittest.skipUnless(os.path.isdir(EARLIER), 'the history of the repository '
                     'is not here, as in a shallow clone')
class TestUpgrade(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        with open(CONF, 'w') as file:
            file.write('[break0]\nmetrics_bind =\nguard = off\n')
        for name, addresses in PODS.items():
            self.lab.add_pod(name, *addresses)
        self.lab.settle()

    def command(self, *args: str, earlier: bool = False,
                code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-m', 'kuryr_break0',
             '--config-file', CONF, *args], text=True, cwd='/',
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self.environ(earlier))
        self.assertEqual(code, done.returncode, done.stdout)
        return done.stdout

    @staticmethod
    def environ(earlier: bool) -> dict[str, str]:
        return {**os.environ, 'PYTHONPATH': EARLIER if earlier
                else os.path.dirname(os.path.dirname(os.path.dirname(
                    os.path.abspath(__file__))))}

    @contextlib.contextmanager
    def agent(self, earlier: bool = False) -> Iterator[None]:
        with open('/run/agent.log', 'ab') as log:
            before = self.log().count('Watching ')
            agent = subprocess.Popen(
                [sys.executable, '-W', 'ignore', '-m', 'kuryr_break0',
                 '--config-file', CONF, 'agent'], cwd='/', stderr=log,
                env=self.environ(earlier))
        try:
            self.until(lambda: base.is_idle(psutil.Process(agent.pid))
                       and self.log().count('Watching ') > before)
            yield
        finally:
            agent.send_signal(signal.SIGTERM)
            self.assertEqual(0, agent.wait())

    @staticmethod
    def log() -> str:
        with open('/run/agent.log') as file:
            return file.read()

    def until(self, condition: Callable[[], Any]) -> None:
        lab.until(condition, self.log)

    @contextlib.contextmanager
    def connections(self) -> Iterator[Callable[[], None]]:
        """Connections both ways and in both families, and what uses them."""
        ends: list[tuple[socket.socket, socket.socket]] = []
        with contextlib.ExitStack() as stack:
            for family, node, pod in (
                    (socket.AF_INET, lab.NODE, PODS['one'][0]),
                    (socket.AF_INET6, lab.NODE6, PODS['one'][1])):
                for server_at, client_at, address in (
                        ('one', None, pod), (None, 'one', node)):
                    server = stack.enter_context(
                        self.lab.socket(family, netns=server_at))
                    server.bind((address, 0))
                    server.listen()
                    client = stack.enter_context(
                        self.lab.socket(family, netns=client_at))
                    client.connect(server.getsockname()[:2])
                    ends.append((client, stack.enter_context(
                        server.accept()[0])))

            def use() -> None:
                for client, served in ends:
                    served.settimeout(lab.PATIENCE)
                    client.sendall(b'ping')
                    self.assertEqual(b'ping', served.recv(4))
                    served.sendall(b'pong')
                    self.assertEqual(b'pong', client.recv(4))

            yield use

    def bind_pods(self, earlier: bool) -> None:
        for name, addresses in PODS.items():
            self.command('bind', *addresses, '--owner', name, '--netns',
                         '/run/netns/' + name, earlier=earlier)

    def versions(self) -> set[int]:
        found = set()
        directory = '/run/kuryr-break0/addresses'
        for name in os.listdir(directory):
            with open(os.path.join(directory, name)) as file:
                found.add(json.load(file)['version'])
        return found

    def test_up_and_down(self) -> None:
        addresses = {address for pod in PODS.values() for address in pod}
        with self.agent(earlier=True):
            self.bind_pods(earlier=True)
            self.assertEqual({1}, self.versions())
        with self.connections() as use:
            use()
            with self.agent():  # up
                use()
                self.command('sync')
                self.assertEqual(addresses, set(self.lab.routes()))
                self.assertEqual(0, len(self.problems(guard='off')))
                self.command('bind', PODS['two'][0], '--owner', 'two',
                             '--netns', '/run/netns/two')
                self.assertIn(2, self.versions())
                use()
            with self.agent():  # each process may be restarted
                self.lab.run('ip', 'link', 'del', 'break0')
                self.until(lambda: set(self.lab.routes()) == addresses)
                use()
            with self.agent(earlier=True):  # down
                use()
                # What it cannot read it leaves alone, and says so.
                self.assertIn('newer', self.command('doctor', earlier=True,
                                                    code=1))
                self.assertEqual(addresses, set(self.lab.routes()))
                use()
            with self.agent():  # and up again
                self.command('sync')
                self.assertEqual([], self.problems(guard='off'))
                use()

    def test_taken_away_and_given_back(self) -> None:
        self.bind_pods(earlier=True)
        with self.connections() as use:
            use()
            self.command('cleanup')
            self.assertIsNone(self.lab.link('break0'))
            self.bind_pods(earlier=False)
            use()
            self.assertEqual([], self.problems(guard='off'))
