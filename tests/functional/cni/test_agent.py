# SPDX-License-Identifier: Apache-2.0

"""Tests the agent as the server of the CNI plugin, and the shim."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import termios
import threading
import time
from typing import Callable, Iterator
from unittest import mock

import psutil

from kuryr_break0.agent.cni_server import CNIServer
from tests.functional import base as lab_base
from tests.functional.cni import base
from tests.functional.cni.base import ID
from tests.functional.cni.base import network
from tests.functional.cni.base import SOCKET
from tests.support import lab
from tests.support import program

#: Seconds within which the shim must end if it gets no complete answer
PATIENCE = 12


class ShimTestCase(base.CNITestCase):
    """An installed shim, without an agent."""

    def install(self) -> str:
        return self.installed('--shim', str(base.SHIM))

    def setUp(self) -> None:
        super().setUp()
        self.lan = network(version='1.1.0')
        self.config = self.runtime.single(self.lan, previous={
            'cniVersion': '1.1.0', 'ips': []})


class TestWithoutAgent(ShimTestCase):

    def test_says_to_try_again_at_once(self) -> None:
        began = time.monotonic()
        for command in ('ADD', 'DEL', 'CHECK', 'GC'):
            self.assert_fails(
                11, 'does not listen on %s. Start it' % SOCKET, command,
                self.config, netns='/run/netns/lan')
        self.assertLess(time.monotonic() - began, PATIENCE)

    def test_status_follows_strict(self) -> None:
        self.assertIsNone(self.runtime.call('STATUS', self.config))
        self.assertIsNone(self.runtime.call('STATUS', {
            **self.config, 'strict': False}))
        self.assert_fails(11, 'does not listen', 'STATUS', {
            **self.config, 'strict': True})

    def test_version(self) -> None:
        for config, version in ((b'', '1.1.0'),
                                ({'cniVersion': '0.4.0'}, '0.4.0')):
            answer = self.runtime.call('VERSION', config)
            self.assertEqual(version, answer['cniVersion'])
            self.assertEqual(['0.3.1', '0.4.0', '1.0.0', '1.1.0'],
                             answer['supportedVersions'])

    def test_version_of_an_error(self) -> None:
        for given, expected in (('0.4.0', '0.4.0'), ('x"y', '1.1.0'),
                                ('1' * 40, '1.1.0'), ('', '1.1.0')):
            with self.assertRaises(base.Failed) as failed:
                self.runtime.call('ADD', {**self.config,
                                          'cniVersion': given})
            self.assertEqual(expected,
                             failed.exception.answer['cniVersion'])

    def test_socket_of_the_configuration(self) -> None:
        for path in ('/run/other.sock', '/run/with space'):
            self.assert_fails(11, 'not listen on ' + path, 'ADD',
                              {**self.config, 'socket': path})
        # A nested "socket", or one in a string, is not the plugin's key.
        for keys in ({'x': {'socket': '/run/no'}}, {'x': '"socket": "/run"'},
                     {'x': ['socket', ':', '/run/no']}):
            self.assert_fails(11, SOCKET, 'ADD', {**keys, **self.config})
        for wrong in ('relative', '', 7, None, [], '/' + 'x' * 4096,
                      '/run/\n', '/run/"'):
            with self.subTest(socket=wrong):
                self.assert_fails(7, 'socket must be', 'ADD',
                                  {**self.config, 'socket': wrong})

    def test_input_that_is_too_large(self) -> None:
        self.assert_fails(6, 'more than 1 MiB', 'ADD', b' ' * 2 ** 21)

    def test_socket_that_is_left_over(self) -> None:
        os.mkdir('/run/kuryr-break0', 0o700)
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(SOCKET)
        self.assert_fails(11, 'does not listen', 'ADD', self.config)
        self.start_agent()
        self.assertIsNone(self.runtime.call('STATUS', {
            **self.config, 'strict': True}))

    def hanging(self, answer: bytes, pattern: str, plugin: str,
                closes: bool) -> float:
        """Run a shim with a server whose answer is incomplete or malformed.

        :param answer: all bytes that the server sends
        :param pattern: regular expression for the shim's error before the path
        :param plugin: path of the shim
        :param closes: whether the server closes the connection after the
            answer; otherwise it keeps the connection open
        :returns: seconds until the shim ends
        """
        with socket.socket(socket.AF_UNIX) as server:
            server.bind('/run/hanging')
            server.listen()
            accepted = []

            def serve() -> None:
                client, _ = server.accept()
                accepted.append(client)
                client.sendall(answer)
                if closes:
                    client.close()

            thread = threading.Thread(target=serve)
            thread.start()
            began = time.monotonic()
            self.assert_fails(11, pattern + ' on /run/hanging', 'ADD',
                              {**self.config, 'socket': '/run/hanging'},
                              plugin=plugin)
            thread.join()
        os.unlink('/run/hanging')
        return time.monotonic() - began

    def test_agent_that_never_answers(self) -> None:
        impatient = '/run/impatient'
        # Compile as the Makefile does: on a minimal Debian, gcc has only the
        # headers of musl.
        compiler = shutil.which('musl-gcc') or 'cc'
        program.run([compiler, '-DPATIENCE=2', '-static', '-o', impatient,
                     base.SHIM_SOURCE], check=True)
        for answer in (b'', b'0 10\nshort'):
            self.assertLess(self.hanging(
                answer, 'has not answered within 2 seconds', impatient,
                closes=False), PATIENCE, answer)

    def test_answers_that_are_cut_off(self) -> None:
        for answer in (b'', b'0 10\nshort', b'nonsense\n', b'0', b'\n',
                       b'0 -5\n{}', b'0 99999999\n{}'):
            self.assertLess(self.hanging(
                answer, 'closed the connection before the end of its answer',
                self.runtime.plugin, closes=True), PATIENCE, answer)


class TestServer(base.WithShim, ShimTestCase):

    def install(self) -> str:
        return base.WithShim.install(self)

    def test_is_for_this_user_only(self) -> None:
        found = os.stat(SOCKET)
        self.assertEqual(0o600, stat.S_IMODE(found.st_mode))
        self.assertEqual(os.geteuid(), found.st_uid)

    def test_is_made_again(self) -> None:
        os.unlink(SOCKET)
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for_socket()
        self.assertIsNone(self.runtime.call('STATUS', {
            **self.config, 'strict': True}))

    def wait_for_socket(self) -> None:
        lab.until(base.is_served, self.log)

    def test_second_agent_leaves_it(self) -> None:
        inode = self.socket_inode()
        with open('/run/second.log', 'wb') as log:
            second = program.start([
                program.BREAK0, '--config-file', base.CONF, 'agent'],
                stderr=log)
        self.addCleanup(second.wait)
        self.addCleanup(second.kill)
        lab.until(lambda: 'another agent listens there. Stop one of them'
                  in open('/run/second.log').read())
        second.terminate()
        second.wait()
        self.assertEqual(inode, self.socket_inode())

    def test_ends_with_the_agent(self) -> None:
        for _ in range(5):
            self.agent.terminate()
            self.assertEqual(0, self.agent.wait())
            self.assertFalse(os.path.exists(SOCKET))
            self.agent = self.start_agent()
        self.assertIn('The agent ends', self.log())
        self.assertNotIn('WARNING', self.log())

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(lab.PATIENCE)
            client.connect(SOCKET)
            yield client

    def test_clients_that_send_nonsense_or_nothing(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(self.connected())
            for data in (b'\0', b'\0\0', b'CNI_COMMAND=ADD', b'=\0=\0\0',
                         b'\xff' * 10 + b'\0\0{}', b'x' * 2 ** 21,
                         b'CNI_COMMAND=ADD\0\0{}'):
                client = stack.enter_context(self.connected())
                with contextlib.suppress(OSError):
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)

        def is_ready() -> bool:
            with contextlib.suppress(base.Failed):
                self.runtime.call('STATUS', {**self.config, 'strict': True})
                return True
            return False

        lab.until(is_ready)  # silent clients delay other requests by 3 s
        self.assertNotIn('Traceback', self.log())

    def test_an_abandoned_add_is_undone(self) -> None:
        netns = self.lab.add_netns('one')
        add = self.add_of(netns)
        # The client closes its connection early, like a killed runtime.
        with lab_base.locked():
            with self.connected() as client, lab_base.until_opened(
                    '/run/kuryr-break0/lock'):
                client.sendall(add)
                client.shutdown(socket.SHUT_WR)
        lab.until(lambda: 'Undoing the ADD' in self.log() and not self.bound(),
                  self.log)
        self.assertEqual({}, self.lab.routes())

    def add_of(self, netns: str) -> bytes:
        """Attach a macvlan, and return the bytes of the ADD request."""
        previous = self.runtime.macvlan('ADD', network(), netns)
        return b'\0'.join([
            b'CNI_COMMAND=ADD', b'CNI_CONTAINERID=' + ID.encode(),
            b'CNI_IFNAME=eth0', b'CNI_NETNS=' + netns.encode(),
            b'CNI_PATH=/x', b'', json.dumps(self.runtime.single(
                network(), previous=previous)).encode()])

    @staticmethod
    def is_read(client: socket.socket) -> bool:
        """Return whether the other end has read all sent bytes."""
        return not any(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))

    def test_an_abandoned_add_and_the_next_one(self) -> None:
        add = self.add_of(self.lab.add_netns('one'))
        for number in range(1, 21):
            with self.connected() as following:
                with lab_base.locked():
                    with self.connected() as client, lab_base.until_opened(
                            '/run/kuryr-break0/lock'):
                        client.sendall(add)
                        client.shutdown(socket.SHUT_WR)
                        # A sync of the agent also opens the lock file, so
                        # wait until the server has read this request.
                        lab.until(lambda: self.is_read(client))
                    following.sendall(add)
                    following.shutdown(socket.SHUT_WR)
                self.assertEqual(b'0 ', following.makefile('rb').read()[:2])
            lab.until(lambda: self.log().count('Undoing the ADD') == number,
                      self.log)
            self.assertEqual(2, len(self.bound()), self.log())
            self.assertEqual(self.bound(), set(self.lab.routes()))
            # Taking the lock waits for a pending undo.
            with lab_base.locked():
                self.assertEqual(self.bound(), set(self.lab.routes()))

    def test_killed_and_restarted_in_a_burst(self) -> None:
        """100 ADDs and DELs, repeated on errors, survive agent restarts."""
        names = ['c%d' % number for number in range(50)]
        ending = threading.Event()
        errors: list[str] = []

        def attach(own: list[str], listed: dict[str, object]) -> None:
            for name in own:
                netns = '/run/netns/' + name
                previous = {'cniVersion': '1.0.0', 'ips': [
                    {'address': address[name] + '/24'}]}
                config = self.runtime.single(listed, previous=previous)
                self.again('ADD', config, name, netns, errors)
                if int(name[1:]) % 2:
                    self.again('DEL', config, name, netns, errors)

        address = {}
        for number, name in enumerate(names):
            address[name] = '100.75.30.%d' % (100 + number)
            self.lab.add_pod(name, address[name])
        threads = [threading.Thread(target=attach, args=(
            names[start::4], network())) for start in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            time.sleep(0.15)
            self.agent.kill()
            self.agent.wait()
            self.agent = self.start_agent()
        for thread in threads:
            thread.join()
        ending.set()
        self.assertEqual([], [each for each in errors
                              if not each.startswith('11 ')])
        left = {address[name] for name in names if not int(name[1:]) % 2}
        self.assertEqual(left, self.bound())
        # sync exits with 1: after a DEL, a container exists but is not bound.
        self.lab.run(program.BREAK0, '--config-file', base.CONF, 'sync',
                     check=False)
        self.assertEqual(left, set(self.lab.routes()))
        self.assertEqual([], self.problems())
        for name in names[:4:2]:
            self.assertTrue(self.lab.ping(address[name]))
            self.assertTrue(self.lab.ping(lab.NODE, name))

    def again(self, command: str, config: object, container: str,
              netns: str, errors: list[str]) -> None:
        def is_done() -> bool:
            try:
                self.runtime.call(command, config, container=container,
                                  ifname='eth0', netns=netns)
            except base.Failed as err:
                errors.append('%d %s' % (err.code, err.text))
                return False
            return True

        try:
            lab.until(is_done)
        except AssertionError as err:  # unittest ignores errors of threads
            errors.append('%s of %s: %s' % (command, container, err))


class TestHindered(base.WithShim, ShimTestCase):
    """An agent that could not serve CNI requests serves them again."""

    #: Excludes repairs by the agent's timer
    conf = 'resync_interval = 3600\n'
    #: Bytes of each thread's stack, by RLIMIT_STACK: so large that a memory
    #: limit prevents new threads only.
    stack = 2 ** 28
    # RLIMIT_STACK applies only to processes that start later.
    start_program = staticmethod(subprocess.Popen)

    def install(self) -> str:
        limits = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (self.stack, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_STACK, limits)
        return base.WithShim.install(self)

    def start_hindered(self) -> subprocess.Popen[bytes]:
        """Start an agent while another one serves CNI requests."""
        with open('/run/second.log', 'wb') as log:
            agent = self.start_program([
                program.BREAK0, '--config-file', base.CONF, 'agent'],
                stderr=log)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.wait_for(lambda: 'another agent' in self.log_of_second())
        return agent

    @staticmethod
    def log_of_second() -> str:
        with open('/run/second.log') as file:
            return file.read()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        lab.until(condition, self.log)

    @contextlib.contextmanager
    def without_threads(self) -> Iterator[None]:
        """Prevent new threads of the agent within the block."""
        def limit(size: int) -> None:
            resource.prlimit(self.agent.pid, resource.RLIMIT_AS,
                             (size, resource.RLIM_INFINITY))

        limit(psutil.Process(self.agent.pid).memory_info().vms
              + self.stack // 2)
        try:
            yield
        finally:
            limit(resource.RLIM_INFINITY)

    def serves(self) -> bool:
        with contextlib.suppress(base.Failed):
            self.runtime.call('STATUS', {**self.config, 'strict': True})
            return True
        return False

    def health(self, path: str) -> tuple[int, str]:
        asking = http.client.HTTPConnection('127.0.0.1', 9817,
                                            timeout=lab.PATIENCE)
        with contextlib.closing(asking), \
                contextlib.suppress(ConnectionRefusedError):
            asking.request('GET', path)
            answer = asking.getresponse()
            return answer.status, answer.read().decode()
        return 0, 'it does not listen yet'

    def test_no_thread_can_be_started_later(self) -> None:
        netns = self.lab.add_netns('one')
        with self.without_threads():
            with contextlib.suppress(base.Failed):
                self.runtime.add(network(), netns)
        self.wait_for(self.serves)
        self.runtime.remove(network(), netns)
        self.runtime.add(network(), netns)
        self.assertEqual(2, len(self.bound()))
        self.assertEqual((200, 'ok\n'), self.health('/livez'))

    def test_livez_fails_where_a_restart_helps(self) -> None:
        self.agent.terminate()
        self.agent.wait()
        with contextlib.ExitStack() as stack:
            # A new agent has no ended thread whose stack it could reuse.
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(SOCKET)
            other.listen()
            self.agent = self.start_hindered()
            self.wait_for(lambda: self.health('/healthz') == (
                503, 'CNI requests are not served: %s: another agent listens '
                'there. Stop one of them: a node needs one.\n' % SOCKET))
            self.assertEqual((200, 'ok\n'), self.health('/livez'))
            stack.enter_context(self.without_threads())
            other.close()
            self.wait_for(lambda: "can't start new thread"
                          in self.log_of_second())
            status, text = self.health('/livez')
            self.assertEqual(503, status)
            self.assertIn("can't start new thread: 0 of 4 threads are running",
                          text)
        for path in ('/livez', '/healthz'):
            self.wait_for(lambda: self.health(path) == (200, 'ok\n'))
        self.assertTrue(self.serves())
        self.assertEqual(1, self.log_of_second().count(
            "can't start new thread"))

    def test_second_agent_serves_when_the_first_ends(self) -> None:
        self.start_hindered()
        time.sleep(2)  # the second agent retries meanwhile
        self.assertTrue(self.serves())
        self.agent.terminate()
        self.assertEqual(0, self.agent.wait())
        self.wait_for(self.serves)
        self.assertNotIn('was not answered', self.log())


class TestServerInThisProcess(lab_base.LabTestCase):

    def test_a_socket_that_can_never_be_bound(self) -> None:
        server = CNIServer()
        self.addCleanup(server.close)
        options = lab_base.options()
        os.makedirs(SOCKET + '/in the way')
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            server.listen(options)
            server.listen(options)
        self.assertEqual(1, len(logs.output))
        self.assertIn('Is a directory', server.describe_failure() or '')
        self.assertIsNone(server.describe_hang())  # a restart would not help

    def test_a_path_that_is_too_long_for_a_socket(self) -> None:
        """The agent serves in deep directories: sun_path has 108 bytes."""
        for length in (85, 86, 100, 107, 108, 109, 1000):
            directory = '/run/' + 'x' * (length % 250) + '/y' * (length // 250)
            options = lab_base.options(state_dir=directory)
            os.makedirs(directory, 0o700)
            server = CNIServer()
            with contextlib.closing(server), self.subTest(directory):
                server.listen(options)
                self.assertIsNone(server.describe_failure())
                self.assertTrue(server.is_complete)
                base.Runtime(str(base.SHIM)).call('STATUS', {
                    'cniVersion': '1.1.0', 'name': 'lan', 'type': 'break0',
                    'strict': True, 'socket': directory + '/cni.sock'})
                other = CNIServer()
                with self.assertLogs('kuryr_break0', 'ERROR'):
                    other.listen(options)
                self.assertIn('another agent listens',
                              other.describe_failure() or '')
            self.assertNotIn('cni.sock', os.listdir(directory))

    def test_threads_that_die_are_replaced(self) -> None:
        server = CNIServer()
        self.addCleanup(server.close)
        self.assertIsNotNone(server.describe_failure())
        options = lab_base.options()
        os.mkdir(options.state_dir, 0o700)
        server.listen(options)
        self.assertIsNone(server.describe_failure())
        with mock.patch.object(server, '_serve_client',
                               side_effect=MemoryError), \
                mock.patch.object(threading, 'excepthook'):
            def is_stuck() -> bool:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(SOCKET)
                return server.describe_hang() is not None

            lab.until(is_stuck)
            self.assertEqual(server.describe_failure(), server.describe_hang())
        server.listen(options)
        self.assertIsNone(server.describe_failure())
        self.assertTrue(server.is_complete)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(SOCKET)
            client.sendall(b'CNI_COMMAND=VERSION\0\0{}')
            client.shutdown(socket.SHUT_WR)
            self.assertTrue(client.recv(99).startswith(b'0 '))


class TestAnswers(base.WithShim, base.CNITestCase):
    """The agent's options determine its answers."""

    conf = 'allowed_cidrs = 10.0.0.0/8\nresync_interval = 3600\n'

    def test_address_that_is_not_allowed(self) -> None:
        netns = self.lab.add_netns('one')
        listed = network(subnets=('100.75.30.128/25',))
        self.runtime.add(listed, netns)  # succeeds: the container must start
        self.assertEqual({}, self.lab.routes())
        self.assertIn('allowed_cidrs', self.log())
        with self.assertRaises(base.Failed) as failed:
            self.runtime.check(listed, netns)
        self.assertIn('is missing', failed.exception.text)
        self.runtime.remove(listed, netns)
        strict = network(subnets=('100.75.30.128/25',), strict=True)
        with self.assertRaises(base.Failed) as failed:
            self.runtime.add(strict, netns)
        self.assertEqual(101, failed.exception.code)
        self.assertEqual(set(), self.bound())

    def test_switched_off(self) -> None:
        self.configure('enabled = false\n')
        self.agent.send_signal(signal.SIGHUP)
        lab.until(lambda: 'Read the configuration again' in self.log()
                  and lab_base.is_idle(psutil.Process(self.agent.pid)),
                  self.log)
        netns = self.lab.add_netns('one')
        self.runtime.add(network(), netns)
        self.runtime.check(network(), netns)
        self.assertEqual(set(), self.bound())
        self.runtime.remove(network(), netns)


class TestInvalidOptions(base.InOneProcess, base.CNITestCase):

    def test_are_answered_in_json(self) -> None:
        for text, pattern in (('addr = nonsense', 'addr'),
                              ('device = a b', 'device')):
            self.configure(text)
            self.assert_fails(7, pattern, 'ADD', self.runtime.single(
                network(), previous={'ips': []}), netns='/run/netns/lan')
        with open(base.CONF, 'w') as file:
            file.write('nonsense')
        self.assert_fails(7, 'kuryr.conf', 'ADD', {}, netns='/run/netns/lan')
