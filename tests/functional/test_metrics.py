# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import threading
import time
from typing import Any, Callable, Iterator
from unittest import mock

from prometheus_client import core
from prometheus_client import registry
import psutil

from kuryr_break0.agent import http
from kuryr_break0.agent.metrics import Metrics
from kuryr_break0.engine import actual
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.functional.metrics_base import CONF
from tests.functional.metrics_base import LOG
from tests.functional.metrics_base import MAC
from tests.functional.metrics_base import MetricsTestCase
from tests.support import lab
from tests.support import metrics
from tests.support import monitoring
from tests.support import program


class TestAddresses(MetricsTestCase):

    def assert_addresses(self, **expected: int) -> None:
        for name, value in expected.items():
            self.wait_for_value(value, 'addresses_' + name)

    def test_without_break0(self) -> None:
        self.start()
        self.assert_addresses(desired=0, routed=0, foreign=0, out_of_sync=0)
        self.assertEqual(0, self.value('device_up'))

    def test_bound(self) -> None:
        self.bind(POD, OTHER_POD)
        self.start()
        self.assert_addresses(desired=2, routed=2, foreign=0, out_of_sync=0)
        self.assertEqual(2, self.value('ledger_records'))
        self.assertEqual(1, self.value('device_up'))
        # The agent follows later binds and unbinds.
        self.unbind(OTHER_POD)
        self.assert_addresses(desired=1, routed=1, foreign=0, out_of_sync=0)

    def test_foreign(self) -> None:
        self.bind(POD, OTHER_POD)
        self.start()
        self.lab.run('ip', 'route', 'replace', POD, 'dev', 'lo')
        self.assert_addresses(desired=2, routed=1, foreign=1, out_of_sync=1)
        self.lab.run('ip', 'route', 'del', POD, 'dev', 'lo')
        self.assert_addresses(desired=2, routed=2, foreign=0, out_of_sync=0)

    def test_an_entry_that_cannot_be_read(self) -> None:
        self.bind(POD, OTHER_POD)
        with open('/run/kuryr-break0/addresses/%s.json' % POD, 'w') as file:
            file.write('damaged')
        self.start()
        self.assert_addresses(desired=1, out_of_sync=1)
        self.assertEqual(1, self.value('ledger_records'))
        self.assertEqual(1, self.value('ledger_unreadable_records'))

    def test_they_are_looked_at_once_after_a_sync(self) -> None:
        self.bind(POD)
        self.start()
        self.assert_addresses(out_of_sync=0)
        # The agent ascribes a new route with our protocol to a bind.
        self.lab.run('ip', 'route', 'add', OTHER_POD, 'dev', 'break0',
                     'proto', '176')
        self.wait_for(lambda: (self.value('events_received_total') or 0) > 0)
        self.assert_addresses(out_of_sync=0)
        self.agent.send_signal(signal.SIGHUP)
        self.assert_addresses(out_of_sync=1)

    def test_no_figures_where_nothing_can_be_read(self) -> None:
        os.makedirs('/run/state')
        with open('/run/state/addresses', 'w'):
            pass
        self.start('state_dir = /run/state')
        self.assertIsNone(self.value('addresses_desired'))
        self.assertEqual(1, self.value('sync_failures_total'))
        self.assertEqual(
            0, self.value('sync_last_success_timestamp_seconds'))


class TestRepairs(MetricsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(POD, netns=self.netns, mac_of_pod=MAC)

    def fault(self, expected: dict[str, int], *command: str) -> None:
        """Cause a fault and expect these repairs, and no others."""
        before = {reason: self.repairs(reason) for reason in (
            'device', 'route', 'neighbour', 'pod', 'unclaimed',
            'sandbox_gone', 'released', 'rebuilt')}
        self.lab.run(*command)
        for reason, times in expected.items():
            self.wait_for_value(before[reason] + times, 'repairs_total',
                                reason=reason)
        self.wait_for_value(0, 'addresses_out_of_sync')
        self.assertEqual(
            {reason: times + expected.get(reason, 0)
             for reason, times in before.items()},
            {reason: self.repairs(reason) for reason in before})

    def test_none(self) -> None:
        self.start()
        self.fault({}, 'true')

    def test_faults_with_an_event_of_the_kernel(self) -> None:
        self.start()
        self.fault({'route': 1}, 'ip', 'route', 'del', POD)
        self.fault({'neighbour': 1}, 'ip', 'neigh', 'del', POD, 'dev',
                   'break0')
        self.fault({'device': 1, 'route': 1, 'neighbour': 1},
                   'ip', 'link', 'del', 'break0')
        self.fault({'pod': 1}, 'ip', 'address', 'add', '100.75.30.52/32',
                   'dev', lab.PARENT)
        self.assertGreater(self.value('events_received_total') or 0, 3)
        self.assertEqual(0, self.value('events_lost_total'))
        self.assertEqual(0, self.value('sync_failures_total'))

    def test_faults_without_an_event(self) -> None:
        self.start('resync_interval = 1')
        self.fault({'device': 1}, 'sh', '-c',
                   'echo 0 >/proc/sys/net/ipv4/conf/break0/arp_filter')
        self.fault({'sandbox_gone': 1}, 'ip', 'netns', 'del', 'pod')

    def test_by_other_processes(self) -> None:
        # The sync command and a bind make repairs before the agent starts.
        self.lab.run('ip', 'route', 'del', POD)
        self.lab.run(program.BREAK0, 'sync')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.bind(OTHER_POD)
        self.start()
        self.assertEqual(2, self.repairs('route'))
        self.assertEqual(1, self.repairs('device'))
        self.assertEqual(2, self.value('bind_seconds_count'))

    def test_events_lost(self) -> None:
        self.bind(*('10.20.0.%d' % number for number in range(1, 250)))
        self.start()
        os.kill(self.agent.pid, signal.SIGSTOP)
        for _ in range(40):
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            self.lab.run('ip', 'link', 'set', 'break0', 'down')
            self.bind(OTHER_POD)
        os.kill(self.agent.pid, signal.SIGCONT)
        self.wait_for(lambda: self.value('events_lost_total'))


class TestBinds(MetricsTestCase):

    def test_many_processes(self) -> None:
        self.start()

        def life(number: int) -> None:
            for _ in range(10):
                self.bind('10.20.0.%d' % number)
                self.unbind('10.20.0.%d' % number)

        with base.patient():
            children = [base.in_child(lambda number=number: life(number))
                        for number in range(1, 9)]
        self.assertEqual([0] * 8, [base.wait_for(pid) for pid in children])
        self.wait_for_value(80, 'bind_seconds_count')
        self.wait_for_value(80, 'unbind_seconds_count')
        self.assertEqual(80, self.value('bind_seconds_bucket', le='+Inf'))
        self.assertGreater(self.value('bind_seconds_sum') or 0, 80 * 1e-4)
        self.assertEqual(0, self.value('bind_failures_total'))
        self.assertEqual(0, self.repairs('device'))

    def test_failures(self) -> None:
        self.start()
        with self.assertRaises(exceptions.ParentNotFound):
            self.bind(POD, parent='eth9')
        self.wait_for_value(1, 'bind_failures_total')
        self.assertEqual(1, self.value('bind_seconds_count'))
        with open('/run/kuryr-break0/addresses/%s.json' % POD, 'w') as file:
            file.write('{"version": 99}')
        with self.assertRaises(exceptions.LedgerUnavailable):
            self.unbind(POD)
        self.wait_for_value(1, 'unbind_failures_total')
        self.assertEqual(1, self.value('unbind_seconds_count'))

    def test_each_is_counted_once(self) -> None:
        # The restarted agent must not count the first bind again: Prometheus
        # takes the whole value of a restarted counter as an increase.
        self.bind(POD)
        self.start()
        self.assertEqual(1, self.value('bind_seconds_count'))
        self.agent.kill()
        self.agent.wait()
        self.bind(OTHER_POD)
        self.start()
        self.assertEqual(1, self.value('bind_seconds_count'))


class TestHealth(MetricsTestCase):

    def health(self, path: str = '/healthz') -> metrics.Answer:
        answer = self.get(path)
        assert answer is not None
        return answer

    def test_well(self) -> None:
        self.bind(POD)
        self.start()
        self.assertEqual((200, 'ok\n'), self.health())
        self.assertAlmostEqual(
            time.time(),
            self.value('sync_last_success_timestamp_seconds') or 0, delta=60)

    def test_syncs_that_fail(self) -> None:
        self.bind(POD)
        self.start('resync_interval = 1')
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        # One failed sync leaves the agent healthy: binds do not need a sync.
        self.wait_for(lambda: self.value('sync_failures_total'))
        self.wait_for(lambda: self.health()[0] == 503)
        self.assertRegex(
            self.health()[1],
            r'\ANo sync has succeeded for \d+ s: The parent interface %s '
            r'does not exist on this node.*\n\Z' % lab.PARENT)
        # Restarting the agent would not bring the parent back.
        self.assertEqual((200, 'ok\n'), self.health('/livez'))
        self.lab.add_nic()
        self.wait_for(lambda: self.health() == (200, 'ok\n'))

    def test_stuck(self) -> None:
        own = Metrics(base.options(resync_interval=10))
        for error in (None, exceptions.ParentNotFound(parent='eth0')):
            now = time.monotonic()
            with mock.patch('time.monotonic', return_value=now):
                own.record_sync(0.1, error)
            with mock.patch('time.monotonic', return_value=now + 40):
                self.assertIsNone(own.describe_hang())
            with mock.patch('time.monotonic', return_value=now + 41):
                self.assertEqual('No sync has ended for 41 s',
                                 own.describe_hang())

    def test_a_lock_that_is_not_free(self) -> None:
        self.bind(POD)
        # An attempt waits ten seconds for the lock, and longer on a busy
        # machine.
        self.start('resync_interval = 3')
        own = base.options()
        with ledger.Ledger(own.state_dir).lock():
            # Each attempt ends with a time-out, so the agent stays alive.
            self.wait_for(lambda: self.health()[0] == 503)
            self.assertEqual((200, 'ok\n'), self.health('/livez'))
        self.wait_for(lambda: self.health() == (200, 'ok\n'))

    def test_none_that_succeeded(self) -> None:
        self.bind(POD)
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.start()
        status, text = self.health()
        self.assertEqual(503, status)
        self.assertIn('No sync has succeeded yet: The parent', text)


class TestServer(MetricsTestCase):

    def listening(self) -> list[tuple[str, int]]:
        return [tuple(each.laddr) for each
                in psutil.Process(self.agent.pid).connections('inet')
                if each.status == psutil.CONN_LISTEN]

    def test_loopback_by_default(self) -> None:
        self.start()
        self.assertEqual([('127.0.0.1', 9817)], self.listening())

    def test_ipv6(self) -> None:
        self.where = '[::1]:80'
        self.start('metrics_bind = [::1]:80')
        self.assertEqual([('::1', 80)], self.listening())

    def test_ipv6_of_a_link(self) -> None:
        self.lab.run('ip', 'address', 'add', 'fe80::9/64', 'dev', 'lo',
                     'nodad')
        self.where = '[fe80::9%lo]:80'
        self.start('metrics_bind = ' + self.where)
        self.assertEqual(80, self.listening()[0][1])

    def test_none(self) -> None:
        self.bind(POD)
        self.start('metrics_bind =', serving=False)
        self.wait_for(lambda: 'Watching ' in self.log())
        self.lab.run('ip', 'route', 'del', POD)
        self.wait_for(lambda: POD in self.lab.routes())
        self.assertEqual([], self.listening())

    def test_a_port_that_another_has(self) -> None:
        self.bind(POD)
        with socket.create_server(('127.0.0.1', 9817)):
            self.start('resync_interval = 1', serving=False)
            self.wait_for(lambda: 'cannot be served' in self.log())
            self.lab.run('ip', 'route', 'del', POD)
            self.wait_for(lambda: POD in self.lab.routes())
            # Wait for two syncs by the timer: the kernel sends no event for a
            # sysctl.
            for _ in range(2):
                kernel.write_sysctl('ipv4/conf/break0/arp_filter', 0)
                self.wait_for(lambda: kernel.read_sysctl(
                    'ipv4/conf/break0/arp_filter') == 1)
        error, = [line for line in self.log().splitlines()
                  if ' ERROR ' in line]
        for text in ('127.0.0.1:9817', 'already in use', 'ss -ltnp',
                     '[break0] metrics_bind'):
            self.assertIn(text, error)
        # The agent binds the port as soon as it is free.
        self.wait_for(self.get)

    def test_another_port_by_sighup(self) -> None:
        self.start()
        self.configure('metrics_bind = 127.0.0.1:9818')
        self.agent.send_signal(signal.SIGHUP)
        self.where = '127.0.0.1:9818'
        self.wait_for(self.get)
        self.assertEqual([('127.0.0.1', 9818)], self.listening())

    def test_sighup_closes_no_port_that_stays(self) -> None:
        self.start()

        def sockets() -> list[str]:
            return [os.readlink('/proc/%d/fd/%d' % (self.agent.pid, each.fd))
                    for each in psutil.Process(self.agent.pid).connections()
                    if each.status == psutil.CONN_LISTEN]

        before = sockets()
        self.assertEqual(1, len(before))
        syncs = self.value('sync_seconds_count') or 0
        self.configure('resync_interval = 1000')
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for(
            lambda: 'Read the configuration again' in self.log()
            and (self.value('sync_seconds_count') or 0) > syncs)
        self.assertEqual(before, sockets())

    def test_a_silent_client_delays_no_other(self) -> None:
        self.start()
        silent = [socket.create_connection(('127.0.0.1', 9817))
                  for _ in range(10)]
        self.assertEqual(0, self.value('events_lost_total'))
        self.agent.terminate()
        self.assertEqual(0, self.agent.wait(lab.PATIENCE))
        for each in silent:
            each.close()

    def test_an_unknown_path_or_request(self) -> None:
        self.start()
        self.assertEqual((404, 'See /metrics, /healthz and /livez\n'),
                         self.get('/'))
        with socket.create_connection(('127.0.0.1', 9817)) as client:
            client.sendall(b'nonsense\r\n\r\n')
            client.recv(1)
        self.assertEqual(0, self.value('events_lost_total'))
        self.assertNotIn('Traceback', self.log())

    def test_its_size(self) -> None:
        self.bind(*('10.20.0.%d' % number for number in range(1, 251)))
        self.start()
        process = psutil.Process(self.agent.pid)
        for _ in range(5):
            self.lab.run('ip', 'link', 'del', 'break0')
            self.wait_for(lambda: len(self.lab.routes()) == 250)
            self.wait_for_value(250, 'addresses_routed')
        self.assertLess(process.memory_info().rss, 64 * 2 ** 20)
        self.wait_for(lambda: base.is_idle(process))


class TestHostile(MetricsTestCase):
    """Unprivileged processes attack the port of the metrics."""

    #: timeoutSeconds of the liveness probe in etc/kubernetes/agent.yaml
    probe_timeout = 10

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD)
        self.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))

    def connect(self, data: bytes = b'') -> socket.socket:
        host, _, port = self.where.rpartition(':')
        made = socket.create_connection((host.strip('[]'), int(port)), 5)
        self.addCleanup(made.close)
        if data:
            made.sendall(data)
        return made

    def has_ended(self, client: socket.socket) -> bool:
        """Return whether the agent has closed its end of a connection."""
        poll = select.poll()
        poll.register(client, select.POLLRDHUP)
        return bool(poll.poll(0))

    @contextlib.contextmanager
    def attacked(self, connections: int, first: bytes, then: bytes = b'',
                 prepare: Callable[[socket.socket], None] = lambda _: None
                 ) -> Iterator[None]:
        """Keep connections of slow clients open within the block.

        :param first: the data that each connection sends at its beginning
        :param then: the data that each connection sends every second
        :param prepare: is called with each socket before it connects
        """
        host, _, port = self.where.rpartition(':')
        stop, begun = threading.Event(), threading.Event()
        unsent: dict[socket.socket, bytes] = {}

        def attack() -> None:
            while not stop.is_set():
                while len(unsent) < connections:
                    client = socket.socket()
                    prepare(client)
                    client.setblocking(False)
                    client.connect_ex((host, int(port)))
                    unsent[client] = first
                for client, data in list(unsent.items()):
                    try:
                        sent = client.send(data or then)
                        unsent[client] = data[sent:]
                    except OSError:
                        if self.has_ended(client):
                            client.close()
                            del unsent[client]
                begun.set()
                stop.wait(1)
            for client in unsent:
                client.close()

        attacker = threading.Thread(target=attack)
        attacker.start()
        try:
            begun.wait()
            yield
        finally:
            stop.set()
            attacker.join()

    def assert_alive(self) -> None:
        """Expect answers to liveness probes, within their time-out.

        If the processors are busy, a probe can be the oldest connection when
        another connection arrives, and the agent can close the probe. kubelet
        restarts the agent after three such probes (failureThreshold).
        """
        for _ in range(5):
            answers = (metrics.get('/livez', self.where, self.probe_timeout)
                       for _ in range(3))
            self.assertIn((200, 'ok\n'), answers)
            time.sleep(0.3)

    def test_slow_headers(self) -> None:
        for connections in 40, 400:
            with self.subTest(connections), self.attacked(
                    connections, b'GET /livez HTTP/1.1\r\nX: ', b'x'):
                self.assert_alive()

    def test_bodies(self) -> None:
        for connections in 40, 400:
            for length, body in (1, b''), (300, b'x'):
                with self.subTest(connections, length=length), self.attacked(
                        connections, b'POST /livez HTTP/1.1\r\n'
                        b'Content-Length: %d\r\n\r\n' % length, body):
                    self.assert_alive()

    def test_silence(self) -> None:
        for connections in 40, 400:
            for first in b'', b'GET /livez':
                with self.subTest(connections, first=first), self.attacked(
                        connections, first):
                    self.assert_alive()

    def test_answers_that_are_not_read(self) -> None:
        def shrink(client: socket.socket) -> None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

        # One answer is larger than the send buffer.
        self.lab.run('sysctl', '-w', 'net.ipv4.tcp_wmem=4096 4096 4096')
        for connections in 40, 400:
            for requests in 1, 300:
                with self.subTest(connections, requests=requests), \
                        self.attacked(
                            connections, b'GET /metrics HTTP/1.1\r\n\r\n'
                            * requests, b'', shrink):
                    self.assert_alive()
        process = psutil.Process(self.agent.pid)
        # The agent does not keep the unsent answers in memory.
        self.assertLess(process.memory_info().rss, 80 * 2 ** 20)

    def test_one_request_at_a_time(self) -> None:
        request = b'GET /livez HTTP/1.1\r\n\r\n'
        with self.connect() as client:
            for _ in range(3):
                client.sendall(request[:-2])
                time.sleep(0.1)
                client.sendall(request[-2:])
                self.assertIn(b'\r\n\r\nok\n', self.answer(client))
        for first, then in ((request * 2, b''), (request[:-1], b'\nG')):
            with self.connect(first) as client:
                time.sleep(0.1)
                client.sendall(then)
                self.wait_for(lambda: self.has_ended(client))

    def answer(self, client: socket.socket) -> bytes:
        data = b''
        while not data.endswith(b'ok\n'):
            data += client.recv(2 ** 16)
        return data

    def test_each_request_ends(self) -> None:
        self.lab.run('sysctl', '-w', 'net.ipv4.tcp_wmem=4096 4096 4096')
        slow = self.connect(b'GET /livez HTTP/1.1\r\nX: ')
        reader = socket.socket()
        self.addCleanup(reader.close)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        reader.connect(slow.getpeername())
        reader.sendall(b'GET /metrics HTTP/1.1\r\n\r\n')

        def is_ended() -> bool:
            with contextlib.suppress(OSError):
                slow.send(b'x')
                reader.recv(1)
            return self.has_ended(slow)

        self.wait_for(is_ended)
        self.wait_for(lambda: not [
            each for each in psutil.Process(self.agent.pid).connections()
            if each.raddr == reader.getsockname()])

    def test_idle_connections_stop_no_repair(self) -> None:
        opened: list[socket.socket] = []
        with contextlib.suppress(OSError):
            for _ in range(1100):
                opened.append(self.connect())
        process = psutil.Process(self.agent.pid)
        self.assertLess(process.num_fds(), 100)
        self.lab.run('ip', 'route', 'del', POD)
        self.wait_for(lambda: POD in self.lab.routes())
        self.assert_alive()

    def test_long_headers_cost_no_memory(self) -> None:
        process = psutil.Process(self.agent.pid)
        before = process.memory_info().rss
        for _ in range(20):
            with contextlib.suppress(OSError):
                self.connect(b'GET / HTTP/1.1\r\nX: ' + b'x' * 2 ** 20)
        self.assertLess(process.memory_info().rss - before, 32 * 2 ** 20)


class TestExposition(base.LabTestCase):
    """Answers to requests for metrics at a high rate."""

    def setUp(self) -> None:
        super().setUp()
        self.own = Metrics(base.options())
        self.exposition = http.Exposition(self.own)

    def answer(self, query: str = '') -> str:
        made = self.exposition.answer({
            'REQUEST_METHOD': 'GET', 'PATH_INFO': '/metrics',
            'QUERY_STRING': query, 'HTTP_ACCEPT_ENCODING': 'gzip'})
        self.assertEqual('200 OK', made.status)
        return b''.join(made.body).decode()

    def test_a_part_of_a_processor(self) -> None:
        made = []

        class Slow(registry.Collector):

            def collect(self) -> list[core.Metric]:
                made.append(time.thread_time())
                while time.thread_time() < made[-1] + 0.01:
                    pass
                return []

        self.own.registry.register(Slow())
        made.clear()
        before = self.answer()
        self.assertIn('kuryr_break0_sync_failures_total 0.0\n', before)
        self.own.record_sync(0.1, exceptions.ParentNotFound(parent='eth9'))
        self.assertIn('kuryr_break0_sync_failures_total 1.0\n',
                      self.answer())
        for _ in range(200):
            self.answer()
        self.assertLess(len(made), 150)
        # A later request reads the figures again.
        self.own.record_sync(0.1, exceptions.ParentNotFound(parent='eth9'))
        lab.until(lambda: 'kuryr_break0_sync_failures_total 2.0\n'
                  in self.answer())

    def test_one_reads(self) -> None:
        before = self.answer()
        self.own.record_sync(0.1, None)
        reading, end = threading.Event(), threading.Event()

        def read(*args: Any) -> Any:
            reading.set()
            end.wait()

        with mock.patch.object(actual, 'read', read):
            thread = threading.Thread(target=self.answer)
            thread.start()
            reading.wait()
            self.assertEqual(before, self.answer())
            end.set()
            thread.join()

    def test_no_client_decides_for_the_next(self) -> None:
        self.assertIn('kuryr_break0_sync_failures_total',
                      self.answer('name[]=kuryr_break0_build_info'))


class TestNames(MetricsTestCase):
    """Rules, dashboard and manual name the metrics that the agent serves."""

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD)
        self.start()
        answer = self.get()
        assert answer is not None
        self.text = answer.text

    def test_the_manual_has_each_and_no_other(self) -> None:
        served = re.findall(r'^# TYPE (\S+) (\S+)$', self.text, re.M)
        manual = monitoring.read(monitoring.MONITORING)
        self.assertEqual(
            sorted(served), sorted(re.findall(
                r'^   \* - ``(\w+)``\n     - (\w+)$', manual, re.M)))
        reasons = re.findall(r'repairs_total{reason="(\w+)"', self.text)
        self.assertEqual(
            reasons, re.findall(r'^``(\w+)``\n    ', manual.split(
                '.. _repair-reasons:')[1], re.M))

    def test_rules_and_dashboard_have_no_other(self) -> None:
        # Some metrics have a TYPE line and no sample on this node.
        served = set(re.findall(r'^(?:# TYPE )?(\w+)', self.text, re.M))
        for path in (monitoring.RULES, monitoring.DASHBOARD,
                     monitoring.RULE_TESTS):
            used = set(re.findall(r'\b(?:kuryr_break0|process)_\w+',
                                  monitoring.read(path)))
            self.assertGreater(len(used), 5)
            self.assertEqual(set(), used - served, path)


class TestLog(MetricsTestCase):

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.log().splitlines()]

    def change(self) -> None:
        """Cause three repairs, and end the sandbox of a pod."""
        self.lab.run('ip', 'address', 'add', '100.75.30.52/32', 'dev',
                     lab.PARENT)
        self.wait_for(lambda: 'Configured' in self.log())
        self.lab.run('ip', 'route', 'del', POD)
        self.wait_for(lambda: POD in self.lab.routes())
        self.lab.del_netns('pod')
        self.wait_for(lambda: OTHER_POD not in self.lab.routes())
        kernel.write_sysctl('ipv4/conf/break0/arp_filter', 0)
        self.wait_for(lambda: kernel.read_sysctl(
            'ipv4/conf/break0/arp_filter') == 1)
        self.agent.terminate()
        self.agent.wait()

    def assert_told(self) -> None:
        """Expect one line for each change, with address, owner and device."""
        found = [(line['levelname'], line['message'])
                 for line in self.lines()]
        for text in (
                'Set the route of %s on break0 for sandbox-1/eth0' % POD,
                'Configured %s for sandbox-2/eth0 to reach the node'
                % OTHER_POD,
                'Sandbox sandbox-2/eth0 no longer exists; removed %s from '
                'break0' % OTHER_POD,
                'Repaired break0 on %s: arp_filter is 0, must be 1'
                % lab.PARENT):
            self.assertEqual(1, found.count(('INFO', text)), found)

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD)
        self.bind(OTHER_POD, owner=Owner('sandbox-2', 'eth0'),
                  netns=self.lab.add_pod('pod', OTHER_POD))

    def test_json(self) -> None:
        self.start('resync_interval = 1', default='use_json = true')
        self.change()
        self.assert_told()

    def test_json_by_a_logging_configuration(self) -> None:
        with open('/run/logging.conf', 'w') as file:
            file.write('''\
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = json
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = (%r,)
formatter = json
[formatter_json]
class = oslo_log.formatters.JSONFormatter
''' % LOG)
        self.configure('resync_interval = 1',
                       default='log_config_append = /run/logging.conf')
        self.agent = program.start([program.BREAK0, '--config-file', CONF,
                                    'agent'])
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.kill)
        self.wait_for(lambda: 'Watching ' in self.log())
        self.change()
        self.assert_told()
