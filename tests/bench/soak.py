# SPDX-License-Identifier: Apache-2.0

"""A soak test of hours: pods by Kuryr, CNI and discovery, kills and faults.

Each minute, containers start and end for 36 seconds with faults, and then for
10 seconds without faults, in which no request may fail. After each part, the
test pauses, and checks the invariants. The logs are in build/soak.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple, Optional

import psutil

from kuryr_break0.break0 import guard
from tests.bench import Broken
from tests.bench.cni import SHIM
from tests.bench import timed
from tests.functional.cni import base as cni
from tests.support import kuryr
from tests.support import lab
from tests.support import program

OPTIONS = """\
discover = true
allowed_cidrs = 100.75.30.0/24,fd00:30::/64
resync_interval = 10
"""
LOGS = pathlib.Path('build/soak')
STATE = '/run/kuryr-break0'
#: Configuration of agent and commands, without kuryr-daemon's log_file
CONF = '/run/break0.conf'
SUBNETS = ['%s/%d' % (lab.LAN, lab.PREFIX), lab.LAN6 + '/64']
NETWORK = cni.network()
#: Number of sandboxes by each way. The first sandbox of each way stays, to
#: measure how long faults interrupt its traffic.
SANDBOXES = 8
#: Seconds of churn with faults, of churn without faults, and until the
#: invariants must hold
FAULTS, CALM, ORDER = 36, 10, 60
#: Seconds after which the test, like an operator, deletes unclaimed entries
#: that a lost ledger has left
DOUBT = 10
#: Faults of the first minutes of each cycle. After them, agent and daemon live
#: until the end of the cycle, and must not grow in memory and open files.
KILLS = ('agent killed', 'agent restarted', 'daemon killed')
CYCLE, WITH_KILLS = 15, 3
MORE_MEMORY, MORE_FILES = 16, 12
#: The module of Python by which a worker of kuryr-daemon reads the registry of
#: pods, which is in another process
REGISTRY = 'multiprocessing/managers.py'
MIB = 2 ** 20


class Sandbox(NamedTuple):
    """A running pod or container.

    :ivar end: ends the pod or container, as its engine does
    """

    name: str
    addresses: tuple[str, ...]
    end: Callable[[], None]


class Way(abc.ABC):
    """A way to start containers."""

    name = ''
    #: The last part of the address of container number 0
    first = 0
    #: Whether a container is reachable when start() returns
    is_request = True

    def __init__(self, node: kuryr.Node) -> None:
        self.node = node
        self.busy = threading.Lock()
        self.live: dict[int, Sandbox] = {}
        self.times: list[float] = []

    @abc.abstractmethod
    def start(self, name: str, number: int) -> Sandbox:
        """Start a container.

        :raises Exception: if starting fails; nothing of the container is left
        """


class ByKuryr(Way):
    """Pods, bound by kuryr-daemon."""

    name = 'kuryr'
    first = 40

    def start(self, name: str, number: int) -> Sandbox:
        addresses = ('100.75.30.%d' % (self.first + number),
                     'fd00:30::%d' % (self.first + number))
        pod = self.node.add_pod(name, vif=kuryr.macvlan_vif(
            *addresses, subnets=SUBNETS))

        def end() -> None:
            self._request(pod, 'DEL')
            self.node.delete_pod(pod)
            self.node.lab.del_netns(name)

        try:
            self.times.append(timed(lambda: self._request(pod, 'ADD')))
        except Exception:
            _insist(end)
            raise
        return Sandbox(name, addresses, end)

    def _request(self, pod: kuryr.Pod, command: str) -> None:
        answer = self.node.request(pod, command)
        if answer.status not in (202, 204):
            raise Broken('%s is answered by %d: %s' % (
                command, answer.status, answer.body[:200]))


class ByCNI(Way):
    """Containers attached by the plugin macvlan and the shim of break0."""

    name = 'cni'

    def __init__(self, node: kuryr.Node) -> None:
        super().__init__(node)
        self.runtime = cni.Runtime(str(SHIM))

    def start(self, name: str, number: int) -> Sandbox:
        netns = self.node.lab.add_netns(name)

        def end() -> None:
            self.runtime.remove(NETWORK, netns, name)
            self.node.lab.del_netns(name)

        try:
            previous = self.runtime.macvlan('ADD', NETWORK, netns, name)
            self.runtime.results[NETWORK['name'], name, 'eth0'] = previous
            self.times.append(timed(lambda: self.runtime.call(
                'ADD', self.runtime.single(NETWORK, previous=previous),
                container=name, netns=netns)))
        except Exception:
            _insist(end)
            raise
        return Sandbox(name, tuple(cni.addresses(previous)), end)


class ByDiscovery(Way):
    """Containers without a request, bound by discovery."""

    name = 'found'
    first = 80
    is_request = False

    def start(self, name: str, number: int) -> Sandbox:
        addresses = ('100.75.30.%d' % (self.first + number),
                     'fd00:30::%d' % (self.first + number))

        def end() -> None:
            self.node.lab.del_netns(name)

        def is_routed() -> bool:
            return 'dev break0' in self.node.lab.run(
                'ip', 'route', 'get', addresses[0], check=False).stdout

        try:
            self.node.lab.add_pod(name, *addresses)
        except Exception:
            if os.path.exists('/run/netns/' + name):
                end()
            raise
        try:
            self.times.append(1000 * lab.until(is_routed))
        except Exception:
            end()
            raise
        return Sandbox(name, addresses, end)


def _insist(end: Callable[[], None]) -> None:
    """Repeat a DEL until it succeeds, like a runtime."""
    ends = time.monotonic() + lab.PATIENCE
    while True:
        try:
            return end()
        except (Broken, cni.Failed, OSError):
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


class Soak:
    """A node with containers by all ways, and the recorded problems."""

    def __init__(self, node: kuryr.Node) -> None:
        self.node = node
        self.lab = node.lab
        self.ways = [kind(node) for kind in (ByKuryr, ByCNI, ByDiscovery)]
        self.ending = threading.Event()
        self.calm = threading.Event()
        self.wrong: list[str] = []
        self.refused = self.deleted = 0
        self.lost = False
        self.interrupted: dict[str, list[float]] = {}
        self.with_kills = True
        self.next: list[str] = []  # faults
        self.agent = self._start_agent()
        self.faults: dict[str, Callable[[], object]] = {
            'break0 deleted': lambda: self._ip('link del break0'),
            'break0 down': lambda: self._ip('link set break0 down'),
            'routes flushed': lambda: self._ip('route flush dev break0',
                                               '-6 route flush dev break0'),
            'neighbours flushed': lambda: self._ip(
                'neighbour flush dev break0 nud permanent'),
            'guard deleted': lambda: self.lab.run(
                'nft', 'delete', 'table', 'netdev', guard.table_of('break0'),
                check=False),
            'state lost': self._lose_state,
            'parent down and up': self._parent_down,
            'agent killed': lambda: self._restart_agent(signal.SIGKILL),
            'agent restarted': lambda: self._restart_agent(signal.SIGTERM),
            'daemon killed': self._restart_daemon,
            'workers killed': self._kill_workers}
        self.foreign = self._foreign()

    # Events on the node

    def _ip(self, *commands: str) -> None:
        for command in commands:
            self.lab.run('ip', *command.split(), check=False)

    def _start_agent(self) -> subprocess.Popen[bytes]:
        with open(LOGS / 'agent.log', 'ab') as log:
            return subprocess.Popen(
                [program.BREAK0, '--config-file', CONF, 'agent'],
                stdout=log, stderr=log)

    def _lose_state(self) -> None:
        shutil.rmtree(STATE, ignore_errors=True)
        self.lost = True

    def _restart_agent(self, number: signal.Signals) -> None:
        self.agent.send_signal(number)
        self.agent.wait()
        self.agent = self._start_agent()

    def start_daemon(self) -> None:
        # A changed PYTHON* variable makes program.start() run a new Python.
        self.node.start_daemon(OPTIONS, PYTHONUNBUFFERED='1')

    def _restart_daemon(self) -> None:
        self.node.kill_daemon()
        self.start_daemon()

    def _kill_workers(self) -> None:
        for each in self._server().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _server(self) -> psutil.Process:
        return next(each for each in psutil.Process(
            self.node.daemon.pid).children(recursive=True)
            if 'server' in ' '.join(each.cmdline()))

    def _parent_down(self) -> None:
        self._ip('link set eth0 down', 'link set eth0 up',
                 'route replace default via ' + lab.LAN,
                 'address replace %s/64 dev eth0 nodad' % lab.NODE6,
                 'route replace default via ' + lab.LAN6)

    def _foreign(self) -> list[str]:
        """Return the listings of foreign entries, which must stay."""
        return [self.lab.run(*command.split()).stdout for command in (
            'ip route show dev other', 'ip neighbour show dev other',
            'nft list table inet other')]

    def churn(self, way: Way) -> None:
        """Start and end containers until the soak ends."""
        count = 0
        while not self.ending.wait(random.uniform(0.1, 0.6)):
            number = random.randrange(SANDBOXES)
            with way.busy:
                calm = self.calm.is_set()
                try:
                    count += 1
                    self._turn(way, number, '%s-%d-%d' % (way.name, number,
                                                          count))
                except (Broken, cni.Failed, OSError,
                        AssertionError) as err:
                    self.refused += 1
                    if calm:
                        self.note('%s: %s' % (way.name, err))

    def _turn(self, way: Way, number: int, name: str) -> None:
        calm = self.calm.is_set()
        if number in way.live:
            if number:
                end = way.live.pop(number).end
                try:
                    end()
                except Exception:
                    _insist(end)  # parts of the container may be deleted
                    raise
            return
        sandbox = way.live[number] = way.start(name, number)
        if calm and way.is_request and not self._is_reachable(sandbox, 1):
            self.note('%s is not reachable after its ADD' % (sandbox,))

    def _is_reachable(self, sandbox: Sandbox, count: int = 2) -> bool:
        """Return whether node and container reach each other.

        :param count: number of addresses to check; use 1 while the IPv6
            address may be tentative
        """
        return all(
            any(self._ping(to, netns) for _ in range(3))
            for address, host in zip(sandbox.addresses[:count],
                                     (lab.NODE, lab.NODE6))
            for to, netns in ((address, None), (host, sandbox.name)))

    def _ping(self, address: str, netns: Optional[str] = None,
              seconds: float = 1) -> bool:
        return self.lab.run(
            'ping', '-n', '-q', '-c', '1', '-W', str(seconds), address,
            netns=netns, check=False).returncode == 0

    def disturb(self) -> None:
        """Cause the next fault, and wait until traffic flows again."""
        if not self.next:
            self.next = random.sample([*self.faults], len(self.faults))
        name = self.next.pop()
        if name in KILLS and not self.with_kills:
            return
        self.faults[name]()
        stays = [way.live[0] for way in self.ways if 0 in way.live]
        taken = lab.until(lambda: all(
            self._ping(each.addresses[0], seconds=0.3) for each in stays))
        self.interrupted.setdefault(name, []).append(taken)

    def note(self, text: str) -> None:
        text = ' '.join(text.split())
        self.wrong.append(text)
        print('%s WRONG: %s' % (time.strftime('%X'), text[:2000]), flush=True)

    # Invariants

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for way in self.ways:
                stack.enter_context(way.busy)
            yield

    def examine(self) -> float:
        """Return the seconds until all invariants hold; note a timeout."""
        began = time.monotonic()
        self.lab.settle()
        live = [each for way in self.ways for each in way.live.values()]
        macs = {address: self.lab.ip('link', 'show', 'eth0', netns=each.name
                                     )[0]['address']
                for each in live for address in each.addresses}
        while True:
            problems = list(self._problems(live, macs))
            taken = time.monotonic() - began
            problems = problems or ['%s is not reachable' % (each,)
                                    for each in live
                                    if not self._is_reachable(each)]
            if not problems:
                self.lost = False
                return taken
            if self.lost and taken > DOUBT:
                # A container that ended while the ledger was lost matches no
                # record, so its entries stay until an operator deletes them.
                self.lost = False
                self.deleted += subprocess.run(
                    [program.BREAK0, '--config-file', CONF, 'sync',
                     '--delete-unclaimed'], text=True,
                    stdout=subprocess.PIPE).stdout.count('- route')
            if taken > ORDER:
                self.note('; '.join(problems))
                return taken
            time.sleep(0.2)

    def _problems(self, live: list[Sandbox], macs: dict[str, str]
                  ) -> Iterator[str]:
        """Yield the violated invariants of the engine."""
        def differ(what: str, found: Any, expected: Any) -> Iterator[str]:
            if found != expected:
                yield '%s: %s' % (what, sorted(map(str, found ^ expected)))

        yield from differ('routes', set(self.lab.routes()), set(macs))
        yield from differ('neighbours', {
            (each['dst'], each.get('lladdr')) for each in self.lab.ip(
                'neighbour', 'show', 'dev', 'break0', 'nud', 'permanent')
        } if self.lab.link('break0') else set(), set(macs.items()))
        yield from differ('guard', self._pairs(), {
            (mac, address) for address, mac in macs.items()})
        with contextlib.suppress(FileNotFoundError):
            yield from differ('records', {
                each.removesuffix('.json') for each in os.listdir(
                    STATE + '/addresses')}, set(macs))
        yield from differ('interfaces', {
            each['ifname'] for each in self.lab.ip('link', 'show')},
            {'lo', 'eth0', 'break0', 'other'})
        for command in ('sync --dry-run', 'status'):
            done = subprocess.run(
                [program.BREAK0, '--config-file', CONF, *command.split()],
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                yield '%s: %s' % (command, done.stdout)
        by_cni = self.ways[1]
        assert isinstance(by_cni, ByCNI)
        for each in by_cni.live.values():
            try:
                by_cni.runtime.check(NETWORK, '/run/netns/' + each.name,
                                     each.name)
            except cni.Failed as err:
                yield 'CHECK of %s: %s' % (each.name, err)
        if self._foreign() != self.foreign:
            yield 'foreign items: %s' % self._foreign()
        unwell = self._health()
        if unwell:
            yield unwell

    def _pairs(self) -> set[tuple[str, str]]:
        """Return the guard's entries."""
        done = self.lab.run('nft', '-j', 'list', 'table', 'netdev',
                            guard.table_of('break0'), check=False)
        if done.returncode:
            return set()
        return {tuple(element['concat'])
                for each in json.loads(done.stdout)['nftables']
                if each.get('set', {}).get('name') in ('pairs4', 'pairs6')
                for element in each['set'].get('elem', ())}

    def _health(self) -> Optional[str]:
        client = http.client.HTTPConnection('127.0.0.1', 9817, timeout=10)
        try:
            client.request('GET', '/healthz')
            answer = client.getresponse()
            text = answer.read().decode()
            return None if answer.status == 200 else 'agent: ' + text
        except OSError as err:
            return 'agent: %s' % err
        finally:
            client.close()

    def read_logs(self) -> None:
        """Note tracebacks, and start new logs."""
        agent, daemon = LOGS / 'agent.log', pathlib.Path(self.node.log)
        for text, of in ((agent.read_text(errors='replace'), ''),
                         (self.node.errors(), 'kuryr_break0')):
            # If the registry of pods was killed with the daemon, a request
            # fails by an error of Kuryr. Its traceback contains kuryr_break0.
            for each in text.split('Traceback')[1:]:
                if of in each and not (of and REGISTRY in each):
                    self.note('a traceback: ' + each[:3000])
        for path in (agent, daemon):
            if self.wrong:
                with open(str(path) + '.all', 'a') as file:
                    file.write(path.read_text(errors='replace'))
            os.truncate(path, 0)

    def resources(self) -> dict[str, tuple[float, int]]:
        """Return memory in MiB and open files, by "agent" and "daemon"."""
        return {name: (each.memory_info().rss / MIB, each.num_fds())
                for name, each in (
                    ('agent', psutil.Process(self.agent.pid)),
                    ('daemon', self._server()))}

    def compare(self, firsts: dict[str, tuple[float, int]],
                now: dict[str, tuple[float, int]]) -> None:
        """Note growth of the agent or the daemon."""
        for name, (memory, files) in now.items():
            more = memory - firsts[name][0], files - firsts[name][1]
            if more[0] > MORE_MEMORY or more[1] > MORE_FILES:
                self.note('%s has %.0f MiB and %d files more than after its '
                          'first minutes' % (name, *more))


def prepare(node: kuryr.Node) -> None:
    """Create logs, options, and foreign entries on the node."""
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    node.log = str(LOGS.absolute() / 'kuryr-daemon.log')
    node.lab.add_ipv6()
    for command in (
            'ip link add other type veth peer name peer netns lan',
            'ip link set other up',
            'ip route add 198.51.100.7 dev other proto static',
            'ip neighbour add 198.51.100.8 lladdr fa:16:3e:00:00:99 '
            'dev other',
            'nft add table inet other'):
        node.lab.run(*command.split())
    pathlib.Path(CONF).write_text('[break0]\n' + OPTIONS)


def run(hours: float) -> int:
    """Run the soak test, and print a line each minute.

    :returns: exit status, 0 without a problem
    """
    with kuryr.Node() as node:
        prepare(node)
        soak = Soak(node)
        try:
            soak.start_daemon()
            return _run(soak, hours)
        finally:
            soak.ending.set()
            soak.agent.kill()
            soak.agent.wait()


def _run(soak: Soak, hours: float) -> int:
    ends = time.monotonic() + 3600 * hours
    threads = [threading.Thread(target=soak.churn, args=(way,), daemon=True)
               for way in soak.ways]
    for thread in threads:
        thread.start()
    minute = 0
    firsts: dict[str, tuple[float, int]] = {}
    adds: dict[str, list[float]] = collections.defaultdict(list)
    delays: dict[str, list[float]] = collections.defaultdict(list)
    while time.monotonic() < ends:
        minute += 1
        soak.with_kills = 0 < minute % CYCLE <= WITH_KILLS
        part = time.monotonic() + FAULTS
        while time.monotonic() < part:
            try:
                soak.disturb()
            except AssertionError as err:
                soak.note('traffic does not flow again: %s' % err)
            time.sleep(random.uniform(0, 6))
        with soak.paused():
            recovered = soak.examine()
        soak.calm.set()
        time.sleep(CALM)
        with soak.paused():
            soak.calm.clear()
            order = soak.examine()
            soak.read_logs()
            now = soak.resources()
            if minute % CYCLE == WITH_KILLS + 2:
                firsts = now
            elif minute % CYCLE == 0:
                soak.compare(firsts, now)
            print('%s minute %d: %s; %s; in order after faults %.1f, without '
                  '%.1f s; refused %d; %s; %s' % (
                      time.strftime('%X'), minute,
                      '%d wrong' % len(soak.wrong) if soak.wrong else 'ok',
                      ', '.join('%s %d live, %d ADDs %.0f/%.0f ms' % (
                          way.name, len(way.live), len(way.times),
                          statistics.median(way.times or [0]),
                          max(way.times, default=0)) for way in soak.ways),
                      recovered, order, soak.refused,
                      ', '.join('%s %.1f' % (name, max(taken)) for name, taken
                                in soak.interrupted.items()),
                      ', '.join('%s %.0f MiB %d files' % (name, *each)
                                for name, each in now.items())), flush=True)
            for way in soak.ways:
                adds[way.name] += way.times
                way.times.clear()
            for name, taken in soak.interrupted.items():
                delays[name] += taken
            soak.interrupted.clear()
    soak.ending.set()
    for thread in threads:
        thread.join()
    for kind, found, unit in (('ADDs', adds, 'ms'),
                              ('without traffic after', delays, 's')):
        for name, values in found.items():
            print('%s %s: %d, median %.2f, 99 %% %.2f, longest %.2f %s' % (
                kind, name, len(values), statistics.median(values),
                sorted(values)[int(len(values) * .99)], max(values), unit))
    print('%d minutes, %d requests failed during faults, %d routes were left '
          'by lost ledgers, %d wrong' % (minute, soak.refused, soak.deleted,
                                         len(soak.wrong)))
    return 1 if soak.wrong else 0
