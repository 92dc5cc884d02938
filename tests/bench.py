# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What a pod costs, by this package and by other ways, in a lab.

Run it as ``tests/in-lab python -W ignore -m tests.bench``. Progress goes to
stderr, tables to stdout. A target that is missed is said, but is no failure,
since the machine may be a busy one; a way that does not do what it says is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import ipaddress
import json
import logging
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, NamedTuple, NoReturn, Optional

from oslo_config import cfg
import prettytable
import pyroute2

from kuryr_break0 import config
from kuryr_break0 import ledger
from kuryr_break0 import manager
from kuryr_break0 import netlink
from tests import lab

SIZES = (10, 250, 1000)
#: So many pairs are made before the number of routes changes: each number
#: has its turn every few seconds, and a slow spell hits all of them.
ROUND = 20
POD = ipaddress.ip_address('100.75.30.71')
POD_HOST = '%s/32' % POD
FIRST_OTHER = ipaddress.ip_address('10.75.0.1')
OWNER = ledger.Owner('b' * 64, 'eth0')
OURS = 'ours'
IPDB = 'IPDB per operation'

#: By the name of the way and the number of routes
Medians = dict[str, dict[int, float]]


class Broken(Exception):
    """A way does not do what it says, so its time means nothing."""


class Target(NamedTuple):
    name: str
    measured: str
    met: bool


class Section(NamedTuple):
    """What a part of the benchmark found.

    :ivar data: the same as the rows, unrounded, for the JSON file
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    targets: list[Target]
    data: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to add the route of a pod and to delete it again.

    :ivar every: only each so many pairs, since it is slow
    :ivar recorded: whether it keeps the ledger as well
    """

    name: str
    add: Callable[[], object]
    delete: Callable[[], object]
    every: int = 1
    recorded: bool = False


class Node:
    """The node of the lab with break0, and a number of other pods on it."""

    def __init__(self, node: lab.Lab) -> None:
        conf = cfg.ConfigOpts()
        conf(args=[], default_config_files=[], default_config_dirs=[],
             use_env=False)
        self.options = config.load(conf)
        self.ledger = ledger.Ledger(self.options.state_dir,
                                    self.options.lock_timeout)
        self.lab = node
        self.netns = node.add_netns('pod')
        # Makes break0, which is once per boot and not what is measured.
        manager.Break0Manager(self.options).bind(OWNER, [], parent=lab.PARENT)
        self.index = socket.if_nametoindex(self.options.device)
        self._others = 0

    def resize(self, count: int) -> None:
        """Make it so many routes, each with its entry in the ledger."""
        grows = count > self._others
        changed = [(FIRST_OTHER + number, ledger.Owner('%064x' % number, 'if'))
                   for number in range(*sorted((count, self._others)))]
        with open('/run/batch', 'w') as file:
            for address, _ in changed:
                file.write('route %s %s dev %s proto %d src %s scope link\n'
                           % ('add' if grows else 'del', address,
                              self.options.device,
                              self.options.route_protocol, lab.NODE))
        self.lab.run('ip', '-batch', '/run/batch')
        with self.ledger.lock():
            for address, owner in changed:
                if grows:
                    self.ledger.put(ledger.Entry(address, owner, lab.PARENT))
                else:
                    self.ledger.remove(address)
        self._others = count

    def require(self, present: bool, recorded: bool) -> None:
        """Check that the pod has its route, or none, and all others theirs.

        :raises Broken: if it is not so
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
                           for number in range(self._others)}:
            raise Broken('routes of others have changed')
        if (self.ledger.get(POD) is not None) != recorded:
            raise Broken('the ledger is wrong')


def _ours(node: Node) -> Way:
    # In the daemon each request is a process of its own, so a manager is
    # never used twice.
    def add() -> None:
        manager.Break0Manager(node.options).bind(
            OWNER, [POD], parent=lab.PARENT, mac='fa:16:3e:00:00:01',
            netns=node.netns)

    def delete() -> None:
        manager.Break0Manager(node.options).unbind(OWNER, [POD])

    return Way(OURS, add, delete, recorded=True)


def _kept_open(node: Node, stack: contextlib.ExitStack) -> Way:
    ipr = stack.enter_context(pyroute2.IPRoute())
    common = {'dst': POD_HOST, 'oif': node.index,
              'proto': node.options.route_protocol}
    return Way('pyroute2 IPRoute, kept open',
               lambda: ipr.route('replace', scope=netlink.RT_SCOPE_LINK,
                                 prefsrc=lab.NODE, **common),
               lambda: ipr.route('del', scope=netlink.RT_SCOPE_NOWHERE,
                                 **common))


def _raw(node: Node, stack: contextlib.ExitStack) -> Way:
    sock = stack.enter_context(socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
    sock.bind((0, 0))

    def ask(kind: int, flags: int) -> None:
        # linux/netlink.h, rtnetlink.h: nlmsghdr, rtmsg; RTA_DST, _OIF and
        # _PREFSRC
        sock.send(struct.pack(
            '=IHHII 8BI HH4s HHI HH4s', 52, kind, flags, 1, 0,
            socket.AF_INET, 32, 0, 0, node.options.route_table,
            node.options.route_protocol, netlink.RT_SCOPE_LINK,
            netlink.RTN_UNICAST, 0, 8, 1, POD.packed, 8, 4, node.index,
            8, 7, socket.inet_aton(lab.NODE)))
        answer, error = struct.unpack_from('=4xH10xi', sock.recv(4096))
        if answer != 2 or error:  # NLMSG_ERROR, which an ack is too
            raise OSError(-error, os.strerror(-error))

    return Way('raw netlink socket',
               # NLM_F_REQUEST, _ACK; for the first _REPLACE, _CREATE too
               lambda: ask(24, 0x505),  # RTM_NEWROUTE
               lambda: ask(25, 0x5))  # RTM_DELROUTE


def _processes(node: Node) -> Way:
    def run(*args: str) -> None:
        subprocess.run(('ip', 'route', *args), check=True)

    common = (POD_HOST, 'dev', node.options.device,
              'proto', str(node.options.route_protocol), 'scope', 'link')
    return Way('ip processes',
               lambda: run('replace', *common, 'src', lab.NODE),
               lambda: run('del', *common), every=4)


def _ipdb(node: Node) -> Way:
    def add() -> None:
        with pyroute2.IPDB() as ip:
            ip.routes.add({'dst': POD_HOST, 'oif': node.index,
                           'proto': node.options.route_protocol,
                           'scope': netlink.RT_SCOPE_LINK,
                           'prefsrc': lab.NODE}).commit()

    def delete() -> None:
        with pyroute2.IPDB() as ip:
            ip.routes[POD_HOST].remove().commit()

    return Way(IPDB, add, delete, every=ROUND)


@contextlib.contextmanager
def _blamed(way: Way) -> Iterator[None]:
    try:
        yield
    except Exception as err:
        raise Broken('%s: %s' % (way.name, str(err) or repr(err))) from err


def _verify(node: Node, way: Way) -> None:
    with _blamed(way):
        way.add()
        node.require(True, way.recorded)
        way.delete()
        node.require(False, False)


def _timed(way: Way) -> float:
    with _blamed(way):
        start = time.perf_counter()
        way.add()
        way.delete()
        taken = time.perf_counter() - start
    if way.every > 1:
        gc.collect()  # or the next way would have to sweep up
    return taken * 1000


def _measure(node: Node, ways: list[Way], repeat: int) -> Medians:
    times: dict[str, dict[int, list[float]]] = {
        way.name: {size: [] for size in SIZES} for way in ways}
    for start in range(0, repeat, ROUND):
        print('pair %d of %d' % (start + 1, repeat), file=sys.stderr)
        for size in SIZES:
            node.resize(size)
            if start == 0:
                for way in ways:
                    _verify(node, way)
            for number in range(start, min(start + ROUND, repeat)):
                for way in ways:
                    if number % way.every == 0:
                        times[way.name][size].append(_timed(way))
            node.require(False, False)
    return {name: {size: statistics.median(taken)
                   for size, taken in by_size.items()}
            for name, by_size in times.items()}


def pairs(node: Node, repeat: int) -> Section:
    """One bind and unbind of one address, by each way."""
    with contextlib.ExitStack() as stack:
        medians = _measure(node, [
            _ours(node), _kept_open(node, stack), _raw(node, stack),
            _processes(node), _ipdb(node)], repeat)
    low, middle, high = SIZES
    ratios = {name: {'to_ours': by_size[middle] / medians[OURS][middle],
                     'growth': by_size[high] / by_size[low]}
              for name, by_size in medians.items()}
    return Section(
        'One bind + unbind of one address, median ms',
        ['way', *('%d routes' % size for size in SIZES),
         'x ours at %d' % middle, '%d vs %d' % (high, low)],
        [[name, *('%.3f' % by_size[size] for size in SIZES),
          *('%.2f' % ratio for ratio in ratios[name].values())]
         for name, by_size in medians.items()],
        _pair_targets(medians), {'medians_ms': medians, 'ratios': ratios})


def _pair_targets(medians: Medians) -> list[Target]:
    low, middle, high = SIZES
    ours = medians[OURS]
    growth = ours[high] / ours[low]
    gain = medians[IPDB][middle] / ours[middle]
    return [
        Target('the pair by ours at %d routes: at most 2 ms' % middle,
               '%.2f ms' % ours[middle], ours[middle] <= 2),
        Target('ours at %d within 1.2 x of %d' % (high, low),
               '%.2f x' % growth, growth <= 1.2),
        Target('at least 100 x faster than %s at %d' % (IPDB, middle),
               '%.0f x' % gain, gain >= 100)]


SECTIONS: list[Callable[[Node, int], Section]] = [pairs]


def _table(title: Optional[str], columns: list[str],
           rows: list[list[str]]) -> str:
    table = prettytable.PrettyTable(columns, title=title)
    table.align = 'r'
    table.align[columns[0]] = 'l'
    table.add_rows(rows)
    return str(table)


def _report(sections: list[Section], repeat: int) -> dict[str, Any]:
    """Print the results, and return what is to be their JSON."""
    environment = {'python': platform.python_version(),
                   'pyroute2': importlib.metadata.version('pyroute2'),
                   'kernel': platform.release(), 'cpus': os.cpu_count()}
    print(', '.join('%s %s' % item for item in environment.items()))
    for section in sections:
        print(_table(section.title, section.columns, section.rows))
    targets = [target for section in sections for target in section.targets]
    print(_table(None, ['target', 'measured', 'result'], [
        [name, measured, 'met' if met else 'MISSED']
        for name, measured, met in targets]))
    return {'environment': environment, 'repeat': repeat,
            'sections': [{'title': section.title, **section.data}
                         for section in sections],
            'targets': [target._asdict() for target in targets]}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, '%s: %s (see --help)\n' % (self.prog, message))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            '%r is not a whole number from 1' % text)
    return int(text)


def _arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = _Parser(prog='tests.bench', description='Measure what a pod '
                     'costs. To be run under tests/in-lab.')
    # Opened before the lab is made, whose /run is not the one outside.
    parser.add_argument('--json', metavar='FILE',
                        type=argparse.FileType('w'),
                        help='write the results to this file as well')
    parser.add_argument('--repeat', metavar='N', type=_positive, default=200,
                        help='pairs by each way and number of routes; a '
                        'slow way gets fewer (default: %(default)d)')
    return parser.parse_args(argv)


def main(argv: Optional[list[str]] = None) -> int:
    args = _arguments(argv)
    logging.disable(logging.INFO)
    logging.getLogger('pyroute2').setLevel(logging.ERROR)  # IPDB's farewell
    try:
        with contextlib.closing(lab.Lab()) as made:
            node = Node(made)
            results = _report([section(node, args.repeat)
                               for section in SECTIONS], args.repeat)
        if args.json:
            with args.json:
                json.dump(results, args.json, indent=2)
    except (OSError, AssertionError, Broken) as err:
        reason = getattr(err, 'strerror', None) or str(err)
        print('tests.bench: ' + ' '.join(reason.split()), file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
