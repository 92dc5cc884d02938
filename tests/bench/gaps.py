# SPDX-License-Identifier: Apache-2.0

"""Measures interruptions of open connections between node and pod."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import threading
import time
from typing import Callable, Optional

from kuryr_break0 import manager
from tests import bench
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section
from tests.bench import Target
from tests.support import kuryr
from tests.support import lab
from tests.support import program

POD6 = ipaddress.ip_address('fd00:30::71')
SUBNETS = [bench.SUBNET, ipaddress.ip_network('fd00:30::/64')]
#: Seconds: the time-out of kubelet's probes. A segment that is lost while
#: break0 does not exist is sent again after 0.2 s, then after 0.4 s more.
LIMIT = 1
_EACH = 0.005  # seconds between two segments
_AFTER = 4.0  # seconds of observation after each event


class Stream:
    """A connection over which one side sends continuously."""

    def __init__(self, node: lab.Lab, source: Optional[str],
                 target: Optional[str], address: str) -> None:
        family = socket.AF_INET6 if ':' in address else socket.AF_INET
        with node.socket(family, netns=target) as listening:
            listening.bind((address, 0))
            listening.listen()
            self._sender = node.socket(family, netns=source)
            self._sender.connect(listening.getsockname()[:2])
            self._receiver = listening.accept()[0]
        self._sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receiver.settimeout(0.2)
        self._ending = False
        self.error: Optional[OSError] = None
        self.times: list[float] = []
        self._threads = [threading.Thread(target=each)
                         for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        try:
            while not self._ending:
                self._sender.send(b'0123456789abcdef')
                time.sleep(_EACH)
        except OSError as err:
            self.error = err

    def _receive(self) -> None:
        while not self._ending:
            try:
                if not self._receiver.recv(2 ** 16):
                    return
                self.times.append(time.monotonic())
            except socket.timeout:
                pass
            except OSError as err:
                self.error = err
                return

    def close(self) -> None:
        self._ending = True
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def silence_since(self, began: float) -> float:
        """Return the longest time in seconds without a received segment.

        :param began: start of the period, as of time.monotonic()
        :raises Broken: if the connection broke
        """
        if self.error is not None:
            raise Broken('the connection broke: %s' % self.error)
        times = [began, *(each for each in self.times if each > began),
                 time.monotonic()]
        return max(later - earlier
                   for earlier, later in zip(times, times[1:]))


def gaps(node: Node, repeat: int) -> Section:
    """Disturb the node, and measure the interruptions of connections."""
    node.lab.add_ipv6()
    node.lab.run('ip', 'address', 'add', '%s/64' % POD6, 'dev', 'eth0',
                 'nodad', netns='pod')
    manager.Break0Manager(node.options).bind(
        bench.OWNER, [bench.POD, POD6], parent=lab.PARENT, mac=bench.MAC,
        netns=node.netns, subnets=SUBNETS)
    node.resize(1)
    agents: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        agents.append(subprocess.Popen(
            [program.BREAK0, 'agent'],
            env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        # The start of the agent is complete when the agent has repaired the
        # route of another pod.
        node.lab.run('ip', 'route', 'del', str(bench.FIRST_OTHER), 'dev',
                     node.options.device)
        lab.until(lambda: str(bench.FIRST_OTHER) in node.lab.routes())

    def end(number: signal.Signals = signal.SIGTERM) -> None:
        agent = agents.pop()
        agent.send_signal(number)
        agent.wait()

    def restart_daemon() -> None:
        daemon.kill_daemon()
        daemon.start_daemon()

    def ip(*commands: str) -> None:
        for command in commands:
            node.lab.run('ip', *command.split())

    cases: list[tuple[str, Callable[[], object]]] = [
        ('agent stopped', end), ('agent started', start),
        ('agent killed', lambda: end(signal.SIGKILL)),
        ('agent started again', start),
        ('agent restarted, as by an upgrade', lambda: (end(), start())),
        ('kuryr-daemon killed and started', restart_daemon),
        ('break0 deleted', lambda: ip('link del break0')),
        ('break0 down', lambda: ip('link set break0 down')),
        ('its routes flushed', lambda: ip('route flush dev break0')),
        ('its neighbours flushed', lambda: ip(
            'neighbour flush dev break0 nud permanent')),
        ('parent down and up', lambda: ip(
            'link set eth0 down', 'link set eth0 up',
            'address replace %s/64 dev eth0 nodad' % lab.NODE6)),
        ('address of the node removed and added', lambda: ip(
            'address del %s/%d dev eth0' % (lab.NODE, lab.PREFIX),
            'address del %s/64 dev eth0' % lab.NODE6,
            'address add %s/%d dev eth0' % (lab.NODE, lab.PREFIX),
            'address add %s/64 dev eth0 nodad' % lab.NODE6))]
    found: dict[str, dict[str, float]] = {}
    start()
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(kuryr.Node(node.lab))
        daemon.start_daemon()
        stack.callback(lambda: [end() for _ in list(agents)])
        streams = {}
        for name, source, target, four, six in (
                ('node to pod', None, 'pod', str(bench.POD), str(POD6)),
                ('pod to node', 'pod', None, lab.NODE, lab.NODE6)):
            for family, address in (('IPv4', four), ('IPv6', six)):
                streams['%s, %s' % (name, family)] = stack.enter_context(
                    contextlib.closing(Stream(node.lab, source, target,
                                              address)))
        for what, disturb in cases:
            say(what)
            time.sleep(0.5)
            began = time.monotonic()
            disturb()
            time.sleep(_AFTER)
            with bench.blamed(what):
                found[what] = {name: stream.silence_since(began)
                               for name, stream in streams.items()}
    names = list(streams)
    return Section(
        'open connections, longest silence after each event, ms',
        ['event', *names],
        [[what, *('%.0f' % (values[name] * 1000) for name in names)]
         for what, values in found.items()],
        [Target('%s: no connection silent for more than %g s' % (what, LIMIT),
                '%.2f s' % max(values.values()),
                max(values.values()) <= LIMIT)
         for what, values in found.items()],
        {'silence_s': found})
