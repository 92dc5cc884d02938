# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import textwrap
from typing import Any, Callable, Optional
from unittest import mock

from kuryr_break0.break0.guard import Guard
from kuryr_break0.break0 import podside
from kuryr_break0.cli.cleanup import Cleanup
from kuryr_break0.engine import reconciler
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import lab
from tests.support import metrics
from tests.support import program

STATE_DIR = '/run/kuryr-break0'
POD6 = 'fd00:30::71'
#: An address outside of the node's subnet.
FAR_POD = '100.75.40.71'


class CleanupTestCase(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.lab.add_other_subnet()
        self.netns = self.lab.add_pod('pod', POD, POD6)
        self.far_netns = self.lab.add_pod('far', FAR_POD,
                                          gateways=(lab.OTHER_LAN,))
        self.lab.settle()

    def bind_both(self) -> None:
        self.bind(POD, POD6, netns=self.netns,
                  mac_of_pod=self.mac_of('pod'))
        self.bind(FAR_POD, netns=self.far_netns, owner=OTHER_OWNER,
                  mac_of_pod=self.mac_of('far'))

    def mac_of(self, pod: str) -> str:
        mac: str = self.lab.ip('link', 'show', lab.PARENT,
                               netns=pod)[0]['address']
        return mac

    def cleanup(self, *args: str, code: int = 0, **environ: str) -> str:
        done = self.call('cleanup', *args, **environ)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done.stdout


class TestWhatIsTakenAway(CleanupTestCase):

    def test_the_node_is_as_it_was(self) -> None:
        # The state includes a foreign route and foreign neighbours.
        self.lab.run('ip', 'route', 'add', OTHER_POD, 'dev', lab.PARENT)
        for netns in (None, 'pod'):
            self.lab.run('ip', 'neighbour', 'add', '100.75.30.99', 'lladdr',
                         '02:00:00:00:00:99', 'dev', lab.PARENT, netns=netns)
        self.lab.run('ip', 'rule', 'add', 'to', POD, 'table', '1000')
        before = self.lab.state()
        self.bind_both()
        self.assertEqual(
            [True] * 4, [self.lab.ping(*way) for way in (
                (POD,), (lab.NODE, 'pod'), (FAR_POD,), (lab.NODE, 'far'))])
        self.assertNotEqual(before, self.lab.state())
        printed = self.cleanup()
        self.assertEqual(before, self.lab.state())
        self.assertFalse(os.path.exists(STATE_DIR))
        self.assertIn('- interface break0\n', printed)
        for address in (POD, POD6, FAR_POD):
            self.assertIn('- route %s dev break0 ' % address, printed)
        self.assertRegex(printed, '- route %s dev eth0 .* namespace %s' % (
            lab.NODE, self.far_netns))
        self.assertRegex(printed, '- neighbour %s .* namespace %s' % (
            lab.NODE6, self.netns))
        self.assertEqual('', self.cleanup())

    def test_another_device_table_and_protocol(self) -> None:
        before = self.lab.state()
        self.bind(POD, netns=self.netns, device='shim', route_table=1000,
                  route_protocol=200, state_dir='/run/other')
        self.cleanup(OS_BREAK0__DEVICE='shim', OS_BREAK0__ROUTE_TABLE='1000',
                     OS_BREAK0__ROUTE_PROTOCOL='200',
                     OS_BREAK0__STATE_DIR='/run/other')
        self.assertEqual(before, self.lab.state())
        self.assertFalse(os.path.exists('/run/other'))

    def test_dry_run(self) -> None:
        self.bind_both()
        before = self.lab.state()
        planned = self.cleanup('--dry-run', code=1)
        self.assertEqual(before, self.lab.state())
        self.assertEqual(0, self.call('status').returncode)
        self.assertEqual(planned, self.cleanup())
        self.assertEqual('', self.cleanup('--dry-run'))

    def test_nothing_on_a_node_without_it(self) -> None:
        before = self.lab.state()
        self.assertEqual('', self.cleanup())
        self.assertEqual(before, self.lab.state())
        self.assertFalse(os.path.exists(STATE_DIR))

    def test_a_namespace_that_is_gone(self) -> None:
        self.bind_both()
        self.lab.del_netns('pod')
        self.assertNotIn(self.netns, self.cleanup())
        self.assertIsNone(self.lab.link('break0'))

    def test_files_of_others_stay(self) -> None:
        self.bind_both()
        with open(STATE_DIR + '/notes.txt', 'w'):
            pass
        self.cleanup()
        self.assertEqual(['notes.txt'], os.listdir(STATE_DIR))


class TestWhatIsNotOurs(CleanupTestCase):

    def assert_left(self, reason: str, **environ: str) -> None:
        self.assertRegex(self.cleanup(code=1, **environ),
                         '! interface break0: .*' + reason)
        self.assertIsNotNone(self.lab.link('break0'))

    def add_macvlan(self, mode: str = 'bridge', parent: str = lab.PARENT,
                    ) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'link', parent,
                     'type', 'macvlan', 'mode', mode)

    def test_another_kind_of_interface(self) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                     'peer', 'name', 'peer0')
        self.assert_left('a veth', OS_BINDING__LINK_IFACE=lab.PARENT)

    def test_another_mode(self) -> None:
        self.add_macvlan('private')
        self.assert_left('private mode', OS_BREAK0__PARENT=lab.PARENT)

    def test_another_parent(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        self.bind_both()
        self.lab.run('ip', 'link', 'del', 'break0')
        self.add_macvlan(parent='eth1')
        self.assert_left('in bridge mode on')

    def test_an_unmarked_break0(self) -> None:
        self.add_macvlan()
        self.assert_left('it may belong to another program')
        self.cleanup(OS_BREAK0__PARENT=lab.PARENT)
        self.assertIsNone(self.lab.link('break0'))

    def test_without_pods_its_mac_address_says_so(self) -> None:
        self.bind()
        self.unbind()
        self.cleanup()
        self.assertIsNone(self.lab.link('break0'))

    def test_routes_on_an_unmarked_break0(self) -> None:
        self.add_macvlan()
        self.lab.run('ip', 'link', 'set', 'break0', 'up')
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'break0', 'proto',
                     '176')
        self.assert_left('it may belong to another program')
        self.assertEqual({POD}, set(self.lab.routes()))


class TestOtherLedger(CleanupTestCase):

    def state(self) -> list[Any]:
        """Return the state of the node and pods, with nftables rules."""
        return [self.lab.state(), *(
            self.lab.run('nft', 'list', 'ruleset', netns=netns).stdout
            for netns in (None, 'pod', 'far'))]

    def assert_left_alone(self, before: list[Any],
                          state_dir: str = '/run/other') -> None:
        own = {'OS_BREAK0__STATE_DIR': state_dir}
        planned = self.cleanup('--dry-run', code=1, **own)
        self.assertIn('! interface break0: it belongs to the ledger', planned)
        for _ in range(2):
            printed = self.cleanup(code=1, **own)
            self.assertEqual([], [
                line for line in printed.splitlines() if line.startswith('-')
                and line != '- directory ' + state_dir])
            self.assertEqual(planned, printed)
            self.assertFalse(os.path.exists(state_dir))
            self.assertEqual(before, self.state())
            planned = planned.replace('- directory %s\n' % state_dir, '')
        self.assertEqual(
            [True] * 4, [self.lab.ping(*way) for way in (
                (POD,), (lab.NODE, 'pod'), (FAR_POD,), (lab.NODE, 'far'))])

    def test_it_lives(self) -> None:
        self.bind_both()
        self.assert_left_alone(self.state())

    def test_pods_that_both_have_bound(self) -> None:
        self.bind(FAR_POD, netns=self.far_netns, state_dir='/run/other',
                  mac_of_pod=self.mac_of('far'))
        self.bind_both()
        self.assert_left_alone(self.state())

    def test_sync_deletes_nothing(self) -> None:
        self.bind_both()
        before = self.state()
        for args in (('--dry-run',), ()):
            done = self.call('sync', '--delete-unclaimed', *args,
                             OS_BREAK0__STATE_DIR='/run/other')
            self.assertEqual(3, done.returncode, done.stdout + done.stderr)
            self.assertIn('break0 belongs to the ledger', done.stderr)
            self.assertEqual({'!'}, {line[0] for line
                                     in done.stdout.splitlines()})
            self.assertEqual(before, self.state())

    def test_it_was_lost(self) -> None:
        before = self.state()
        self.bind_both()
        shutil.rmtree(STATE_DIR)
        planned = self.cleanup('--dry-run', code=1)
        self.assertIn('namespace ' + self.far_netns, planned)
        self.assertEqual(planned, self.cleanup())
        self.assertEqual(before, self.state())
        self.assertEqual('', self.cleanup())

    def test_each_has_a_parent(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        self.lab.run('ip', 'link', 'set', 'eth1', 'up')
        self.bind_both()
        self.bind('100.75.50.1', '100.75.50.2', parent='eth1')
        self.bind('100.75.50.3', parent='eth1', state_dir='/run/other')
        routes = self.lab.routes('break0-eth1')
        self.assertEqual(3, len(routes))
        planned = self.cleanup('--dry-run', code=1)
        self.assertEqual(planned, self.cleanup(code=1))
        self.assertIn('! interface break0-eth1: it belongs to the ledger',
                      planned)
        self.assertIsNone(self.lab.link('break0'))
        self.assertEqual(routes, self.lab.routes('break0-eth1'))
        self.assertIn('table netdev kuryr-break0-break0-eth1', self.lab.run(
            'nft', 'list', 'ruleset').stdout)

    def test_killed(self) -> None:
        before = self.state()
        for owner, name, after in (
                (podside, 'withdraw', True), (kernel.Netlink, 'change', True),
                (Guard, 'remove', False), (Guard, 'remove', True),
                (kernel.Netlink, 'delete_link', True),
                (ledger.Ledger, 'clear', False)):
            for lost in (False, True):
                with self.subTest(name=name, after=after, lost=lost):
                    self.bind_both()
                    if lost:
                        shutil.rmtree(STATE_DIR)
                    self.assertEqual(-signal.SIGKILL, base.wait_for(
                        base.in_child(self.killed(owner, name, after))))
                    self.cleanup()
                    self.assertEqual(before, self.state())

    def killed(self, owner: Any, name: str, after: bool
               ) -> Callable[[], Optional[object]]:
        """Return a function that runs a cleanup until a call kills it.

        :param after: kill the cleanup after the call of owner.name, not before
        """
        call = getattr(owner, name)

        def dying(*args: Any, **kwargs: Any) -> None:
            if after:
                call(*args, **kwargs)
            base.die()

        def cleanup() -> None:
            with mock.patch.object(owner, name, dying):
                list(Cleanup(base.options(), None, False).run())

        return cleanup


class TestOthersAtWork(CleanupTestCase):

    def test_an_agent_makes_nothing_again(self) -> None:
        before = self.lab.state()
        agent = program.start(
            [program.BREAK0, 'agent'], stderr=subprocess.DEVNULL,
            env={**os.environ, 'OS_BREAK0__RESYNC_INTERVAL': '1',
                 })
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.bind_both()
        # The agent is running as soon as it has restored break0.
        self.lab.run('ip', 'link', 'del', 'break0')
        lab.until(lambda: len(self.lab.routes()) >= 3)
        self.assertIn('! agent', self.cleanup(code=1))
        synced = metrics.value('sync_seconds_count') or 0
        lab.until(lambda: (metrics.value('sync_seconds_count') or 0)
                  >= synced + 2)
        self.assertIsNone(agent.poll())
        self.assertEqual(before, self.lab.state())

    def test_a_sync_that_has_read_the_ledger_before(self) -> None:
        before = self.lab.state()
        self.bind_both()
        read = reconciler.actual.read
        cleaned: list[str] = []

        def read_then_cleaned_up(*args: Any, **known: Any) -> Any:
            found = read(*args, **known)
            if not cleaned:
                self.assertEqual({ipaddress.ip_address(each)
                                  for each in (POD, POD6, FAR_POD)},
                                 set(found.live))
                cleaned.append(self.cleanup())
            return found

        self.lab.run('ip', 'link', 'del', 'break0')  # the sync has to repair
        with mock.patch.object(reconciler.actual, 'read',
                               read_then_cleaned_up):
            self.manager().sync()
        self.assertEqual(before, self.lab.state())

    def test_a_sync_that_is_about_to_configure_a_pod(self) -> None:
        before = self.lab.state()
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=self.mac_of('pod'))
        # The sync must add the node's new address to the pod's neighbours.
        self.lab.run('ip', 'address', 'add', '100.75.50.1/32', 'dev',
                     lab.PARENT)
        repair = podside.repair
        cleaned = []

        def repair_after_cleanup(*args: Any, **kwargs: Any) -> Any:
            cleaned.append(self.cleanup())
            return repair(*args, **kwargs)

        with mock.patch.object(podside, 'repair', repair_after_cleanup):
            self.manager().sync()
        self.assertEqual(1, len(cleaned))
        self.lab.run('ip', 'address', 'del', '100.75.50.1/32', 'dev',
                     lab.PARENT)
        self.assertEqual(before, self.lab.state())


class TestWithoutThePackage(base.LabTestCase):

    def move(self, path: str, to: str) -> None:
        """Move the mount of a namespace to another path."""
        open(to, 'w').close()
        self.lab.run('mount', '--bind', path, to)
        self.lab.run('umount', path)
        os.remove(path)

    def test_lines_of_the_documentation(self) -> None:
        self.lab.add_ipv6()
        page = pathlib.Path(__file__).parents[2] / (
            'doc/source/install/remove.rst')
        text = page.read_text().partition('.. code-block:: sh\n')[2]
        lines = textwrap.dedent('\n'.join(itertools.takewhile(
            lambda line: not line or line.startswith('   '),
            text.splitlines())))
        self.assertIn('ip link delete break0', lines)
        pods = {'pod': (base.OWNER, POD, POD6),
                'docker': (OTHER_OWNER, OTHER_POD, 'fd00:30::72')}
        paths = [self.lab.add_pod(name, *texts)
                 for name, (_, *texts) in pods.items()]
        before = self.lab.state()
        for path, (name, (owner, *texts)) in zip(paths, pods.items()):
            self.bind(*texts, owner=owner, netns=path, mac_of_pod=str(
                self.lab.ip('link', 'show', 'eth0', netns=name)[0][
                    'address']))
            self.assertTrue(self.lab.ping(texts[0]))
        # Docker mounts its namespaces in this directory.
        os.makedirs('/run/docker/netns')
        self.move(paths[1], '/run/docker/netns/1a2b')
        done = self.lab.run('sh', '-c', lines, check=False)
        self.assertNotIn('not found', done.stdout)
        self.assertFalse(os.path.exists('/run/kuryr-break0'))
        self.move('/run/docker/netns/1a2b', paths[1])
        self.assertEqual(before, self.lab.state())
        for netns in (None, 'pod', 'docker'):
            self.assertEqual('', self.lab.run('nft', 'list', 'ruleset',
                                              netns=netns).stdout)
