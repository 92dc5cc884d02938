# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any, Iterator

import psutil
import requests

from tests.e2e.base import DaemonTestCase
from tests.e2e.base import POD
from tests.support import kuryr
from tests.support import lab
from tests.support import program


#: Seconds for which agent and daemon are killed at random moments
SOAK = int(os.environ.get('SOAK_SECONDS', '30'))

OTHER_POD = '100.75.30.72'

#: Text of sitecustomize.py: kills a process of Kuryr before one change of an
#: interface.
DYING = """\
import os, signal
from pyroute2.iproute import linux
link = linux.RTNL_API.link
def dying(self, *args, **kwargs):
    try:
        with open(%r) as file:
            if file.read() in kwargs:
                os.unlink(file.name)
                os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:
        pass
    return link(self, *args, **kwargs)
linux.RTNL_API.link = dying
"""


class NothingLostTestCase(DaemonTestCase):

    def sync(self) -> None:
        """Run ``sync``, in place of the agent's timer."""
        program.run([program.BREAK0, '--config-file', self.node.conf, 'sync'],
                    stdout=subprocess.DEVNULL, check=True)

    def end_sandbox(self, pod: kuryr.Pod) -> None:
        self.node.lab.del_netns(pod.name)

    def restart_daemon(self) -> None:
        self.node.kill_daemon()
        self.node.start_daemon()

    def forget(self, pod: kuryr.Pod) -> None:
        """Delete the pod from the API, and let the daemon read the event."""
        self.node.delete_pod(pod)
        time.sleep(0.2)


class TestLateDel(NothingLostTestCase):
    """A DEL of an old sandbox with a live pod's address unbinds nothing."""

    def setUp(self) -> None:
        super().setUp()
        self.node.start_daemon()
        self.old = self.node.add_pod('old', POD)
        self.add(self.old)

    def replace_old(self) -> kuryr.Pod:
        """Assign the address to a new pod before the DEL of the old pod."""
        self.forget(self.old)
        new = self.node.add_pod('new', POD)
        self.add(new)
        return new

    def test_of_another_pod_that_had_the_address(self) -> None:
        new = self.replace_old()
        self.delete(self.old)
        self.assert_reachable(new)

    def test_of_another_pod_after_the_end_of_its_sandbox(self) -> None:
        new = self.replace_old()
        self.end_sandbox(self.old)
        self.delete(self.old)
        self.assert_reachable(new)

    def test_of_an_earlier_sandbox_after_a_restart(self) -> None:
        earlier = self.old.container_id
        self.delete(self.old)
        self.old.container_id = 'the-sandbox-after-it'
        self.add(self.old)
        self.restart_daemon()
        self.delete(self.old, CNI_CONTAINERID=earlier,
                    CNI_NETNS='/run/netns/gone')
        self.assert_reachable(self.old)

    def test_of_a_pod_of_the_same_name_after_a_restart(self) -> None:
        # A pod of a StatefulSet keeps name and address, and gets a new uid.
        self.forget(self.old)
        again = self.node.add_pod('old', POD,
                                  netns=self.node.lab.add_netns('again'))
        self.restart_daemon()
        self.add(again)
        self.restart_daemon()
        self.delete(self.old)
        self.assertTrue(self.node.lab.ping(POD))
        self.assertTrue(self.node.lab.ping(lab.NODE, 'again'))

    def test_while_the_new_sandbox_is_being_added(self) -> None:
        earlier = self.old.container_id
        for delay in (0.0, 0.05, 0.1, 0.15, 0.2):
            self.old.container_id = 'sandbox-%.2f' % delay
            with self.subTest(delay=delay), \
                    concurrent.futures.ThreadPoolExecutor(1) as pool:
                adding = pool.submit(self.node.request, self.old, 'ADD')
                time.sleep(delay)
                late = self.node.request(self.old, 'DEL',
                                         CNI_CONTAINERID=earlier,
                                         CNI_NETNS='/run/netns/gone')
                self.assertEqual(204, late.status)
                self.assertEqual(202, adding.result().status)
                self.assert_reachable(self.old)
            earlier = self.old.container_id

    def test_without_a_namespace_after_the_pod_is_gone(self) -> None:
        """A DEL without CNI_NETNS does not delete the node's NIC.

        containerd repeats a DEL without CNI_NETNS. If the pod also has no
        KuryrPort, Kuryr itself would delete the interface CNI_IFNAME in the
        namespace of kuryr-daemon (b_base.cleanup): eth0, the node's NIC.
        """
        self.delete(self.old)
        self.node.delete_pod(self.old)
        gone = '/run/netns/gone'
        for netns in ('', '/proc/%d/ns/net' % os.getpid(), gone):
            self.delete(self.old, CNI_NETNS=netns)
            self.assertIsNotNone(self.node.lab.link(lab.PARENT), netns)
        # Kuryr's library creates a namespace at a path that does not exist.
        self.assertFalse(os.path.exists(gone))

    def test_a_pod_without_a_del_from_kuryr(self) -> None:
        # The pod is deleted from the API while the daemon is down.
        self.node.kill_daemon()
        self.node.delete_pod(self.old)
        self.node.start_daemon()
        self.delete(self.old)
        self.end_sandbox(self.old)
        self.assertIn(POD, self.node.lab.routes())
        self.add(self.node.add_pod('other', '100.75.30.72'))
        self.assertEqual({'100.75.30.72'}, set(self.node.lab.routes()))


class TestKills(NothingLostTestCase):

    @contextlib.contextmanager
    def killing(self, randomness: random.Random) -> Iterator[None]:
        """Kill workers of the daemon at random moments within the block."""
        assert self.node.daemon is not None
        server = next(
            process for process
            in psutil.Process(self.node.daemon.pid).children(recursive=True)
            if 'server' in ' '.join(process.cmdline()))
        ending = threading.Event()

        def kill() -> None:
            while not ending.wait(randomness.uniform(0.01, 0.15)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    workers = server.children()
                    if workers:
                        randomness.choice(workers).kill()

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()

    def attempt(self, pod: kuryr.Pod, command: str) -> bool:
        try:
            return self.node.request(pod, command).status in (202, 204)
        except requests.RequestException:
            return False  # the worker was killed, maybe after partial changes

    def test_workers_and_daemon_killed_at_random(self) -> None:
        seed = random.randrange(10 ** 6)
        randomness = random.Random(seed)
        self.node.start_daemon()
        pods = [self.node.add_pod('pod-%d' % number, '100.75.30.%d' % number)
                for number in range(100, 108)]
        bound: set[str] = set()
        unsure = killed = 0
        for number in range(SOAK * 2 // 3):
            commands = {pod.name: 'DEL' if pod.name in bound else 'ADD'
                        for pod in pods}
            with self.killing(randomness), \
                    concurrent.futures.ThreadPoolExecutor(8) as pool:
                done = dict(zip(commands, pool.map(
                    lambda pod: self.attempt(pod, commands[pod.name]),
                    pods)))
            if randomness.random() < 0.1:
                self.restart_daemon()
                killed += 1
            for pod in pods:
                if not done[pod.name]:
                    # A runtime undoes a failed ADD by a DEL, and repeats the
                    # DEL until it succeeds.
                    unsure += 1
                    self.delete(pod)
                    commands[pod.name] = 'DEL'
            bound = {name for name, command in commands.items()
                     if command == 'ADD'}
            self.sync()
            self.assertEqual(
                {'100.75.30.' + name[len('pod-'):] for name in bound},
                set(self.node.lab.routes()),
                'round %d of seed %d' % (number, seed))
        print('%d requests lost their worker, %d times the daemon was '
              'killed; seed %d' % (unsure, killed, seed), flush=True)
        self.assertGreater(unsure, 0)

    def test_thirty_workers_add_and_delete_at_once(self) -> None:
        self.node.start_daemon()
        pods = [self.node.add_pod('pod-%d' % number, '100.75.30.%d' % number)
                for number in range(100, 130)]
        bound: set[str] = set()
        for number in range(SOAK // 3):
            # Each round after the first binds or unbinds a third of the pods.
            turn = pods[number % 3::3] if number else pods[::2]
            with concurrent.futures.ThreadPoolExecutor(30) as pool:
                answers = list(pool.map(lambda pod: self.node.request(
                    pod, 'DEL' if pod.name in bound else 'ADD'), turn))
            self.assertEqual(set(), {answer.status for answer in answers}
                             - {202, 204}, self.node.errors())
            bound ^= {pod.name for pod in turn}
            self.assertEqual(
                {'100.75.30.' + name[len('pod-'):] for name in bound},
                set(self.node.lab.routes()), 'round %d' % number)


class TestKilledWithinAnAdd(NothingLostTestCase):
    """A worker killed before it finishes the interface leaves nothing."""

    binding = 'kuryr'

    def setUp(self) -> None:
        super().setUp()
        # Each Python that starts from now on imports sitecustomize.py.
        self.armed = os.path.join(self.node.dir, 'armed')
        with open(os.path.join(self.node.dir, 'sitecustomize.py'),
                  'w') as file:
            file.write(DYING % self.armed)
        self.start_daemon()
        self.add(self.node.add_pod('first', '100.75.30.70'))  # makes break0
        self.before = self.links()

    def restart_daemon(self) -> None:
        self.node.kill_daemon()
        self.start_daemon()

    def start_daemon(self) -> None:
        self.node.start_daemon('pod_binding = ' + self.binding,
                               PYTHONPATH=self.node.dir)

    def links(self) -> set[str]:
        return {link['ifname'] for link in self.node.lab.ip('link', 'show')}

    def killed(self, before: str = 'net_ns_fd') -> kuryr.Pod:
        """Create a pod, and kill its ADD before a change of its interface.

        :param before: the attribute that the change would set: "net_ns_fd"
            of the interface on the node, or "state" of the interface in the
            pod's namespace
        """
        pod = self.node.add_pod('pod-' + before.replace('_', '-'),
                                POD if before == 'state' else OTHER_POD)
        with open(self.armed, 'w') as file:
            file.write(before)
        with self.assertRaises(requests.RequestException):
            self.node.request(pod, 'ADD')
        self.assertFalse(os.path.exists(self.armed))
        self.assertEqual(before == 'net_ns_fd', self.links() != self.before)
        return pod

    def assert_added(self, pod: kuryr.Pod) -> None:
        self.add(pod)
        self.assert_reachable(pod)
        self.assertEqual(self.before, self.links())

    def test_the_same_sandbox(self) -> None:
        for before in ('net_ns_fd', 'state'):
            with self.subTest(before=before):
                self.assert_added(self.killed(before))

    def test_another_sandbox(self) -> None:
        for before in ('net_ns_fd', 'state'):
            with self.subTest(before=before):
                pod = self.killed(before)
                self.delete(pod)
                self.end_sandbox(pod)
                pod.container_id += '-again'
                pod.netns = self.node.lab.add_netns(pod.name)
                self.assert_added(pod)

    def test_the_daemon_is_killed_too(self) -> None:
        pod = self.killed()
        self.restart_daemon()
        self.assert_added(pod)

    def test_direct_from_then_on(self) -> None:
        pod = self.killed()
        self.binding = 'auto'
        self.restart_daemon()
        self.assert_added(pod)


class TestAgentBeside(NothingLostTestCase):

    def start_agent(self) -> Any:
        agent = program.start(
            [program.BREAK0, '--config-file', self.node.conf, 'agent'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        return agent

    def test_both_killed_at_random(self) -> None:
        # Agent and daemon share only the ledger, its lock and the kernel.
        seed = random.randrange(10 ** 6)
        randomness = random.Random(seed)
        self.node.start_daemon()
        fixed = {'10.20.%d.%d' % divmod(number, 250)
                 for number in range(1, 493)}
        code = (
            'import ipaddress, sys\n'
            'from oslo_config import cfg\n'
            'from kuryr_break0 import config, ledger, manager\n'
            'conf = cfg.ConfigOpts(); conf([], default_config_files=[])\n'
            'manager.Break0Manager(config.load(conf)).bind(\n'
            '    ledger.Owner("fixed", "eth0"),\n'
            '    [ipaddress.ip_address(a) for a in sys.argv[1:]],\n'
            '    parent="eth0")\n')
        subprocess.run([sys.executable, '-c', code, *sorted(fixed)],
                       check=True, stdout=subprocess.DEVNULL)
        pods = [self.node.add_pod('pod-%d' % number, '100.75.30.%d' % number)
                for number in range(100, 108)]
        agent = self.start_agent()
        ends = time.monotonic() + SOAK
        bound: set[str] = set()
        while time.monotonic() < ends:
            for pod in randomness.sample(pods, 3):
                command = 'DEL' if pod.name in bound else 'ADD'
                try:
                    (self.add if command == 'ADD' else self.delete)(pod)
                except requests.RequestException:
                    self.fail(self.node.output()[-20000:])
                bound ^= {pod.name}
            what = randomness.choice(('agent', 'daemon', 'break0', 'routes'))
            if what == 'agent':
                agent.kill()
                agent.wait()
                agent = self.start_agent()
            elif what == 'daemon':
                self.restart_daemon()
            elif what == 'break0':
                self.node.lab.run('ip', 'link', 'del', 'break0', check=False)
            else:
                self.node.lab.run('ip', 'route', 'flush', 'dev', 'break0',
                                  check=False)
        expected = fixed | {'100.75.30.' + name[len('pod-'):]
                            for name in bound}
        lab.until(lambda: set(self.node.lab.routes()) == expected,
                  lambda: 'seed %d: %s' % (
                      seed, expected ^ set(self.node.lab.routes())))
