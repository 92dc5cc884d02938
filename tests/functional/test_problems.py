# SPDX-License-Identifier: Apache-2.0

"""All commands and the metrics agree on each fault of the tables below."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Callable, NamedTuple, Optional

from kuryr_break0.agent.metrics import Metrics
from kuryr_break0.engine import problems
from kuryr_break0 import kernel
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import MACS
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import OWNER_79
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.support import lab
from tests.support import program

STATE = '/run/kuryr-break0'
RECORD = '%s/addresses/%s.json' % (STATE, POD4)
SYSCTL = 'sysctl -qw net.'
IN_POD = 'ip netns exec pod '
PEER = 'ip link add eth1 type veth peer name peer'
STALE = '100.75.30.99'
FAR = '100.75.40.71'


class Fault(NamedTuple):
    """A fault of a node with two pods of both families.

    :ivar kind: kind of a problem that the fault causes; None if the fault
        causes no problem, only a report of an unbound container
    :ivar make: shell commands that cause the fault, or a function that causes
        the fault and takes the test as its argument
    :ivar heals: whether a sync repairs the fault
    :ivar options: options of [break0]
    :ivar is_executed: whether to run each command as a new program
    """

    name: str
    kind: Optional[str]
    make: Any
    heals: bool = True
    options: dict[str, Any] = {}
    is_executed: bool = False


def _write(path: str, change: Callable[[Any], Any]) -> None:
    with open(path) as file:
        fields = json.load(file)
    fields = change(fields) or fields
    with open(path, 'w') as file:
        json.dump(fields, file)


def _damage(test: ProblemsTestCase) -> None:
    with open(RECORD, 'w') as file:
        file.write('{"version": 1,')


def _hide_nft(test: ProblemsTestCase) -> None:
    test.lab.run('nft', 'flush', 'ruleset')
    nft = kernel.find_program('nft') or ''
    test.lab.run('mount', '--bind', '/dev/null', nft)
    test.addCleanup(test.lab.run, 'umount', nft)


def _delete_guard_entries(test: ProblemsTestCase) -> None:
    for name in 'pairs4', 'addresses4':
        test.lab.run('nft', 'flush', 'set', 'netdev', 'kuryr-break0-break0',
                     name)


def _rival(test: ProblemsTestCase) -> None:
    path = test.lab.add_pod('rival', mac='02:00:00:00:00:79')
    test.lab.run('ip', 'address', 'add', POD4 + '/24', 'dev', 'eth0',
                 netns='rival')
    test.bind(POD4, owner=OWNER_79, netns=path,
              mac_of_pod='02:00:00:00:00:79', subnets=['100.75.30.0/24'])
    test.age()


def _rival_gone(test: ProblemsTestCase) -> None:
    _rival(test)
    test.lab.del_netns('pod')


def _far_pod(test: ProblemsTestCase) -> None:
    test.lab.add_other_subnet()
    path = test.lab.add_pod('far', FAR + '/24', mac=MACS['far'],
                            gateways=[lab.OTHER_LAN])
    test.bind(FAR, owner=Owner('sandbox-far', 'eth0'), netns=path,
              mac_of_pod=MACS['far'], subnets=['100.75.40.0/24'])


def _detour(test: ProblemsTestCase) -> None:
    _far_pod(test)
    test.lab.run('ip', 'route', 'del', lab.NODE, netns='far')


def _dropped(test: ProblemsTestCase) -> None:
    _detour(test)
    test.sysctl('ipv4.conf.all.rp_filter', 1)


def _apart(test: ProblemsTestCase) -> None:
    """Create a pod's interface again on another parent."""
    test.lab.run(*PEER.split())
    test.lab.run('ip', 'link', 'set', 'eth1', 'up')
    test.lab.run('ip', 'link', 'del', 'eth0', netns='pod')
    test.lab.add_macvlan('pod', mac=MACS['pod'], parent='eth1')


def _vrf(test: ProblemsTestCase) -> None:
    made = test.lab.run('ip', 'link', 'add', 'red', 'type', 'vrf', 'table',
                        '10', check=False)
    if made.returncode:
        test.skipTest('needs the module vrf: ' + made.stdout)
    test.lab.run('ip', 'link', 'set', 'red', 'up')


def _break0_in_vrf(test: ProblemsTestCase) -> None:
    _vrf(test)
    test.lab.run('ip', 'link', 'set', 'break0', 'master', 'red')


def _parent_in_vrf(test: ProblemsTestCase) -> None:
    _vrf(test)
    test.lab.run('ip', 'link', 'set', 'eth0', 'master', 'red')


DEVICE = (
    Fault('break0_deleted', 'break0-missing', 'ip link del break0',
          is_executed=True),
    Fault('break0_down', 'break0-down', 'ip link set break0 down'),
    Fault('break0_down_and_up', 'route-missing',
          'ip link set break0 down; ip link set break0 up'),
    Fault('protodown', 'break0-down', 'ip link set break0 protodown on'),
    Fault('protodown_of_another', 'break0-down', 'ip link set break0 '
          'protodown on; ip link set break0 protodown_reason 3 on', False),
    Fault('mtu', 'break0-mtu', 'ip link set break0 mtu 1400'),
    Fault('mtu_without_ipv6', 'break0-mtu', 'ip link set break0 mtu 1200'),
    Fault('mac', 'break0-mac', 'ip link set break0 address 02:00:00:00:00:99'),
    Fault('multicast', 'break0-heard', 'ip link set break0 multicast on'),
    Fault('link_local', 'break0-heard', 'ip address add fe80::99/64 dev '
          'break0 nodad'),
    Fault('rp_filter', 'break0-open', SYSCTL + 'ipv4.conf.break0.rp_filter=0'),
    Fault('arp_filter', 'break0-answers-lan',
          SYSCTL + 'ipv4.conf.break0.arp_filter=0'),
    Fault('proxy_arp', 'break0-answers-lan',
          SYSCTL + 'ipv4.conf.break0.proxy_arp=1'),
    Fault('forwarding', 'break0-heard',
          SYSCTL + 'ipv6.conf.break0.forwarding=1'),
    Fault('ipv6_disabled', 'ipv6-disabled',
          SYSCTL + 'ipv6.conf.break0.disable_ipv6=1', is_executed=True),
    Fault('alias', 'break0-owner', 'ip link set break0 alias mine'),
    Fault('another_ledger', 'ledger-other', '', False,
          {'state_dir': '/run/other'}),
    Fault('break0_in_a_vrf', 'break0-vrf', _break0_in_vrf),
    Fault('break0_a_veth', 'break0-foreign', 'ip link del break0; ip link add '
          'break0 type veth peer name peer', False),
    Fault('break0_private', 'break0-foreign', 'ip link del break0; ip link '
          'add break0 link eth0 type macvlan mode private', False),
    Fault('break0_on_another', 'break0-wrong-parent', 'ip link del break0; '
          + PEER + '; ip link add break0 link eth1 type macvlan mode bridge',
          False),
)
PARENT = (
    Fault('parent_down', 'parent-down', 'ip link set eth0 down', False),
    Fault('no_carrier', 'parent-down',
          'ip netns exec lan ip link set nic down', False),
    Fault('parent_deleted', 'parent-missing', 'ip link del eth0', False),
    Fault('parent_renamed', 'break0-name', 'ip link set eth0 down; ip link '
          'set eth0 name ens3; ip link set ens3 up; ip address add %s/64 dev '
          'ens3 nodad' % lab.NODE6),
    Fault('parent_option', 'parent-mismatch', PEER, False,
          {'parent': 'eth1'}),
    Fault('parent_in_a_vrf', 'parent-vrf', _parent_in_vrf, False),
    Fault('ipv6_disabled_everywhere', 'ipv6-disabled',
          SYSCTL + 'ipv6.conf.all.disable_ipv6=1', False),
    Fault('new_node_address', 'pod-not-configured',
          'ip address add 100.75.30.52/24 dev eth0'),
    Fault('lost_node_address', 'pod-not-configured',
          'ip address del %s/64 dev eth0' % lab.NODE6),
    Fault('lost_ipv4', 'route-missing', 'ip address del %s/24 dev eth0; '
          'ip address add 100.75.30.52/24 dev eth0' % lab.NODE),
    Fault('table_deleted', 'guard-missing',
          'nft delete table netdev kuryr-break0-break0', is_executed=True),
    Fault('chain_flushed', 'guard-missing',
          'nft flush chain netdev kuryr-break0-break0 from-pods'),
    Fault('guard_entries_missing', 'guard-missing', _delete_guard_entries),
    Fault('guard_entry_stale', 'guard-missing', 'nft add element netdev '
          'kuryr-break0-break0 pairs4 { 02:00:00:00:00:99 . %s }' % STALE),
    Fault('no_nft', 'guard-unavailable', _hide_nft),
    Fault('no_nft_but_wanted', 'guard-unavailable', _hide_nft, False,
          {'guard': 'on'}),
    Fault('ledger_lost', 'ledger-lost', 'rm -r %s/addresses %s/identity'
          % (STATE, STATE)),
)
ADDRESSES = (
    Fault('route_deleted', 'route-missing', 'ip route del ' + POD4,
          is_executed=True),
    Fault('route6_deleted', 'route-missing', 'ip route del ' + POD6),
    Fault('routes_flushed', 'route-missing', 'ip route flush dev break0; '
          'ip -6 route flush dev break0'),
    Fault('protocol_of_route', 'route-wrong', 'ip route replace %s dev break0 '
          'scope link src %s' % (POD4, lab.NODE)),
    Fault('mtu_of_route', 'route-wrong', 'ip route replace %s dev break0 '
          'proto 176 scope link src %s mtu 900' % (POD4, lab.NODE)),
    Fault('second_route', 'route-extra', 'ip route add %s dev break0 proto '
          '176 scope link metric 50' % POD4),
    Fault('foreign_route', 'route-foreign',
          'ip route replace %s dev lo' % POD4, False, is_executed=True),
    Fault('foreign_route6', 'route-foreign',
          'ip route replace %s dev lo metric 1' % POD6, False),
    Fault('neighbour_deleted', 'neighbour-missing',
          'ip neigh del %s dev break0' % POD4),
    Fault('neighbour6_deleted', 'neighbour-missing',
          'ip neigh del %s dev break0' % POD6),
    Fault('neighbour_wrong', 'neighbour-wrong', 'ip neigh replace %s lladdr '
          '%s dev break0 nud permanent' % (POD4, MACS['other'])),
    Fault('neighbour_not_permanent', 'neighbour-missing', 'ip neigh replace '
          '%s lladdr %s dev break0 nud stale' % (POD4, MACS['pod'])),
    Fault('unclaimed_route', 'route-stale', 'ip route add %s dev break0 proto '
          '176 scope link' % STALE, False),
    Fault('unclaimed_neighbour', 'neighbour-stale', 'ip neigh add %s lladdr '
          '02:00:00:00:00:99 dev break0 nud permanent protocol 176' % STALE,
          False),
    Fault('rule', 'route-not-used', 'ip route add default via %s table 100; '
          'ip rule add to %s table 100' % (lab.LAN, POD4), False),
    Fault('local', 'route-not-used',
          'ip route add local %s dev lo table local' % POD4, False),
    Fault('of_the_node', 'address-refused', 'ip link add br0 type bridge; '
          'ip address add %s/32 dev br0' % OTHER4, False),
    Fault('next_hop', 'address-refused',
          'ip route add 10.9.0.0/16 via %s dev eth0' % OTHER4, False),
    Fault('not_allowed', 'address-not-allowed', '', False,
          {'allowed_cidrs': [POD4 + '/32', 'fd00:30::/64']}),
    Fault('damaged', 'ledger-damaged', _damage),
    Fault('newer', 'ledger-newer', lambda test: _write(
        RECORD, lambda fields: {**fields, 'version': 3}), False),
    Fault('gone', 'sandbox-gone', lambda test: test.lab.del_netns('pod')),
    Fault('contested', 'address-contested', _rival, False),
    Fault('older_gone', 'sandbox-gone', _rival_gone),
    Fault('unbound', None, lambda test: test.lab.add_pod(
        'unbound', '100.75.30.78'), False),
)
PODS = (
    Fault('neighbour_deleted', 'pod-neighbour-missing',
          IN_POD + 'ip neigh del %s dev eth0' % lab.NODE, is_executed=True),
    Fault('neighbour6_deleted', 'pod-neighbour-missing',
          IN_POD + 'ip neigh del %s dev eth0' % lab.NODE6),
    Fault('neighbour_wrong', 'pod-neighbour-wrong',
          IN_POD + 'ip neigh replace %s lladdr %s dev eth0 nud permanent'
          % (lab.NODE, MACS['other'])),
    Fault('neighbour_extra', 'pod-entry-extra',
          IN_POD + 'ip neigh add %s lladdr %s dev eth0 nud permanent '
          'protocol 176' % (STALE, MACS['other'])),
    Fault('rule_deleted', 'pod-rule-missing',
          IN_POD + 'nft delete table netdev kuryr-break0-eth0'),
    Fault('address_deleted', 'pod-address-missing',
          IN_POD + 'ip address del %s/24 dev eth0' % POD4, False),
    Fault('address6_replaced', 'pod-address-missing',
          IN_POD + 'ip address add fd00:30::99/64 dev eth0 nodad; '
          + IN_POD + 'ip address del %s/64 dev eth0' % POD6, False),
    Fault('interface_deleted', 'pod-interface-gone',
          IN_POD + 'ip link del eth0', False),
    Fault('interface_renamed', 'pod-interface-gone',
          IN_POD + 'ip link set eth0 down; '
          + IN_POD + 'ip link set eth0 name net1', False),
    Fault('interface_down', 'pod-down', IN_POD + 'ip link set eth0 down',
          False),
    Fault('mac', 'pod-mac',
          IN_POD + 'ip link set eth0 address 02:00:00:00:00:99', False),
    Fault('private', 'pod-apart',
          IN_POD + 'ip link set eth0 type macvlan mode private', False),
    Fault('on_another_parent', 'pod-apart', _apart, False),
    Fault('detour', 'pod-route-missing', _detour),
    Fault('dropped', 'rp-filter', _dropped),
)


class ProblemsTestCase(DoctorTestCase):
    """Tests that show a fault to status, sync, metrics and doctor."""

    def setUp(self) -> None:
        super().setUp()
        self.age()

    def age(self) -> None:
        """Make all claims older than the pause of a missing address."""
        def age(fields: Any) -> None:
            for claim in fields['claims']:
                # An emulated machine may have booted less than 60 s ago.
                claim['bound_at'] = max(0, claim['bound_at'] - 60)

        directory = STATE + '/addresses'
        for name in os.listdir(directory):
            _write(os.path.join(directory, name), age)

    def command(self, fault: Fault, *args: str
                ) -> subprocess.CompletedProcess[str]:
        run = subprocess.run if fault.is_executed else program.run
        done = run([program.BREAK0, *args], text=True, stdout=subprocess.PIPE,
                   stderr=subprocess.PIPE, env={
                       **os.environ, 'COLUMNS': '500', **{
                           'OS_BREAK0__' + name.upper(): ','.join(value)
                           if isinstance(value, list) else str(value)
                           for name, value in fault.options.items()}})
        self.assertNotIn('Traceback', done.stderr)
        return done

    def out_of_sync(self, fault: Fault) -> float:
        """Return the metric addresses_out_of_sync."""
        metrics = Metrics(base.options(**fault.options))
        metrics.record_sync(0, None)
        metrics.refresh()
        return sum(sample.value for metric in metrics.collect()
                   for sample in metric.samples
                   if sample.name == 'kuryr_break0_addresses_out_of_sync')

    def found(self, fault: Fault) -> list[problems.Problem]:
        return problems.find_all(self.snapshot(**fault.options))[0]

    def check(self, fault: Fault) -> None:
        if callable(fault.make):
            fault.make(self)
        elif fault.make:
            self.lab.run('sh', '-ec', fault.make)
        found = self.found(fault)
        status = self.command(fault, 'status')
        self.assertEqual(1, status.returncode, status.stdout)
        self.assertEqual(
            len(problems.by_address(found)), self.out_of_sync(fault))
        if fault.kind is not None:
            self.assertIn(fault.kind, {each.kind for each in found})
        dry = self.command(fault, 'sync', '--dry-run')
        self.assertNotEqual('', dry.stdout + dry.stderr)
        self.assertNotEqual(0, dry.returncode)
        self.check_doctor(fault, found)
        sync = self.command(fault, 'sync')
        after = self.command(fault, 'status')
        report = sync.stdout + sync.stderr + after.stdout
        self.assertEqual(sync.returncode == 0, after.returncode == 0, report)
        self.assertEqual(fault.heals, after.returncode == 0, report)
        dry = self.command(fault, 'sync', '--dry-run')
        self.assertEqual(fault.heals, not dry.stdout + dry.stderr, dry)
        if fault.heals:
            self.assertEqual(0, self.out_of_sync(fault))
            self.assertEqual([], self.found(fault))

    def check_doctor(self, fault: Fault,
                     found: list[problems.Problem]) -> None:
        """Check that the doctor has a finding for each kind of problem."""
        of_kind: dict[str, list[str]] = {}
        for finding in self.all_findings(fault):
            of_kind.setdefault(finding.id, []).append(finding.observed)
        if fault.kind is None:
            self.assertIn('container-not-discovered', of_kind)
        for kind in {each.kind for each in found}:
            texts = [each.text.rstrip('.') for each in found
                     if each.kind == kind]
            seen = of_kind.get(kind, [])
            self.assertTrue(any(each.startswith(text) for each in seen
                                for text in texts), (kind, texts, of_kind))
            for text in texts:  # a finding names the first of its problems
                self.assertTrue(any(
                    each.split()[:2] == text.split()[:2] for each in seen),
                    (kind, text, seen))

    def all_findings(self, fault: Fault) -> list[Any]:
        return self.examine(False, **fault.options).findings


def _tests(faults: tuple[Fault, ...]) -> type[ProblemsTestCase]:
    def test(fault: Fault) -> Callable[[ProblemsTestCase], None]:
        return lambda self: self.check(fault)

    return type('Table', (ProblemsTestCase,), {
        'test_' + fault.name: test(fault) for fault in faults})


class TestDevice(_tests(DEVICE)):  # type: ignore[misc]
    """Faults of break0."""


class TestParent(_tests(PARENT)):  # type: ignore[misc]
    """Faults of the parent, the node, the guard and the ledger."""


class TestAddresses(_tests(ADDRESSES)):  # type: ignore[misc]
    """Faults of addresses, their routes, neighbours and records."""


class TestPods(_tests(PODS)):  # type: ignore[misc]
    """Faults in pods."""


class TestHealthy(ProblemsTestCase):

    def test_nothing(self) -> None:
        fault = Fault('none', None, '', is_executed=True)
        for args in ('status',), ('sync', '--dry-run'), ('sync',):
            done = self.command(fault, *args)
            self.assertEqual(0, done.returncode, done.stdout)
            if args[0] == 'sync':
                self.assertEqual('', done.stdout + done.stderr)
        self.assertEqual(0, self.out_of_sync(fault))
        self.assertEqual({}, self.findings())

    def test_table(self) -> None:
        """The tables have 40 faults or more."""
        self.assertLessEqual(40, sum(map(len, (
            DEVICE, PARENT, ADDRESSES, PODS))))
