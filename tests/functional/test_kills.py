# SPDX-License-Identifier: Apache-2.0

"""A CNI ADD succeeds after an earlier ADD was killed at any step.

The ADD deletes the leftover interface of the killed ADD. If an interface of
the same name has another origin, it stays and the ADD fails.
"""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any, Callable, Iterator
from unittest import mock

from kuryr_kubernetes.cni.binding import base as b_base
from pyroute2.iproute import linux

from kuryr_break0 import kernel
from kuryr_break0.kuryr import driver
from tests.functional import base
from tests.functional.base import POD
from tests.functional.driver_base import CONTAINER
from tests.functional.driver_base import DriverTestCase
from tests.functional.driver_base import set_options
from tests.functional.driver_base import vif
from tests.support import lab


class TestKills(DriverTestCase):

    #: Number of interfaces that killed ADDs leave on the node.
    leftovers = 1

    def setUp(self) -> None:
        super().setUp()
        # break0 exists before the kills, so every counted step concerns the
        # pod.
        self.connect(vif=vif('100.75.30.70'),
                     netns=self.lab.add_netns('first'), container_id='first')
        self.before = self.node()
        self.left: dict[str, Any] = {}

    def node(self) -> dict[str, Any]:
        return {link['ifname']: link for link in self.lab.ip('link', 'show')}

    def add(self, netns: str, container_id: str) -> None:
        """Run an ADD and check that the pod is connected."""
        self.connect(netns=netns, container_id=container_id)
        b_base._configure_l3(self.vif, 'eth0', netns, True)
        self.assertTrue(self.lab.ping(POD))
        self.assertEqual(set(self.before), set(self.node()))
        link, = (link for link in self.lab.ip(
            'link', 'show', netns=os.path.basename(netns))
            if link['ifname'] != 'lo')
        self.assertEqual(('eth0', str(self.vif.address), 'default'),
                         (link['ifname'], link['address'], link['group']))

    def killed_after(self, steps: int) -> bool:
        """Kill an ADD after a number of steps.

        A step is a netlink request that changes the kernel. Return False if
        the ADD ended before the kill.
        """
        left = steps

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if args[0] not in ('get', 'dump'):  # pyroute2's reads
                    if left == 0:
                        base.die()
                    left -= 1
                return function(self, *args, **kwargs)
            return counted

        def add() -> None:
            with mock.patch.object(linux.RTNL_API, 'link',
                                   counting(linux.RTNL_API.link)), \
                mock.patch.object(kernel.Netlink, '_send',
                                  counting(kernel.Netlink._send)):
                self.connect()

        ended = base.wait_for(base.in_child(add))
        self.assertIn(ended, (0, -signal.SIGKILL))
        return ended != 0

    def kills(self) -> Iterator[int]:
        """Kill an ADD after 0 steps, 1 step and so on; yield each number."""
        for steps in itertools.count():
            if not self.killed_after(steps):
                break
            self.left.update({name: link for name, link in self.node().items()
                              if name not in self.before})
            yield steps
            self.disconnect()
        # Kuryr creates the interface on the node and then moves it, so one
        # kill must hit the time in between. Direct binding creates the
        # interface in the pod.
        self.assertEqual(self.leftovers, len(self.left))
        for name, link in self.left.items():
            self.assertEqual(self.vif.vif_name, name)
            self.assertNotEqual(str(self.vif.address), link['address'])

    def test_an_add_in_the_same_sandbox(self) -> None:
        for steps in self.kills():
            with self.subTest(steps=steps):
                self.add(self.netns, CONTAINER)

    def test_a_del_and_an_add_in_another_sandbox(self) -> None:
        for steps in self.kills():
            with self.subTest(steps=steps):
                name = 'after-%d' % steps
                self.disconnect()
                netns = self.lab.add_netns(name)
                self.add(netns, name)
                self.disconnect(netns=netns, container_id=name)


class TestKillsDirectly(TestKills):

    binding = 'auto'
    leftovers = 0


class TestLeftover(DriverTestCase):
    """An interface on the node already has the VIF's name."""

    def leave(self) -> None:
        """Kill an ADD before Kuryr moves the interface into the pod."""
        set_options(self, pod_binding='kuryr')
        link = linux.RTNL_API.link

        def dying(self: Any, command: str, **kwargs: Any) -> Any:
            if 'net_ns_fd' in kwargs:
                base.die()
            return link(self, command, **kwargs)

        def add() -> None:
            with mock.patch.object(linux.RTNL_API, 'link', dying):
                self.connect()

        self.assertEqual(-signal.SIGKILL, base.wait_for(base.in_child(add)))
        self.assertIsNotNone(self.lab.link(self.vif.vif_name))
        set_options(self, pod_binding=self.binding)

    def test_it_is_removed(self) -> None:
        self.leave()
        self.connect()
        self.assertIsNone(self.lab.link(self.vif.vif_name))
        self.assertEqual(['eth0'], list(self.pod_links()))

    def test_the_ledger_was_lost_meanwhile(self) -> None:
        self.leave()
        self.lab.run('rm', '-rf', '/run/kuryr-break0')
        self.connect()
        self.assertIsNone(self.lab.link(self.vif.vif_name))

    def test_break0_is_disabled(self) -> None:
        self.leave()
        set_options(self, enabled=False)
        self.connect()
        self.assertIsNone(self.lab.link(self.vif.vif_name))

    def refused(self, name: str, mac: str = '') -> None:
        """Check that an ADD with this vif_name fails and changes nothing."""
        self.vif.vif_name = name
        if mac:
            self.vif.address = mac
        before = self.node()
        with self.assertRaisesRegex(driver.PodNotConnected,
                                    'Correct vif_name in the KuryrPort'):
            self.connect()
        self.assertEqual(before, self.node())
        self.assertEqual({}, self.pod_links())

    def node(self) -> list[Any]:
        # The kernel sets the operational state with a delay, so the result
        # excludes the state.
        return [(link['ifname'], link['ifindex'], link['address'],
                 link['flags'], link['group'])
                for link in self.lab.ip('link', 'show')]

    def test_a_macvlan_of_the_operator(self) -> None:
        own = str(self.vif.address)
        for name, parameters in {
                'its-own': (), 'the-same': ('address', own),
                'is-up': ('address', own, 'up'),
                'in-a-group': ('address', own, 'group', '7')}.items():
            with self.subTest(name):
                self.lab.run('ip', 'link', 'add', name, 'link', 'eth0',
                             *parameters, 'type', 'macvlan', 'mode',
                             'bridge')
                self.refused(name)
                self.lab.run('ip', 'link', 'del', name)

    def test_a_name_that_was_a_leftovers(self) -> None:
        self.leave()
        name = self.vif.vif_name
        self.lab.run('ip', 'link', 'del', name)
        self.lab.run('ip', 'link', 'add', name, 'link', 'eth0',
                     'type', 'macvlan', 'mode', 'bridge')
        self.refused(name)

    def test_others(self) -> None:
        self.lab.run('ip', 'link', 'add', 'veth7', 'type', 'veth',
                     'peer', 'name', 'peer7')
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'veth7',
                     'altname', 'alias7')
        for name in ('veth7', 'alias7', lab.PARENT, 'lo'):
            with self.subTest(name):
                self.refused(name)

    def test_break0_that_is_not_there_yet(self) -> None:
        for name in ('break0', 'break0-eth1'):
            with self.subTest(name):
                self.refused(name)

    def test_break0(self) -> None:
        self.connect(vif=vif('100.75.30.70'),
                     netns=self.lab.add_netns('first'), container_id='first')
        self.refused('break0')
        self.refused('break0', (self.lab.link('break0') or {})['address'])


class TestLeftoverDirectly(TestLeftover):

    binding = 'auto'
