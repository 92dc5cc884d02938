# SPDX-License-Identifier: Apache-2.0

"""A soak test of 50 containers and their node beside a hostile container.

The hostile container creates namespaces, macvlans, addresses and connections
as fast as it can. Kuryr, CNI and discovery bind the other containers.
Meanwhile the node pings these containers, they ping the node, and further
containers start and end.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from typing import Iterator, Optional

import psutil

from tests.bench import soak
from tests.support import kuryr
from tests.support import lab

#: Numbers of monitored containers, by way: Kuryr, CNI, discovery
CONTAINERS = (17, 17, 16)
#: Seconds between two pings in one direction, and the longest allowed time
#: until the answer
INTERVAL, LIMIT = 0.25, 1.0
#: Seconds between the starts of two visiting containers
VISITS = 5.0
#: Seconds of pings before and after the hostile container runs
SETTLED = 5.0
HOSTILE = '100.75.30.120'
PORT = 9999
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h
_ECHO = struct.Struct('!BBHHH')  # type, code, checksum, identifier, sequence
_TIME = struct.Struct('@ll')
_FAMILIES = {socket.AF_INET: (socket.IPPROTO_ICMP, 8),
             socket.AF_INET6: (socket.IPPROTO_ICMPV6, 128)}
COUNTS = '/run/hostile'
#: The hostile container's program; each function runs in a process.
_PROGRAM = '''
import ctypes, itertools, os, signal, socket, subprocess, sys

libc = ctypes.CDLL(None)
NODE, PORT, STOLEN = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
count = 0


def note(number):
    global count
    count += number
    with open('/run/hostile/' + sys.argv[1], 'w') as file:
        file.write('%d' % count)


def batch(*lines):
    subprocess.run(['ip', '-force', '-batch', '-'], text=True,
                   input=''.join(each + '\\n' for each in lines),
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def namespaces():
    living = []
    for number in itertools.count():
        pid = os.fork()
        if not pid:
            libc.prctl(1, signal.SIGKILL)
            libc.unshare(0x50000000 if number % 2 else 0x40000000)
            signal.pause()
        living.append(pid)
        if number % 20 == 0:
            batch('link add x link eth0 netns %d type macvlan mode bridge'
                  % pid)
        if len(living) > 200:
            os.kill(living[0], signal.SIGKILL)
            os.waitpid(living.pop(0), 0)
        if number % 10 == 0:
            note(10)


def macvlans():
    for number in itertools.count():
        names = ['m%d' % each for each in range(200)]
        batch(*(line for place, name in enumerate(names) for line in (
            'link add %s link eth0 type macvlan mode bridge' % name,
            'address add 100.75.31.%d/32 dev %s' % (place + 1, name),
            'link set %s up' % name)))
        batch(*('link del ' + name for name in names))
        note(len(names))


def addresses():
    while True:
        found = ['100.75.%d.%d/32' % (32 + number // 250, 1 + number % 250)
                 for number in range(500)] + [each + (
                     '/128' if ':' in each else '/32') for each in STOLEN]
        for verb in ('add', 'del'):
            batch(*('address %s %s dev eth0' % (verb, each)
                    for each in found))
            note(len(found))


def connections():
    while True:
        for _ in range(100):
            with socket.socket() as tcp, socket.socket(
                    type=socket.SOCK_DGRAM) as udp:
                tcp.setblocking(False)
                tcp.connect_ex((NODE, PORT))
                try:
                    udp.sendto(b'x', (NODE, PORT))
                except OSError:
                    pass
        note(200)


globals()[sys.argv[1]]()
'''
LOOPS = ('namespaces', 'macvlans', 'addresses', 'connections')


class Stream:
    """Pings in one direction.

    :ivar latest: the longest time in seconds from a ping until the answer to
        it or to a later ping
    """

    def __init__(self, name: str, address: str, netns: Optional[str]) -> None:
        self.name = name
        self.latest = 0.0
        self.count = self.answers = 0
        self._sent: dict[int, float] = {}
        family = socket.AF_INET6 if ':' in address else socket.AF_INET
        protocol, self._kind = _FAMILIES[family]
        made: list[socket.socket] = []

        def open_socket() -> None:
            with open('/proc/sys/net/ipv4/ping_group_range', 'w') as file:
                file.write('0 0')
            made.append(socket.socket(family, socket.SOCK_DGRAM, protocol))

        lab.Lab.in_netns(open_socket, netns)
        self.socket, = made
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.connect((address, 0))

    def send(self) -> None:
        self.count += 1
        number = self.count % 2 ** 16
        self._sent[number] = time.time()
        with contextlib.suppress(OSError):  # no route, so no answer
            self.socket.send(_ECHO.pack(self._kind, 0, 0, 0, number))

    def receive(self) -> None:
        """Record the answers with the kernel's receive timestamps."""
        with contextlib.suppress(OSError):
            while True:
                data, extra, _, _ = self.socket.recvmsg(64, 64)
                seconds, nanoseconds = next(
                    _TIME.unpack_from(value) for _, kind, value in extra
                    if kind == _SO_TIMESTAMPNS)
                self.answers += 1
                self._note(_ECHO.unpack_from(data)[4],
                           seconds + nanoseconds / 1e9)

    def _note(self, number: int, at: float) -> None:
        if number not in self._sent:
            return  # the answer to a later ping came first
        for each in list(self._sent):
            self.latest = max(self.latest, at - self._sent.pop(each))
            if each == number:
                return

    def take_latest(self) -> float:
        """Return the longest answer time in seconds since the last call.

        An unanswered ping counts with its age.
        """
        waiting = next(iter(self._sent.values()), None)
        latest, self.latest = self.latest, 0.0
        return max(latest, 0 if waiting is None else time.time() - waiting)


class Pings:
    """Sends pings in all directions, from a thread."""

    def __init__(self, sandboxes: list[soak.Sandbox]) -> None:
        self.streams = []
        for each in sandboxes:
            for address, node in zip(each.addresses, (lab.NODE, lab.NODE6)):
                self.streams += [
                    Stream('to %s, %s' % (each.name, address), address, None),
                    Stream('from %s, %s' % (each.name, address), node,
                           each.name)]
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        by_file = {each.socket.fileno(): each for each in self.streams}
        poll = select.poll()
        for file in by_file:
            poll.register(file, select.POLLIN)
        next_at = time.monotonic()
        while not self._ending:
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + INTERVAL
                for each in self.streams:
                    each.send()
            for file, _ in poll.poll(1000 * max(
                    0.0, next_at - time.monotonic())):
                by_file[file].receive()

    def take_latest(self) -> list[tuple[float, str]]:
        """Return each direction's longest answer time, longest first."""
        return sorted(((each.take_latest(), each.name)
                       for each in self.streams), reverse=True)

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        for each in self.streams:
            each.socket.close()


@contextlib.contextmanager
def hostile(node: lab.Lab, stolen: list[str]) -> Iterator[None]:
    """Run the hostile container on the node within the block.

    :param stolen: addresses of others that the container assigns to itself
    """
    os.makedirs(COUNTS, exist_ok=True)
    node.add_pod('hostile', HOSTILE)
    with open('/run/hostile.py', 'w') as file:
        file.write(_PROGRAM)
    command = ' & '.join('%s /run/hostile.py %s %s %d %s' % (
        sys.executable, loop, lab.NODE, PORT, ' '.join(stolen))
        for loop in LOOPS)
    container = subprocess.Popen(
        ['ip', 'netns', 'exec', 'hostile', 'unshare', '--pid', '--fork',
         '--kill-child', 'sh', '-c', command + ' & wait'],
        stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        container.kill()
        container.wait()
        node.del_netns('hostile')


def _counts() -> dict[str, int]:
    """Return the hostile container's operations so far, by loop."""
    found = {}
    for loop in LOOPS:
        found[loop] = 0
        with contextlib.suppress(OSError, ValueError):
            found[loop] = int(pathlib.Path(COUNTS, loop).read_text())
    return found


class Visits:
    """Starts and ends containers, by each way in turn."""

    def __init__(self, tests: soak.Soak) -> None:
        self._soak = tests
        self.times: dict[str, list[float]] = {
            way.name: [] for way in tests.ways}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number in range(10 ** 9):
            if self._ending.wait(VISITS):
                return
            way = self._soak.ways[number % len(self._soak.ways)]
            try:
                sandbox = way.start('visit-%d' % number, max(CONTAINERS))
                began = time.monotonic()
                lab.until(lambda: self._soak.lab.ping(
                    sandbox.addresses[0], cold=False))
                self.times[way.name].append(time.monotonic() - began)
                sandbox.end()
            except Exception as err:
                self._soak.note('a container by %s: %s' % (way.name, err))

    def close(self) -> None:
        self._ending.set()
        self._thread.join()


def run(hours: float) -> int:
    """Run the soak test, and print a line each minute.

    :returns: exit status, 0 without a problem
    """
    with kuryr.Node() as node, contextlib.ExitStack() as stack:
        soak.prepare(node)
        tests = soak.Soak(node)
        stack.callback(tests.agent.wait)
        stack.callback(tests.agent.kill)
        tests.start_daemon()
        for way, first, count in zip(tests.ways, (60, 0, 80), CONTAINERS):
            way.first = first
            for number in range(count):
                way.live[number] = way.start(
                    '%s-%d' % (way.name, number), number)
        living = [each for way in tests.ways for each in way.live.values()]
        tests.examine()
        listening = stack.enter_context(socket.socket())
        listening.bind((lab.NODE, PORT))
        listening.listen(8)
        pings = stack.enter_context(contextlib.closing(Pings(living)))
        time.sleep(SETTLED)
        print('%d containers, %d streams of pings, latest before: %.3f s' % (
            len(living), len(pings.streams), pings.take_latest()[0][0]),
            flush=True)
        longest = 0.0
        with hostile(node.lab, [address for each in living[::5]
                                for address in each.addresses]):
            with contextlib.closing(Visits(tests)) as visits:
                ends = time.monotonic() + 3600 * hours
                while time.monotonic() < ends:
                    time.sleep(min(60, max(0.0, ends - time.monotonic())))
                    longest = max(longest, _report(tests, pings, visits))
        time.sleep(SETTLED)
        pings.take_latest()
        print('In order %.1f s after its end' % tests.examine())
        tests.read_logs()
        for name, times in visits.times.items():
            if times:
                print('by %s: %d came and went, the first ping answered after '
                      '%.2f s (median), %.2f s at most' % (
                          name, len(times), statistics.median(times),
                          max(times)))
        print('%d pings, %d answered, none later than %.3f s; %d wrong' % (
            sum(each.count for each in pings.streams),
            sum(each.answers for each in pings.streams), longest,
            len(tests.wrong)))
    return 1 if tests.wrong else 0


def _report(tests: soak.Soak, pings: Pings, visits: Visits) -> float:
    """Print a line, and return the longest time of a ping in seconds."""
    latest, name = pings.take_latest()[0]
    if latest > LIMIT:
        tests.note('a ping %s was answered after %.2f s' % (name, latest))
    agent = psutil.Process(tests.agent.pid)
    times = agent.cpu_times()
    print('%s %s; latest answer %.3f s (%s); visits %s; hostile: %s; agent '
          '%.0f MiB, %d files, %.1f s of a processor' % (
              time.strftime('%X'),
              '%d wrong' % len(tests.wrong) if tests.wrong else 'ok',
              latest, name, ', '.join('%s %.2f' % (way, max(taken)) for way,
                                      taken in visits.times.items() if taken),
              ', '.join('%d %s' % (count, what) for what, count
                        in _counts().items()),
              agent.memory_info().rss / soak.MIB, agent.num_fds(),
              times.user + times.system), flush=True)
    return latest
