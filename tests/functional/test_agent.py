# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
from typing import Callable
from unittest import mock

import psutil

from kuryr_break0.agent import event_filter
from kuryr_break0.agent import loop
from kuryr_break0.engine import reconciler
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import files
from tests.functional.agent_base import AgentTestCase
from tests.functional.agent_base import CONF
from tests.functional.agent_base import MAC
from tests.functional.agent_base import PODS
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.support import lab
from tests.support import metrics
from tests.support import program


class TestRepair(AgentTestCase):

    def test_faults(self) -> None:
        self.fault('break0 deleted', 'ip link del break0')
        self.fault('break0 down', 'ip link set break0 down')
        self.fault('protodown of break0', 'ip link set break0 protodown on')
        self.fault('break0 down and up', 'ip link set break0 down',
                   'ip link set break0 up')
        self.fault('address of the node removed and added',
                   'ip address del %s/24 dev eth0' % lab.NODE,
                   'ip address add %s/24 dev eth0' % lab.NODE)
        self.fault('a route deleted', 'ip route del ' + POD)
        self.fault('all routes flushed', 'ip route flush dev break0')
        self.fault('a route changed',
                   'ip route replace %s dev break0 proto static' % POD)
        self.fault('neighbours flushed',
                   'ip neigh flush dev break0 nud permanent')

    def test_a_changed_item(self) -> None:
        address = 'fd00:30::71'
        self.lab.add_ipv6()
        self.lab.run('ip', 'address', 'add', address + '/64', 'dev',
                     lab.PARENT, 'nodad', netns='pod')
        self.bind(address, netns=self.netns, mac_of_pod=MAC)
        self.wait_for(lambda: self.lab.ping(lab.NODE6, 'pod', cold=False))
        self.healthy = self.items()
        for pod, source in (POD, lab.NODE), (address, lab.NODE6):
            for state in 'permanent', 'noarp', 'stale':
                self.fault('a neighbour of %s is %s' % (pod, state),
                           'ip neigh replace %s dev break0 lladdr '
                           '02:00:00:00:00:66 nud %s' % (pod, state))
            for change in ('dev eth0', 'dev break0',
                           'dev break0 mtu 600 src ' + source):
                self.fault('a route to %s is %s' % (pod, change),
                           'ip route replace %s proto 176 metric %d %s' % (
                               pod, ':' in pod, change))
            self.lab.run('ip', 'route', 'add', pod, 'dev', 'break0', 'proto',
                         '176', 'metric', '5')
            self.wait_for(lambda: len(self.lab.ip(
                '-6' if ':' in pod else '-4', 'route', 'show', pod)) == 1)

    def test_an_address_that_was_a_next_hop(self) -> None:
        # The agent refuses the pod's address while any route has it as a next
        # hop, so the end of one of two routes changes nothing.
        agent = psutil.Process(self.agent.pid)
        self.lab.run('ip', 'link', 'add', 'lan0', 'type', 'veth', 'peer',
                     'name', 'lan1')
        self.lab.run('ip', 'link', 'set', 'lan0', 'up')
        several = 'route %s 192.0.2.0/25', 'route %s 192.0.2.128/25'
        for names, device, ends in (
                (several, lab.PARENT, [each % 'del' for each in several]),
                (['nexthop %s id 7'], lab.PARENT, ['nexthop del id 7']),
                # The kernel sends no route event if the link goes down.
                (several, 'lan0', ['link set lan0 down']),
                (several, 'lan0', ['link del lan0'])):
            if device == 'lan0':
                self.lab.run('ip', 'link', 'set', device, 'up')
            for name in names:
                self.lab.run('ip', *(name % 'add').split(), 'via', POD,
                             'dev', device, 'onlink')
            self.wait_for(lambda: POD not in self.lab.routes())
            for command in ends:
                self.wait_for(lambda: base.is_idle(agent))
                self.assertNotIn(POD, self.lab.routes())
                self.lab.run('ip', *command.split())
            self.wait_for(self.healed)

    def test_parent_replaced(self) -> None:
        # The kernel deletes the pods' macvlans with their parent, so the
        # agent can only restore the routes.
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.wait_for(lambda: 'does not exist on this node' in self.log())
        self.lab.add_nic()
        self.wait_for(lambda: set(self.lab.routes()) == PODS)

    def test_another_interface_in_its_place_is_not_fought(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'up')
        os.kill(self.agent.pid, signal.SIGSTOP)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                     'peer', 'name', 'peer0')
        before = self.lab.link('break0')
        os.kill(self.agent.pid, signal.SIGCONT)
        self.wait_for(lambda: 'break0 exists and is a veth' in self.log())
        self.assertEqual(before, self.lab.link('break0'))
        self.lab.run('ip', 'link', 'del', 'break0')
        self.wait_for(self.healed)

    def test_a_worker_killed_before_its_route(self) -> None:
        # The only event is the write of the record.
        self.assert_noticed()

    def test_the_same_while_it_repairs(self) -> None:
        self.agent.kill()
        self.agent.wait()
        self.lab.settle()  # late events would wake the agent
        made = ledger.Ledger('/run/kuryr-break0', 10)
        address = ipaddress.ip_address(OTHER_POD)
        repair = reconciler.Reconciler.sync

        def sync(self: reconciler.Reconciler) -> reconciler.Outcome:
            outcome = repair(self)
            if made.records.get(address) is None:
                made.records.put([ledger.Record(address, OTHER_OWNER,
                                                lab.PARENT)])
            return outcome

        def run() -> None:
            own = base.options(resync_interval=3600)
            with mock.patch.object(reconciler.Reconciler, 'sync', sync):
                loop.Agent(own, lambda: own).run()

        pid = base.in_child(run)
        try:
            self.wait_for(lambda: OTHER_POD in self.lab.routes())
        finally:
            os.kill(pid, signal.SIGTERM)
            self.assertEqual(0, base.wait_for(pid))

    def test_events_lost(self) -> None:
        os.kill(self.agent.pid, signal.SIGSTOP)
        for _ in range(40):
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            self.lab.run('ip', 'link', 'set', 'break0', 'down')
            self.bind_all()
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        os.kill(self.agent.pid, signal.SIGCONT)
        self.wait_for(self.healed)


#: Source of a program: an agent whose CPU share is used up for hours.
_LATE = '''
import sys
from kuryr_break0.agent import loop
from kuryr_break0 import pace
loop.Pace = lambda credit=-1e4: pace.Pace(credit)
from kuryr_break0.__main__ import main
sys.exit(main())
'''


class TestLate(AgentTestCase):
    """An agent whose CPU share is used up still repairs break0."""

    def start(self) -> subprocess.Popen[str]:
        agent = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', _LATE, '--config-file',
             CONF, '--log-file', '/run/agent.log', 'agent'], text=True)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.wait_for(lambda: metrics.value('sync_seconds_count'))
        return agent

    def test_a_loss_is_repaired(self) -> None:
        for _ in range(3):
            self.fault('break0 deleted', 'ip link del break0')
            self.fault('break0 down', 'ip link set break0 down')


class TestReadOnlyLog(AgentTestCase):
    """An agent that cannot write kuryr-daemon's log file logs to stderr."""

    def start(self) -> subprocess.Popen[str]:
        with open(CONF, 'a') as file:
            file.write('[DEFAULT]\nlog_file = /run/logs/kuryr.log\n'
                       'use_stderr = false\n')
        os.makedirs('/run/logs')
        self.lab.run('mount', '-t', 'tmpfs', '-o', 'ro', 'none', '/run/logs')
        self.addCleanup(self.lab.run, 'umount', '/run/logs')
        stderr = open('/run/agent.log', 'w')
        self.addCleanup(stderr.close)
        agent = program.start([program.BREAK0, '--config-file', CONF, 'agent'],
                              stderr=stderr)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.wait_for(lambda: metrics.value('sync_seconds_count'))
        return agent

    def test_it_logs_to_stderr(self) -> None:
        self.assertIn('The agent cannot write the log file /run/logs/'
                      'kuryr.log (Read-only file system)', self.log())
        self.wait_for(lambda: 'Watching' in self.log())


class TestStateDirectory(AgentTestCase):
    """The agent watches the state directory, even after its removal."""

    def count(self) -> float:
        return metrics.value('sync_seconds_count') or 0

    def change(self, *command: str) -> None:
        """Run a command and wait until it has caused a sync."""
        self.lab.settle()
        before = self.count()
        self.lab.run(*command)
        self.wait_for(lambda: self.count() > before)

    def test_removed(self) -> None:
        self.change('rm', '-r', '/run/kuryr-break0')
        self.assert_noticed()

    def test_records_removed(self) -> None:
        self.change('rm', '-r', '/run/kuryr-break0/addresses')
        self.assert_noticed()

    def test_write_that_fails(self) -> None:
        # A failed write, as on a full disk, leaves an unfinished file. If this
        # file's inotify event caused a sync, the sync would fail to write too,
        # and the syncs would never stop.
        process = psutil.Process(self.agent.pid)
        self.wait_for(lambda: base.is_idle(process))
        before = self.count()
        path = '/run/kuryr-break0/addresses/%s1.json' % files.UNFINISHED
        self.lab.run('sh', '-c', 'touch {0}; rm {0}'.format(path))
        self.wait_for(lambda: base.is_idle(process))
        self.assertEqual(before, self.count())
        self.assert_noticed()

    def test_moved(self) -> None:
        self.change('mv', '/run/kuryr-break0', '/run/earlier')
        self.assert_noticed()

    def test_no_room_to_watch_it(self) -> None:
        path = '/proc/sys/user/max_inotify_watches'
        with open(path) as file:
            self.addCleanup(self.lab.run, 'sysctl', '-w',
                            'user.max_inotify_watches=' + file.read().strip())
        with open(path, 'w') as file:
            file.write('0')
        self.change('rm', '-r', '/run/kuryr-break0/addresses')
        self.wait_for(lambda: 'max_user_watches' in self.log())
        self.lab.run('ip', 'link', 'del', 'break0')
        self.wait_for(lambda: self.lab.link('break0'))
        self.assertEqual(1, self.log().count('max_user_watches'))

    def test_records_moved(self) -> None:
        self.change('mv', '/run/kuryr-break0/addresses', '/run/earlier')
        self.assert_noticed()


class TestEventFilter(base.LabTestCase):

    def test_own_changes_are_no_events(self) -> None:
        self.lab.add_ipv6()
        all_of_it = POD, 'fd00:30::71'
        netns = self.lab.add_pod('pod', *all_of_it, mac=MAC)
        self.bind('10.20.0.1')  # creates break0
        own = base.options()
        heard = event_filter.EventFilter(own, ledger.Ledger(own.state_dir))
        heard.update()
        self.lab.settle()
        flush = ['%s flush dev break0' % each for each in ('route', 'neigh')]
        metric = 'route add %s dev break0 proto 176 metric 5' % POD
        router = 'route %%s 192.0.2.0/24 via %s dev eth0' % POD

        def bind() -> None:
            self.bind(*all_of_it, netns=netns, mac_of_pod=MAC)

        def sync() -> None:
            heard.update(self.manager().sync())

        steps: tuple[tuple[Callable[[], object], list[str]], ...] = (
            (bind, []), (bind, flush), (bind, []),
            (lambda: self.manager().sync(), flush), (sync, flush),
            (sync, [metric]), (sync, [router % 'add']),
            (sync, [router % 'del']), (lambda: self.unbind(*all_of_it), []))
        with kernel.Events() as events:
            for number, (step, before) in enumerate(steps):
                for command in before:
                    self.lab.run('ip', *command.split())
                if before:
                    events.get()
                step()
                found = events.get()
                self.assertEqual([], list(filter(heard.include, found)),
                                 number)
                self.assertNotEqual([], found, number)

    def test_a_break0_is_lost_before_the_last_event_of_it(self) -> None:
        self.bind(POD, mac_of_pod=MAC)
        own = base.options()
        heard = event_filter.EventFilter(own, ledger.Ledger(own.state_dir))
        heard.update()
        with kernel.Events() as events:
            for command, lost in (('set break0 mtu 1400', False),
                                  ('set lo down', False),
                                  ('set break0 down', True)):
                self.lab.run('ip', 'link', *command.split())
                self.assertEqual(lost, heard.include_loss(events.get()),
                                 command)
            self.lab.run('ip', 'link', 'del', 'break0')
            self.assertTrue(heard.include_loss(events.get()))


class TestProcess(AgentTestCase):

    def test_idle(self) -> None:
        process = psutil.Process(self.agent.pid)
        self.wait_for(lambda: base.is_idle(process))
        self.assertLess(process.memory_info().rss, 64 * 2 ** 20)

    def test_sigterm(self) -> None:
        self.agent.terminate()
        self.assertEqual(0, self.agent.wait(lab.PATIENCE))
        self.assertEqual(PODS, set(self.lab.routes()))

    def test_sighup(self) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\naddr = x\n')
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for(lambda: 'Keeping the previous' in self.log())
        with open(CONF, 'w') as file:
            file.write('[break0]\naddr = 10.99.0.7\n')
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for(lambda: '10.99.0.7' in {
            address['local'] for link in self.lab.ip(
                'address', 'show', 'dev', 'break0')
            for address in link.get('addr_info', ())})

    def test_a_reload_once_systemd_knows_its_start(self) -> None:
        for address in '/run/notify', '\0notify':
            with self.subTest(address), socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
                systemd.bind(address)
                systemd.settimeout(lab.PATIENCE)
                self.agent.kill()
                self.agent.wait()
                self.agent = self.launch(
                    NOTIFY_SOCKET=address.replace('\0', '@'))
                self.assertEqual(b'READY=1', systemd.recv(100))
                before = self.log().count('Read the configuration again')
                self.agent.send_signal(signal.SIGHUP)
                self.wait_for(lambda: self.log().count(
                    'Read the configuration again') > before)

    def test_systemd_cannot_be_told(self) -> None:
        self.agent.kill()
        self.agent.wait()
        self.agent = self.launch(NOTIFY_SOCKET='/run/nobody')
        self.wait_for(lambda: metrics.value('sync_seconds_count'))
        self.assertIn('Cannot tell systemd by $NOTIFY_SOCKET, /run/nobody, '
                      'that the agent has started: ', self.log())

    def test_the_timer(self) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 1\n')
        self.agent.send_signal(signal.SIGHUP)
        # The kernel sends no event for a sysctl, so only the timer causes the
        # repair.
        kernel.write_sysctl('ipv4/conf/break0/arp_filter', 0)
        self.wait_for(lambda: kernel.read_sysctl(
            'ipv4/conf/break0/arp_filter') == 1)

    def test_heartbeat(self) -> None:
        heartbeat = ledger.Ledger('/run/kuryr-break0', 10).heartbeat
        base.beat_at(heartbeat.path, files.now() - 7200)
        self.assertGreater(heartbeat.age() or 0, 3600)
        # After a failed sync, the heartbeat stays old, so that every ADD and
        # DEL does its own repairs.
        self.lab.run('ip', 'link', 'set', 'break0', 'name', 'mine')
        self.wait_for(lambda: 'Address already in use' in self.log())
        self.assertGreater(heartbeat.age() or 0, 3600)
        self.lab.run('ip', 'link', 'set', 'mine', 'name', 'break0')
        self.wait_for(lambda: (heartbeat.age() or 0) < 3600)
        base.beat_at(heartbeat.path, files.now() - 7200)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.wait_for(lambda: (heartbeat.age() or 0) < 3600)
        self.agent.kill()
        self.agent.wait()
        self.assertIsNone(heartbeat.age())

    def test_a_sandbox_that_ended(self) -> None:
        # The node gets no event for the end of another namespace.
        with open(CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 1\n')
        self.agent.send_signal(signal.SIGHUP)
        self.lab.del_netns('pod')
        self.wait_for(lambda: set(self.lab.routes()) == PODS - {POD})

    def test_killed_and_started_again(self) -> None:
        self.agent.kill()
        self.agent.wait()
        self.lab.run('ip', 'link', 'del', 'break0')
        self.start()
        self.wait_for(self.healed)
