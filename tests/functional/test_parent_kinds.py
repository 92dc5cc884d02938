# SPDX-License-Identifier: Apache-2.0

"""Node and pods on each kind of parent interface.

If the kernel lacks a kind, the tests of that kind are skipped. TestFullFilter
needs two real NICs on one wire, such as two NICs of QEMU on a hub:
NICS="eth0 eth1" names these NICs. The tests take the NICs over, so never name
NICs of a machine in use.
"""

from __future__ import annotations

import abc
import os
import pathlib
from typing import Any, ClassVar, Optional
import unittest

from kuryr_break0 import exceptions
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import OTHER6
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.functional.doctor.base import SUBNETS
from tests.functional import parents_base
from tests.support import lab
from tests.support import program

CONF, LOG = '/run/kuryr.conf', '/run/agent.log'
VLAN = '50'
#: Name of the VRF, and number of its table.
VRF, TABLE = 'red', 10
#: QEMU's virtio NIC filters up to 64 MAC addresses, others up to 16.
CROWD = 80


def add_link(test: base.LabTestCase, kind: str, name: str, *options: str,
             on: Optional[str] = None, netns: Optional[str] = None) -> None:
    """Add an interface; skip the test if the kernel has no such kind."""
    done = test.lab.run(
        'ip', 'link', 'add', *(('link', on) if on else ()), name, 'type',
        kind, *options, netns=netns, check=False)
    if 'Unknown device type' in done.stdout:
        test.skipTest('needs the module ' + kind)
    test.assertEqual(0, done.returncode, done.stdout)


def add_vlan(test: base.LabTestCase, on: str, lan: str = 'nic') -> None:
    """Add a VLAN interface on the node, and one on the LAN host."""
    for netns, each in ((None, on), ('lan', lan)):
        name = '%s.%s' % (each, VLAN)
        add_link(test, 'vlan', name, 'id', VLAN, on=each, netns=netns)
        test.lab.run('ip', 'link', 'set', name, 'up', netns=netns)


class ParentKindTestCase(DoctorTestCase):
    """Two pods on a parent.

    :cvar PARENT: name of the parent
    :cvar LAN: name of the interface that has the LAN host's addresses
    :cvar NICS: names of the LAN host's NICs
    :cvar OPTIONS: options of [break0]
    :ivar VRF: name of the parent's VRF, or None
    """

    PARENT = lab.PARENT
    LAN = 'nic'
    NICS: ClassVar[tuple[str, ...]] = ('nic',)
    OPTIONS: ClassVar[dict[str, Any]] = {}
    VRF: Optional[str] = None

    @abc.abstractmethod
    def build(self) -> None:
        """Build the parent interface on the NIC."""

    def set_up_pods(self) -> None:
        run = self.lab.run
        for netns, name in ((None, lab.PARENT), ('lan', 'nic')):
            run('ip', 'address', 'flush', 'dev', name, 'scope', 'global',
                netns=netns)
        # The LAN host must keep its IPv6 addresses without a carrier.
        run('sysctl', '-w', 'net.ipv6.conf.all.keep_addr_on_down=1',
            netns='lan')
        self.build()
        for each in (lab.LAN + '/24', lab.LAN6 + '/64'):
            run('ip', 'address', 'add', each, 'dev', self.LAN,
                *(('nodad',) if ':' in each else ()), netns='lan')
        self.address()
        for name, owner, addresses in (
                ('pod', base.OWNER, (POD4, POD6)),
                ('other', base.OTHER_OWNER, (OTHER4, OTHER6))):
            path = self.lab.add_pod(name, *addresses, mac=MACS[name],
                                    parent=self.PARENT)
            self.bind(*addresses, owner=owner, netns=path,
                      parent=self.PARENT, mac_of_pod=MACS[name],
                      subnets=SUBNETS, **self.OPTIONS)

    def address(self) -> None:
        """Set the node's addresses and default routes."""
        for each, gateway in ((lab.NODE + '/24', lab.LAN),
                              (lab.NODE6 + '/64', lab.LAN6)):
            self.lab.run('ip', 'address', 'replace', each, 'dev', self.PARENT,
                         *(('nodad',) if ':' in each else ()))
            self.lab.run('ip', 'route', 'replace', 'default', 'via', gateway,
                         *(('vrf', self.VRF) if self.VRF else ()))

    def ping(self, address: str, netns: Optional[str] = None) -> bool:
        if netns is not None or self.VRF is None:
            return self.lab.ping(address, netns, cold=False)
        return self.lab.run('ping', '-n', '-q', '-c', '1', '-W', '1', '-I',
                            self.VRF, address, check=False).returncode == 0

    def reaches_lan(self) -> bool:
        return self.ping(lab.LAN) and self.ping(lab.LAN6)

    def assert_well(self) -> None:
        """Expect all pings to be answered, and no problem to be reported."""
        self.lab.forget_neighbours()
        # Macvlans notice the parent's new carrier with a delay.
        for address in (POD4, POD6, OTHER4, OTHER6, lab.LAN, lab.LAN6):
            lab.until(lambda: self.ping(address), lambda: 'node to ' + address)
        for address in (lab.NODE, lab.NODE6, OTHER4, OTHER6, lab.LAN,
                        lab.LAN6):
            lab.until(lambda: self.ping(address, 'pod'),
                      lambda: 'pod to ' + address)
        # A sync of the agent may be in progress.
        lab.until(lambda: self.problems(**self.OPTIONS) == [])
        self.assertEqual({}, self.findings(**self.OPTIONS))

    def sync(self) -> None:
        self.manager(**self.OPTIONS).sync()

    def start_agent(self) -> None:
        self.agent.close()
        with open(CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 3600\n' + ''.join(
                '%s = %s\n' % each for each in self.OPTIONS.items()))
        agent = program.start([
            program.BREAK0, '--config-file', CONF, '--log-file', LOG, 'agent'])
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        log = pathlib.Path(LOG)
        lab.until(lambda: log.exists() and 'Watching ' in log.read_text())

    def carrier(self, state: str) -> None:
        for name in self.NICS:
            self.lab.run('ip', 'link', 'set', name, state, netns='lan')


class FewCases:
    """Tests for all kinds of parents."""

    def test_node_and_pods(self: Any) -> None:
        self.assert_well()
        self.assertEqual(self.PARENT, self.lab.link('break0')['link'])

    def test_after_break0_was_deleted(self: Any) -> None:
        mac = self.lab.link('break0')['address']
        self.lab.run('ip', 'link', 'del', 'break0')
        with self.lab.capture() as frames:
            self.sync()
        self.assertEqual([], [each for each in frames if each.src == mac])
        self.assertEqual(mac, self.lab.link('break0')['address'])
        self.assert_well()
        self.assertFalse(self.manager(**self.OPTIONS).sync())


class Cases(FewCases):
    """Tests for parents that can be set down."""

    def test_parent_down_and_up(self: Any) -> None:
        self.lab.run('ip', 'link', 'set', self.PARENT, 'down')
        self.assertIn('%s, the parent of break0, is down' % self.PARENT,
                      self.problems(**self.OPTIONS))
        finding = self.assert_found('parent-down', 'is down', **self.OPTIONS)
        self.follow(finding)
        self.address()
        self.sync()
        lab.until(self.reaches_lan)
        self.assert_well()

    def test_no_carrier(self: Any) -> None:
        text = self.PARENT + ', the parent of break0, has no carrier'
        self.carrier('down')
        lab.until(lambda: text in self.problems(**self.OPTIONS))
        lab.until(lambda: not self.ping(POD4))  # macvlans notice later
        self.assert_found('parent-down', 'has no carrier', **self.OPTIONS)
        self.carrier('up')
        lab.until(lambda: self.problems(**self.OPTIONS) == []
                  and self.reaches_lan())
        self.assert_well()

    def test_the_agent_repairs(self: Any) -> None:
        self.start_agent()
        self.lab.run('ip', 'link', 'del', 'break0')
        lab.until(lambda: self.problems(**self.OPTIONS) == [])
        self.assert_well()
        self.lab.run('ip', 'link', 'set', self.PARENT, 'down')
        self.lab.run('ip', 'link', 'set', self.PARENT, 'up')
        self.address()
        lab.until(lambda: self.problems(**self.OPTIONS) == []
                  and self.reaches_lan())
        self.assert_well()


class TestBridge(Cases, ParentKindTestCase):
    PARENT = 'br0'

    def build(self) -> None:
        add_link(self, 'bridge', 'br0')
        self.lab.run('ip', 'link', 'set', 'br0', 'up')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'master', 'br0')


class TestVlan(Cases, ParentKindTestCase):
    PARENT = '%s.%s' % (lab.PARENT, VLAN)
    LAN = 'nic.' + VLAN

    def build(self) -> None:
        add_vlan(self, lab.PARENT)

    def test_the_nic_below_down_and_up(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        self.assert_found('parent-down')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'up')
        self.address()
        self.sync()
        lab.until(self.reaches_lan)
        self.assert_well()


class TestBond(Cases, ParentKindTestCase):
    """A bond of two NICs, with the MAC address of the active NIC."""

    PARENT = 'bond0'
    LAN = 'switch'
    NICS = ('nic', 'nic1')

    def build(self) -> None:
        run = self.lab.run
        add_link(self, 'bond', 'bond0', 'mode', 'active-backup',
                 'fail_over_mac', 'active', 'miimon', '50')
        run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer', 'name',
            'nic1', 'netns', 'lan')
        run('ip', 'link', 'add', 'switch', 'up', 'type', 'bridge',
            netns='lan')
        for name in self.NICS:
            run('ip', 'link', 'set', name, 'up', 'master', 'switch',
                netns='lan')
        for name in (lab.PARENT, 'eth1'):
            run('ip', 'link', 'set', name, 'down')
            run('ip', 'link', 'set', name, 'master', 'bond0')
        run('ip', 'link', 'set', 'bond0', 'up')

    def active(self) -> Optional[str]:
        bond: Any = self.lab.link('bond0')
        active: Optional[str] = bond['linkinfo']['info_data'].get(
            'active_slave')
        return active

    def wait_for(self, name: str) -> None:
        """Wait until a NIC is active and the LAN host is reachable."""
        lab.until(lambda: self.active() == name)
        lab.until(self.reaches_lan)

    def mac(self, name: str) -> str:
        return str((self.lab.link(name) or {})['address'])

    def test_fail_over(self) -> None:
        self.wait_for(lab.PARENT)
        before, own = self.mac(self.PARENT), self.mac('break0')
        self.lab.run('ip', 'link', 'set', 'nic', 'down', netns='lan')
        self.wait_for('eth1')
        self.assertNotEqual(before, self.mac(self.PARENT))
        self.assertEqual(own, self.mac('break0'))
        self.assert_well()
        self.lab.run('ip', 'link', 'del', 'break0')
        self.sync()
        self.assertEqual(own, self.mac('break0'))
        self.lab.run('ip', 'link', 'set', 'nic', 'up', netns='lan')
        self.lab.run('ip', 'link', 'set', 'nic1', 'down', netns='lan')
        self.wait_for(lab.PARENT)
        self.assert_well()

    def test_fail_over_while_the_agent_runs(self) -> None:
        self.wait_for(lab.PARENT)
        own = self.mac('break0')
        self.start_agent()
        for down, up, active in (('nic', 'nic1', 'eth1'),
                                 ('nic1', 'nic', lab.PARENT)):
            self.lab.run('ip', 'link', 'set', up, 'up', netns='lan')
            self.lab.run('ip', 'link', 'set', down, 'down', netns='lan')
            self.wait_for(active)
            self.assert_well()
            self.lab.run('ip', 'link', 'del', 'break0')
            lab.until(lambda: self.problems() == [])
            self.assertEqual(own, self.mac('break0'))
            self.assert_well()


class TestVlanOnBond(TestBond):
    PARENT = 'bond0.' + VLAN
    LAN = 'switch.' + VLAN

    def build(self) -> None:
        super().build()
        add_vlan(self, 'bond0', 'switch')


class VrfTestCase(ParentKindTestCase):
    VRF = VRF
    OPTIONS: ClassVar[dict[str, Any]] = {'route_table': TABLE}

    def build(self) -> None:
        add_link(self, 'vrf', VRF, 'table', str(TABLE))
        self.lab.run('ip', 'link', 'set', VRF, 'up')
        self.lab.run('ip', 'link', 'set', self.PARENT, 'master', VRF)


class TestVrf(Cases, VrfTestCase):

    def test_break0_outside(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'nomaster')
        self.assertIn('break0: it is not in the VRF of eth0',
                      self.problems(**self.OPTIONS))
        self.assert_found('break0-vrf', 'break0 is in no VRF, but eth0 is in '
                          'the VRF red', **self.OPTIONS)
        self.sync()
        self.assert_well()

    def test_own_addresses(self) -> None:
        for address in (lab.NODE, lab.NODE6):
            with self.assertRaises(exceptions.AddressRefused):
                self.bind(address, owner=Owner('x', 'eth0'), **self.OPTIONS)

    def test_probe(self) -> None:
        done = self.lab.run('env', 'OS_BREAK0__ROUTE_TABLE=%d' % TABLE,
                            program.BREAK0, 'probe', '--all', check=False)
        self.assertEqual(0, done.returncode, done.stdout)
        # A refused connection is an answer.
        done = self.lab.run('env', 'OS_BREAK0__ROUTE_TABLE=%d' % TABLE,
                            program.BREAK0, 'probe', '--tcp', '9', POD4,
                            check=False)
        self.assertEqual(0, done.returncode, done.stdout)


class TestVlanInVrf(FewCases, VrfTestCase):
    PARENT = TestVlan.PARENT
    LAN = TestVlan.LAN

    def build(self) -> None:
        add_vlan(self, lab.PARENT)
        super().build()


class TestIntoAVrf(ParentKindTestCase):
    """The parent is moved into a VRF while pods run."""

    def build(self) -> None:
        """Build nothing: the test adds the VRF later."""

    def test_the_finding_of_the_doctor(self) -> None:
        self.VRF = VRF
        VrfTestCase.build(self)  # type: ignore[arg-type]
        self.address()
        with self.assertRaisesRegex(exceptions.KernelRefused, 'prefsrc'):
            self.sync()
        self.assertNotEqual([], self.problems())
        finding = self.assert_found(
            'parent-vrf', 'eth0 is in the VRF red with table 10, but '
            '[break0] route_table is 254', severity='error')
        self.follow(finding)
        self.OPTIONS = {'route_table': TABLE}
        self.assert_well()


class TestVlanBesideItsNic(parents_base.ParentsTestCase):
    """Pods with an interface on a NIC and another one on its VLAN."""

    NIC = '%s.%s' % (lab.PARENT, VLAN)
    LAN = 'nic.' + VLAN

    def add_nic(self) -> None:
        add_vlan(self, lab.PARENT)

    def test_each_has_its_own(self) -> None:
        self.assertEqual(lab.PARENT, (self.lab.link('break0') or {})['link'])
        self.assertEqual(self.NIC,
                         (self.lab.link(self.device1) or {})['link'])
        self.assert_reachable()

    def test_after_both_were_deleted(self) -> None:
        for name in ('break0', self.device1):
            self.lab.run('ip', 'link', 'del', name)
        self.manager().sync()
        self.assert_reachable()


@unittest.skipUnless(len(os.environ.get('NICS', '').split()) == 2,
                     'needs two NICs on one wire, by NICS')
class TestFullFilter(Cases, ParentKindTestCase):
    """More macvlans than MAC addresses in the filter of the NIC."""

    def build(self) -> None:
        run = self.lab.run
        run('ip', 'link', 'del', lab.PARENT)
        for name, to, new in zip(os.environ['NICS'].split(),
                                 (str(os.getpid()), '/run/netns/lan'),
                                 (lab.PARENT, 'nic')):
            run('nsenter', '--net=/proc/1/ns/net', 'ip', 'link', 'set', name,
                'netns', to)
            netns = 'lan' if new == 'nic' else None
            run('ip', 'link', 'set', name, 'name', new, netns=netns)
            run('ip', 'link', 'set', new, 'up', netns=netns)
            self.addCleanup(run, 'ip', 'link', 'set', new, 'down', 'name',
                            name, 'netns', '1', netns=netns)
        self.lab.add_netns('crowd')
        for number in range(CROWD):
            name = 'crowd%d' % number
            run('ip', 'link', 'add', name, 'link', lab.PARENT, 'netns',
                'crowd', 'type', 'macvlan', 'mode', 'bridge')
            run('ip', 'link', 'set', name, 'up', netns='crowd')

    def findings(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().findings(*args, **kwargs)
        # The macvlans in the namespace "crowd" have no addresses.
        del found['container-pending']
        return found

    #: Not applicable: a hub of QEMU always has a carrier.
    test_no_carrier = None  # type: ignore[assignment]
