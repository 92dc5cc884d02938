# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import select
import signal
import time
from typing import Any, Callable, Iterator, Optional, Sequence
import unittest
from unittest import mock

from oslo_config import cfg
import psutil

from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import kernel
from kuryr_break0.kernel import namespaces
from kuryr_break0 import ledger
from kuryr_break0.ledger import journal
from kuryr_break0 import manager
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Owner
from tests.support import lab

#: sys/inotify.h
IN_OPEN = 0x20
POD = '100.75.30.71'
OTHER_POD = '100.75.30.72'
OWNER = Owner('sandbox-1', 'eth0')
OTHER_OWNER = Owner('sandbox-2', 'eth0')


def options(**overrides: Any) -> config.Options:
    """Return the default [break0] options, except for these values."""
    conf = cfg.ConfigOpts()
    config.register(conf)
    conf([], default_config_files=[])
    for name, value in overrides.items():
        conf.set_override(name, value, group=config.GROUP)
    return config.load(conf)


def addresses(*texts: str) -> list[IPAddress]:
    return [ipaddress.ip_address(text) for text in texts]


def add_unit() -> None:
    """Create systemd's runtime directory, and the agent's unit."""
    os.makedirs('/run/systemd/system')
    with open('/run/systemd/system/kuryr-break0-agent.service', 'w'):
        pass


def in_child(function: Callable[[], Any]) -> int:
    """Call a function in a forked process and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    except BaseException as err:
        print('in a child: %r' % err, flush=True)
        os._exit(1)


def wait_for(pid: int) -> int:
    """Wait for a child; return its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_idle(process: psutil.Process) -> bool:
    """Return whether a process sleeps 1.5 seconds without a context switch.

    A process that waits for a processor is not idle.
    """
    def switches() -> Any:
        return process.num_ctx_switches(), process.status()

    before = switches()
    time.sleep(1.5)
    return bool(before == switches()) and before[1] == 'sleeping'


@contextlib.contextmanager
def until_opened(path: str) -> Iterator[None]:
    """After the block, wait until some process has opened the file."""
    with contextlib.closing(kernel.Inotify()) as watch:
        watch.watch(path, IN_OPEN)
        yield
        assert select.select([watch], [], [], lab.PATIENCE)[0], (
            'nobody opens it')


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Raise the timeouts for locks to lab.PATIENCE within the block.

    With the default timeouts, a slow machine changes the results: a bind
    continues without the lock after 10 seconds, an unbind leaves its work to
    a sync, and a journal drops a count.
    """
    with mock.patch.object(ledger.Ledger.__init__, '__defaults__',
                           (lab.PATIENCE,)), \
            mock.patch.object(journal, '_PATIENCE', lab.PATIENCE):
        yield


@contextlib.contextmanager
def locked(path: str = '/run/kuryr-break0/lock') -> Iterator[None]:
    """Hold a ledger's lock within the block, as another process would."""
    with open(path, 'a') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def beat_at(path: str, when: float) -> None:
    """Write a time, in seconds, into the heartbeat file of an agent."""
    with open(path, 'r+') as file:
        file.write('%020.3f' % when)


def die() -> None:
    """Kill the calling process by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


class LabTestCase(unittest.TestCase):
    """A test with its own simulated node, ``self.lab``."""

    def setUp(self) -> None:
        super().setUp()
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)

    def has_egress(self) -> bool:
        """Return whether the kernel has the egress hook of Linux 5.16."""
        return self.lab.run('nft', '--check', 'table netdev x { chain c { '
                            'type filter hook egress device "eth0" priority '
                            '0; }; }', check=False).returncode == 0

    def require_egress(self) -> None:
        """Skip the test if the kernel has no egress hook of nftables."""
        if not self.has_egress():
            self.skipTest('needs the hook egress of nftables, Linux 5.16')

    def require_rewriting(self) -> None:
        """Skip the test if the guard cannot rewrite and forward packets.

        The guard does so to answer solicitations and to forward held packets.
        Linux 7.2, and 6.18 with later fixes, let only root of the machine
        rewrite packets, not root of a user namespace.
        """
        done = self.lab.run(
            'nft', 'table netdev x { chain c { type filter hook egress device '
            '"eth0" priority 0; }; chain d { ether saddr set '
            '02:00:00:00:00:01 fwd to "eth0"; }; }', check=False)
        if done.returncode:
            self.skipTest('needs the hook egress of nftables, nft_fwd_netdev '
                          'and the right to rewrite packets: ' + done.stdout)
        self.lab.run('nft', 'delete table netdev x')

    def is_blind(self) -> bool:
        """Return whether cookies are useless, because no namespace opens.

        Linux 7.0, and 6.18 with later fixes, open namespaces by their cookies
        only in the initial process namespace (may_see_all_namespaces).

        :returns: False also if the kernel has no cookies
        """
        other = namespaces.identify_or_fail('/run/netns/lan')
        if other.cookie is None:
            return False
        try:
            os.close(namespaces.open_by_cookie(other))
        except OSError as err:
            self.assertEqual(errno.ESTALE, err.errno)
            return True
        return False

    def manager(self, **overrides: Any) -> manager.Break0Manager:
        return manager.Break0Manager(options(**overrides))

    def bind(self, *texts: str, owner: Owner = OWNER,
             parent: str = lab.PARENT, netns: Optional[str] = None,
             mac_of_pod: Optional[str] = None,
             subnets: Sequence[str] = (), **overrides: Any) -> None:
        self.manager(**overrides).bind(
            owner, addresses(*(texts or (POD,))), parent=parent, netns=netns,
            mac=mac_of_pod, subnets=[ipaddress.ip_network(subnet)
                                     for subnet in subnets])

    def unbind(self, *texts: str, owner: Owner = OWNER,
               **overrides: Any) -> None:
        self.manager(**overrides).unbind(owner, addresses(*(texts or (POD,))))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Check that the block logs no warning and no error."""
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            # assertLogs fails if nothing is logged, and assertNoLogs needs
            # Python 3.10.
            logging.getLogger('kuryr_break0').warning('a line')
            yield
        self.assertEqual(['WARNING:kuryr_break0:a line'], logs.output)

    def bound(self) -> set[str]:
        """Return the addresses with a claim in the ledger."""
        return set(map(str, self.snapshot().contents.claims))

    def snapshot(self, **overrides: Any) -> Snapshot:
        own = options(**overrides)
        with kernel.Netlink() as netlink:
            return actual.read(own, ledger.Ledger(own.state_dir), netlink)

    def problems(self, **overrides: Any) -> list[str]:
        """Return all problems that status would print."""
        found, _ = problems.find_all(self.snapshot(**overrides))
        return [*problems.of_node(found),
                *problems.by_address(found).values()]
