# SPDX-License-Identifier: Apache-2.0

"""Measures the costs of a pod, of a repair and of a packet.

Run it as ``tools/in-lab python -W ignore -m tests.bench``. Some sections need
root of the machine: run them by ``tools/in-root-lab``. Progress goes to
stderr, tables to stdout. A missed target is printed but is not a failure,
since the machine may be busy. A wrong effect of a measured operation is a
failure.
Each section is a function of the type :data:`Measure`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import ipaddress
import os
import socket
import statistics
import sys
import time
from typing import Any, Callable, Iterator, NamedTuple

from oslo_config import cfg
import pyroute2

from kuryr_break0 import config
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0 import ledger
from kuryr_break0 import manager
from tests.support import lab

POD = ipaddress.ip_address('100.75.30.71')
MAC = 'fa:16:3e:00:00:01'
SUBNET = ipaddress.ip_network('100.75.30.0/24')
OWNER = ledger.Owner('b' * 64, 'eth0')
FIRST_OTHER = ipaddress.ip_address('10.75.0.1')
OTHER_SUBNET = ipaddress.ip_network('10.75.0.0/16')


class Broken(Exception):
    """A measured operation has a wrong effect, so its time is invalid."""


class LeftOut(Exception):
    """A section cannot be measured here."""


class Target(NamedTuple):
    name: str
    measured: str
    met: bool


class Section(NamedTuple):
    """The results of one part of the benchmark.

    :ivar data: the rows' values, unrounded, for the JSON file
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    targets: list[Target]
    data: dict[str, Any]


def say(text: str) -> None:
    """Print the progress to stderr."""
    print(text, file=sys.stderr, flush=True)


class Node:
    """The node of a lab with break0, and a number of other pods on it.

    :ivar netns: path of the namespace of the pod with address :data:`POD`
    """

    def __init__(self, node: lab.Lab) -> None:
        conf = cfg.ConfigOpts()
        conf(args=[], default_config_files=[], default_config_dirs=[],
             use_env=False)
        self.options = config.load(conf)
        self.ledger = ledger.Ledger(self.options.state_dir)
        self.lab = node
        self.netns = node.add_pod('pod', str(POD), mac=MAC)
        # Create break0 before the measurements: a node creates break0 once
        # per boot.
        self.bind()
        self.unbind()
        self.index = socket.if_nametoindex(self.options.device)
        self.others = 0

    def track(self) -> None:
        """Track connections in the kernel, as on nodes with kube-proxy."""
        self.lab.run('nft', 'add table inet tracked; add chain inet tracked '
                     'in { type filter hook input priority 0; }; add rule '
                     'inet tracked in ct state established accept')
        self.lab.run('ping', '-c', '1', '127.0.0.1')

    def bind(self) -> None:
        # kuryr-daemon handles each request in a process of its own, with a
        # new manager.
        manager.Break0Manager(self.options).bind(
            OWNER, [POD], parent=lab.PARENT, mac=MAC, netns=self.netns,
            subnets=[SUBNET])

    def set_guard(self, guard: str) -> None:
        """Set the option ``guard``, and sync."""
        self.options = dataclasses.replace(self.options, guard=guard)
        manager.Break0Manager(self.options).sync()

    def bind_route(self) -> None:
        """Bind without neighbours: no MAC address, namespace or subnets."""
        manager.Break0Manager(self.options).bind(OWNER, [POD],
                                                 parent=lab.PARENT)

    def unbind(self, interface_goes: bool = True) -> None:
        """Unbind the pod.

        :param interface_goes: whether the pod's interface is about to be
            deleted, as at a DEL
        """
        manager.Break0Manager(self.options).unbind(
            OWNER, [POD], interface_goes=interface_goes)

    def housekeep(self) -> None:
        manager.Break0Manager(self.options).housekeep()

    def resize(self, count: int) -> None:
        """Set the number of other pods with routes, neighbours and records."""
        grows = count > self.others
        changed = self.records(*sorted((count, self.others)))
        self.write_batch('add' if grows else 'del', changed)
        self.run_batch()
        with self.ledger.lock():
            for record in changed:
                if grows:
                    self.ledger.records.put([record])
                else:
                    self.ledger.records.remove(record.address)
        self.others = count

    def records(self, start: int, end: int) -> list[ledger.Record]:
        """Return the records of other pods, by a range of their numbers."""
        return [ledger.Record(
            FIRST_OTHER + number, ledger.Owner('%064x' % number, 'eth0'),
            lab.PARENT, 'fa:16:3e:01:%02x:%02x' % divmod(number, 256),
            (OTHER_SUBNET,)) for number in range(start, end)]

    def write_batch(self, verb: str, records: list[ledger.Record]) -> None:
        """Write the ``ip -batch`` file for :meth:`run_batch`.

        :param verb: "add" or "del", for the records' routes and neighbours
        """
        with open('/run/batch', 'w') as file:
            for record in records:
                file.write(
                    'neigh %(verb)s %(to)s lladdr %(mac)s dev %(dev)s '
                    'nud permanent proto %(proto)d\n'
                    'route %(verb)s %(to)s dev %(dev)s proto %(proto)d '
                    'src %(src)s scope link\n' % {
                        'verb': verb, 'to': record.address, 'mac': record.mac,
                        'dev': self.options.device, 'src': lab.NODE,
                        'proto': self.options.route_protocol})

    def run_batch(self) -> None:
        self.lab.run('ip', '-batch', '/run/batch')

    def require(self, present: bool, recorded: bool) -> None:
        """Check the routes of the pod and of all others, and the record.

        :raises Broken: if a route or the record is wrong
        """
        routes = self.lab.routes(self.options.device)
        route = routes.pop(str(POD), None)
        got = route and (route['protocol'], route['scope'],
                         route.get('prefsrc'))
        wanted = (str(self.options.route_protocol), 'link',
                  lab.NODE) if present else None
        if got != wanted:
            raise Broken('the route is %s, not %s' % (got, wanted))
        if set(routes) != {str(FIRST_OTHER + number)
                           for number in range(self.others)}:
            raise Broken('routes of others have changed')
        if (self.ledger.records.get(POD) is not None) != recorded:
            raise Broken('the ledger is wrong')


def keep() -> None:
    """Exclude all live objects from garbage collection, like kuryr-daemon."""
    gc.collect()
    gc.freeze()


#: Times in ms, one for each turn
Times = list[float]
#: Measures one section on a fresh node, with a number of repetitions.
Measure = Callable[[Node, int], Section]


def in_child(measure: Callable[[], float]) -> float:
    """Measure in a forked process, as kuryr-daemon handles a request.

    :raises Broken: if the measurement fails
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        # pyroute2 prints when the process exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            os.write(writing, repr(measure()).encode())
            os._exit(0)
        except BaseException as err:
            os.write(writing, repr(err).encode())
        os._exit(1)
    os.close(writing)
    # Read once, since the pipe may never reach its end of file: Kuryr leaves
    # processes that hold the pipe open.
    with open(reading, 'rb', buffering=0) as file:
        answer = file.read(1024).decode()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise Broken(answer)
    return float(answer)


def timed(call: Callable[[], object]) -> float:
    """Return the duration of a call in ms."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


#: The unit of targets for work that mainly the kernel does; see unit()
UNIT = 'ip processes'
#: The unit of targets for Python code: the time of pyroute2 for one route.
#: Between machines, the ratio of Python to ip(8) differs by a factor of two,
#: and the ratio of two programs in Python hardly differs.
ROUTE = 'IPRoute'


def unit(node: Node, of: Callable[[list[float]], float] = statistics.median,
         count: int = 30) -> float:
    """Return the ms that ``ip`` takes to set and to delete a route.

    Each measurement runs two processes of ``ip``.

    :param of: function that reduces the measurements to one number
    :param count: number of measurements
    """
    route = ('192.0.2.99', 'dev', node.options.device, 'proto', '99')

    def pair() -> None:
        node.lab.run('ip', 'route', 'replace', *route)
        node.lab.run('ip', 'route', 'del', *route)

    return of([timed(pair) for _ in range(count)])


@contextlib.contextmanager
def route_pairs(node: Node) -> Iterator[Callable[[], None]]:
    """Yield a function by which pyroute2 sets and deletes a route.

    The time of a call is the unit :data:`ROUTE`. Alternate the calls with the
    measured work: the machine's speed changes, and consecutive calls find all
    their data in the caches of the processor.
    """
    route = {'dst': '192.0.2.99/32', 'proto': 99,
             'oif': socket.if_nametoindex(lab.PARENT)}
    with pyroute2.IPRoute() as ipr:
        def pair() -> None:
            ipr.route('replace', scope=values.RT_SCOPE_LINK,
                      prefsrc=lab.NODE, **route)
            ipr.route('del', scope=wire.RT_SCOPE_NOWHERE, **route)

        yield pair


@contextlib.contextmanager
def route_units(node: Node) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the unit :data:`ROUTE` in ms."""
    with route_pairs(node) as pair:
        yield lambda: statistics.median(timed(pair) for _ in range(20))


def at_most(name: str, taken: float, of: float, limit: float,
            what: str = UNIT) -> Target:
    """Return a target as a multiple of another time of this run.

    :param taken: the measured time, in the unit of the other time
    :param of: the other time
    :param limit: the largest allowed ratio
    :param what: name of the other time
    """
    return Target('%s: at most %g x %s' % (name, limit, what),
                  '%.2f x' % (taken / of), taken <= limit * of)


def at_most_in_turns(name: str, taken: Times, of: Times, limit: float,
                     what: str = '', count: int = 1) -> Target:
    """Return a target for the ratio of two times of the same turn.

    The target compares the median of the ratios of all turns, because the
    machine's speed may change from turn to turn.

    :param count: the number of pods by which the measured time is divided
    """
    ratio = statistics.median(
        one / other / count for one, other in zip(taken, of))
    return Target('%s: at most %g x%s' % (name, limit, what and ' ' + what),
                  '%.2f x' % ratio, ratio <= limit)


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Prefix an error of the block with a name.

    :raises Broken: if the block raises any exception
    """
    try:
        yield
    except Exception as err:
        raise Broken('%s: %s' % (name, str(err) or repr(err))) from err
