# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any, Iterator
from unittest import mock

from kuryr_kubernetes.cni.binding import base as b_base
from kuryr_kubernetes.cni.binding import nested
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes import exceptions as k_exc
from kuryr_kubernetes.tests.unit.cni import test_binding
from pyroute2.ipdb import exceptions as ipdb_exceptions
from pyroute2.netlink import exceptions as nl_exceptions

from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import netlink
from kuryr_break0.kuryr import comparison
from kuryr_break0.kuryr import driver
from kuryr_break0.kuryr import patches
from tests.functional import base
from tests.functional.base import POD
from tests.functional.driver_base import CONTAINER
from tests.functional.driver_base import DriverTestCase
from tests.functional.driver_base import names
from tests.functional.driver_base import set_options
from tests.functional.driver_base import vif
from tests.support import lab


class TestConnect(DriverTestCase):

    def test_the_pod_is_as_kuryr_makes_it(self) -> None:
        self.lab.add_ipv6()
        self.vif = vif(POD, 'fd00:30::71', mtu=1400,
                       subnets=['100.75.30.0/24', 'fd00:30::/64'])
        self.connect()
        b_base._configure_l3(self.vif, 'eth0', self.netns, True)
        ours = self.pod()
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod')
        nested.MacvlanDriver().connect(self.vif, 'eth0', self.netns,
                                       CONTAINER)
        b_base._configure_l3(self.vif, 'eth0', self.netns, True)
        self.assertEqual(self.pod(), ours)
        self.assertEqual(1400, ours[0]['mtu'])

    def pod(self) -> list[Any]:
        """Return the pod's interfaces, addresses, routes and sysctls.

        Wait first until the kernel has completed its asynchronous changes.
        """
        self.lab.settle()
        # The kernel sets operstate with a delay; it is UNKNOWN until then.
        lab.until(lambda: self.pod_links()['eth0']['operstate'] == 'UP')
        found: list[Any] = [*self.pod_links().values()]
        for args in (('address', 'show'), ('-4', 'route', 'show'),
                     ('-6', 'route', 'show', 'table', 'all')):
            found += self.lab.ip(*args, netns='pod')
        sysctls = self.lab.run('sysctl', '-a', '--pattern', r'\.eth0\.',
                               netns='pod').stdout
        for each in found:
            each.pop('ifindex', None)  # unique per interface
        return [*found, sysctls]

    def test_reachable_once_it_has_its_address(self) -> None:
        self.connect()
        b_base._configure_l3(self.vif, 'eth0', self.netns, True)
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_the_owner_is_the_sandbox(self) -> None:
        self.connect()
        record, = self.snapshot().live.values()
        self.assertEqual(base.OWNER, record.owner)
        self.assertEqual(str(self.vif.address), record.mac)
        self.assertEqual(self.netns, record.netns)
        found = os.stat(self.netns)
        assert record.namespace is not None
        self.assertEqual((found.st_dev, found.st_ino), record.namespace[:2])

    def test_all_addresses_of_all_subnets(self) -> None:
        self.connect(vif=vif(POD, '10.20.0.5', 'fd00:1::5',
                             subnets=['100.75.30.0/24', '10.20.0.0/16',
                                      'fd00:1::/64']))
        self.assertEqual({POD, '10.20.0.5', 'fd00:1::5'},
                         set(self.lab.routes()))

    def test_failure_is_logged_and_the_pod_goes_on(self) -> None:
        with self.break0_taken(), self.assertLogs(
                'kuryr_break0', 'ERROR') as logs:
            self.connect()
        self.assertEqual(['eth0'], list(self.pod_links()))
        message = '\n'.join(logs.output)
        for text in ('sandbox-1/eth0', 'break0', 'a veth', 'Rename'):
            self.assertIn(text, message)
        self.assertNotIn('Traceback', message)
        self.assertTrue(self.driver.is_alive())

    def test_strict_failure_is_raised_and_undone(self) -> None:
        set_options(self, strict=True)
        with self.break0_taken():
            with self.assertRaisesRegex(driver.PodNotConnected, 'a veth'):
                self.connect()
        self.assertEqual({}, self.pod_links())
        self.assertEqual(set(), self.bound())
        self.assertTrue(self.driver.is_alive())
        self.connect()
        self.assertIn(POD, self.lab.routes())

    def test_an_invalid_option_costs_no_pod(self) -> None:
        with mock.patch.dict(os.environ, {'OS_BREAK0__ADDR': 'x'}):
            with self.assertLogs('kuryr_break0', 'ERROR') as logs:
                self.connect()
        self.assertIn("'x' is not an IPv4", '\n'.join(logs.output))
        self.assertEqual(['eth0'], list(self.pod_links()))

    def test_an_unexpected_error_costs_no_pod(self) -> None:
        with mock.patch.object(kernel.Netlink, 'change',
                               side_effect=ZeroDivisionError):
            with self.assertLogs('kuryr_break0', 'ERROR') as logs:
                self.connect()
        self.assertIn('ZeroDivisionError', '\n'.join(logs.output))
        self.assertEqual(['eth0'], list(self.pod_links()))

    def test_nothing_is_bound_if_kuryr_fails(self) -> None:
        big = vif(POD, mtu=9000)
        with self.assertRaises(k_exc.CNIBindingFailure) as kuryrs:
            nested.MacvlanDriver().connect(big, 'eth0', self.netns, CONTAINER)
        with self.assertRaises(k_exc.CNIBindingFailure) as ours:
            self.connect(vif=big)
        self.assertEqual(str(kuryrs.exception), str(ours.exception))
        self.assertIn('MTU of interface eth0 (1500)', str(ours.exception))
        self.assertIsNone(self.lab.link('break0'))
        self.assertEqual(set(), self.bound())

    def test_a_refusal_is_not_taken_for_a_vlan_conflict(self) -> None:
        # The kernel refuses a second macvlan with the same MAC address on
        # one parent with EADDRINUSE.
        self.connect()
        netns = self.lab.add_netns('other')
        with self.assertRaisesRegex(driver.PodNotConnected,
                                    'Address already in use.*being '
                                    'deleted'):
            self.connect(netns=netns, container_id='b')

    def test_remaining_interfaces_in_the_pod_are_removed(self) -> None:
        for name in ('eth0', self.vif.vif_name):
            self.lab.run('ip', 'link', 'add', name, 'type', 'veth',
                         'peer', 'name', 'peer-' + name[:4], netns='pod')
        self.connect()
        self.assertEqual(['eth0'], list(self.pod_links()))
        self.assertEqual(str(self.vif.address),
                         self.pod_links()['eth0']['address'])

    def test_again(self) -> None:
        self.connect()
        self.connect()
        self.assertEqual(['eth0'], list(self.pod_links()))

    def test_the_interfaces_of_the_node_are_as_before(self) -> None:
        # The pod's interface has the name of an interface of the node. The
        # kernel updates the veth's carrier with a delay, so NO-CARRIER does
        # not count.
        def node() -> list[Any]:
            return [(link['ifname'], link['ifindex'], link['address'],
                     link['mtu'], set(link['flags']) - {'NO-CARRIER'})
                    for link in self.lab.ip('link', 'show')
                    if link['ifname'] != 'break0']

        before = node()
        self.connect()
        self.assertEqual(before, node())

    def test_as_small_as_the_network(self) -> None:
        self.connect(vif=vif(POD, mtu=1400))
        self.assertEqual(1400, self.pod_links()['eth0']['mtu'])

    def test_disabled(self) -> None:
        self.connect()
        set_options(self, enabled=False)
        netns = self.lab.add_netns('other')
        self.connect(vif=vif('100.75.30.72'), netns=netns, container_id='b')
        self.assertEqual({POD}, set(self.lab.routes()))
        self.disconnect()  # a disabled driver still unbinds
        self.assertEqual({}, self.lab.routes())


class TestConnectDirectly(TestConnect):

    binding = 'auto'
    disconnecting = driver.pod_binding

    def test_the_default_creator_of_the_interface(self) -> None:
        for is_known in (True, False):
            with self.subTest(is_known=is_known), mock.patch.object(
                    nested.MacvlanDriver, 'connect', autospec=True,
                    side_effect=nested.MacvlanDriver.connect) as kuryrs, \
                    mock.patch.object(
                        comparison, 'compare', return_value=comparison.
                        Comparison(is_known, 'of the test')):
                k_config.CONF.clear_override('pod_binding',
                                             group=driver.config.GROUP)
                self.connect()
            self.assertIs(not is_known, kuryrs.called)
            self.assertIn(POD, self.lab.routes())

    def test_a_mac_address_that_is_not_free_yet(self) -> None:
        self.connect()
        # The kernel deletes a namespace with a delay. The mock deletes the
        # interface during the driver's pause.
        delete = mock.Mock(side_effect=lambda _: self.lab.run(
            'ip', 'link', 'del', 'eth0', netns='pod'))
        netns = self.lab.add_netns('other')
        with mock.patch.object(driver.pod_binding.time, 'sleep', delete):
            self.connect(netns=netns, container_id='b')
        delete.assert_called_once()
        self.assertIn(str(self.vif.address), [
            each['address'] for each in self.lab.ip('link', 'show',
                                                    netns='other')])

    @contextlib.contextmanager
    def older_kernel(self) -> Iterator[None]:
        """Refuse names of the node's interfaces, as Linux 5.10 and 6.12."""
        create = kernel.Netlink.create_macvlan

        def refusing(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
            if kernel.find_ifindex(name) is not None:
                raise exceptions.KernelRefused('create it', 'it exists',
                                               errno.EEXIST)
            create(self, name, *args, **kwargs)

        with mock.patch.object(kernel.Netlink, 'create_macvlan', refusing):
            yield

    def test_the_node_has_an_interface_of_the_name(self) -> None:
        before = self.lab.ip('link', 'show')
        with self.older_kernel():
            for _ in range(2):
                self.connect()
                self.assertEqual(['eth0'], list(self.pod_links()))
                self.assertIn('UP', self.pod_links()['eth0']['flags'])
                self.assertEqual(str(self.vif.address),
                                 self.pod_links()['eth0']['address'])
            self.assertEqual({*names(before), 'break0'},
                             names(self.lab.ip('link', 'show')))
            # The first pod has the MAC address, so the second bind fails.
            with self.assertRaises(driver.PodNotConnected):
                self.connect(netns=self.lab.add_netns('second'))
        self.assertEqual({'lo'}, names(self.lab.ip('link', 'show',
                                                   netns='second')))

    def test_it_is_not_kuryr_that_does_it(self) -> None:
        for method in ('connect', 'disconnect'):
            with mock.patch.object(nested.MacvlanDriver, method,
                                   side_effect=ZeroDivisionError):
                getattr(self, method)()

    def test_it_is_never_on_the_node(self) -> None:
        with kernel.Events() as events:
            self.connect()
            self.lab.run('ip', 'link', 'add', 'the-last', 'type', 'veth',
                         'peer', 'name', 'but-one')
            names: list[Any] = []
            while 'the-last' not in names:
                names += [event.link and event.link.name
                          for event in events.get() if event.kind == 'link']
        self.assertEqual({'break0', 'eth0', 'the-last', 'but-one'},
                         set(names))


class TestNetlinkErrors(DriverTestCase):

    def interrupted(self, times: int) -> Any:
        """Patch Kuryr's connect to fail ``times`` times.

        Each failure is an interrupted netlink dump.
        """
        self.calls = 0
        connect = nested.MacvlanDriver.connect

        def interrupted(*args: Any) -> None:
            self.calls += 1
            if self.calls <= times:
                raise nl_exceptions.NetlinkDumpInterrupted()
            connect(*args)

        return mock.patch.object(nested.MacvlanDriver, 'connect',
                                 interrupted)

    def test_an_interrupted_dump_is_repeated(self) -> None:
        with self.interrupted(times=3):
            self.connect()
        self.assertEqual(4, self.calls)
        self.assertIn(POD, self.lab.routes())

    def test_but_not_for_ever(self) -> None:
        with self.interrupted(times=10 ** 6), mock.patch.object(
                netlink, 'DUMP_PAUSE', 0):
            with self.assertRaisesRegex(driver.PodNotConnected,
                                        'interrupted'):
                self.connect()
        self.assertLess(self.calls, 100)

    def test_an_error_of_ipdb_without_a_text(self) -> None:
        with mock.patch.object(nested.MacvlanDriver, 'connect',
                               side_effect=ipdb_exceptions.CommitException):
            with self.assertRaisesRegex(driver.PodNotConnected,
                                        'IPDB raised CommitException'):
                self.connect()

    def test_none_leaves_disconnect(self) -> None:
        error = nl_exceptions.NetlinkError(17, 'File exists')
        self.connect()
        with mock.patch.object(nested.MacvlanDriver, 'disconnect',
                               side_effect=error):
            with self.assertRaisesRegex(k_exc.CNIBindingFailure,
                                        'File exists'):
                self.disconnect()
        self.assertEqual({}, self.lab.routes())


class TestAddressing(DriverTestCase):
    """Kuryr's address configuration is repeated if IPDB fails."""

    def configure(self, failures: int) -> None:
        """Run Kuryr's configuration; IPDB fails ``failures`` times first."""
        self.connect()
        get_ipdb = b_base.get_ipdb
        self.calls = 0

        def failing(netns: str) -> Any:
            self.calls += 1
            if self.calls <= failures:
                raise RuntimeError()  # the error of IPDB
            return get_ipdb(netns)

        with mock.patch.object(b_base, 'get_ipdb', failing):
            b_base._configure_l3(self.vif, 'eth0', self.netns, True)

    def test_kuryr_tries_again(self) -> None:
        stock = b_base._configure_l3
        with self.assertLogs('kuryr_break0.kuryr.patches', 'WARNING'):
            self.configure(failures=2)
        self.assertTrue(self.lab.ping(POD))
        # The patch must restore Kuryr's function.
        self.assertIs(stock, b_base._configure_l3)

    def test_but_not_for_ever(self) -> None:
        with self.assertRaises(RuntimeError):
            self.configure(failures=10)
        self.assertEqual(3, self.calls)

    def test_after_a_first_try_that_came_far(self) -> None:
        self.configure(failures=0)
        patches.replace_configure_l3(patches.configure_l3_repeatedly)
        b_base._configure_l3(self.vif, 'eth0', self.netns, True)
        self.assertTrue(self.lab.ping(POD))


class TestDisconnect(DriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.connect()

    def test_all_is_gone(self) -> None:
        self.disconnect()
        self.assertEqual({}, self.pod_links())
        self.assertEqual({}, self.lab.routes())
        self.assertEqual(set(), self.bound())

    def test_addresses_of_an_earlier_add_are_unbound_too(self) -> None:
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod')
        other = vif(base.OTHER_POD)
        self.connect(vif=other)
        # A DEL of another sandbox must not unbind this sandbox.
        self.disconnect(vif=other, container_id='an-earlier-one')
        self.manager().sync()
        self.assertEqual({POD, base.OTHER_POD}, self.bound())
        self.disconnect(vif=other)
        self.manager().sync()
        self.assertEqual((set(), {}), (self.bound(), self.lab.routes()))

    def test_again_is_fine(self) -> None:
        self.disconnect()
        self.disconnect()

    def test_unbound_even_if_kuryr_fails(self) -> None:
        with mock.patch.object(self.disconnecting, 'disconnect',
                               side_effect=k_exc.CNIBindingFailure('oh')):
            with self.assertRaisesRegex(k_exc.CNIBindingFailure, 'oh'):
                self.disconnect()
        self.assertEqual({}, self.lab.routes())

    def test_the_first_error_is_raised(self) -> None:
        with mock.patch.object(
                self.disconnecting, 'disconnect',
                side_effect=k_exc.CNIBindingFailure('first')), \
            mock.patch.object(driver.Break0Manager, 'unbind',
                              side_effect=ValueError('second')):
            with self.assertLogs('kuryr_break0', 'ERROR') as logs:
                with self.assertRaisesRegex(k_exc.CNIBindingFailure,
                                            'first'):
                    self.disconnect()
        self.assertIn('second', '\n'.join(logs.output))

    def test_by_an_earlier_sandbox(self) -> None:
        self.disconnect(container_id='an-earlier-one',
                        netns='/run/netns/gone')
        self.assertIn(POD, self.lab.routes())


class TestDisconnectDirectly(TestDisconnect):

    binding = 'auto'
    disconnecting = driver.pod_binding

    def test_a_pod_that_kuryr_has_made(self) -> None:
        self.disconnect()
        set_options(self, pod_binding='kuryr')
        self.connect()
        set_options(self, pod_binding='auto')
        self.disconnect()
        self.assertEqual({}, self.pod_links())


class TestNetns(DriverTestCase):
    """The driver refuses an empty or missing path, and the node's namespace.

    Kuryr would act on the node's namespace instead.
    """

    def unusable(self) -> Iterator[str]:
        self.lab.settle()
        for netns in ('', '/run/netns/gone', '/proc/self/ns/net'):
            with self.subTest(netns=netns):
                before = self.lab.ip('link', 'show')
                yield netns
                self.assertEqual(before, self.lab.ip('link', 'show'))
                self.assertFalse(os.path.exists('/run/netns/gone'))

    def test_connect(self) -> None:
        for netns in self.unusable():
            with self.assertRaises(driver.PodNotConnected):
                self.connect(netns=netns)

    def test_disconnect(self) -> None:
        for netns in self.unusable():
            self.disconnect(netns=netns)

    def test_disconnect_unbinds(self) -> None:
        self.connect()
        self.disconnect(netns='')
        self.assertEqual({}, self.lab.routes())
        self.assertIsNotNone(self.lab.link(lab.PARENT))

    def test_none_is_refused_too(self) -> None:
        with self.assertRaises(driver.PodNotConnected):
            self.connect(netns=None)
        self.disconnect(netns=None)
        self.assertIsNotNone(self.lab.link(lab.PARENT))

    def test_a_path_below_the_hosts_proc(self) -> None:
        # With docker_mode, the daemon sees the host's /proc at another path.
        set_options(self, 'cni_daemon', docker_mode=True,
                    netns_proc_dir='/run/host_proc')
        os.makedirs('/run/host_proc/42/ns')
        os.symlink(self.netns, '/run/host_proc/42/ns/net')
        self.connect(netns='/proc/42/ns/net')
        self.assertEqual(['eth0'], list(self.pod_links()))
        record, = self.snapshot().live.values()
        self.assertEqual('/run/host_proc/42/ns/net', record.netns)


class TestNetnsDirectly(TestNetns):

    binding = 'auto'


class TestParent(DriverTestCase):

    def test_break0_is_never_taken_for_it(self) -> None:
        # Without other hints, Kuryr takes the first interface that is not the
        # loopback.
        set_options(self, 'binding', link_iface='')
        node = mock.Mock(interfaces={'lo': {'flags': 8},
                                     'break0': {'flags': 0},
                                     'eth9': {'flags': 0}})
        stock = nested.MacvlanDriver()
        self.assertEqual('break0', stock._detect_iface_name(node))
        self.assertEqual('eth9', self.driver._detect_iface_name(node))
        del node.interfaces['eth9']
        with self.assertRaises(k_exc.CNIBindingFailure):
            self.driver._detect_iface_name(node)

    def test_break0_configured_as_parent(self) -> None:
        self.connect()
        set_options(self, 'binding', link_iface='break0')
        with self.assertRaisesRegex(k_exc.CNIBindingFailure, 'link_iface'):
            self.connect(netns=self.lab.add_netns('other'))

    def test_another_parent_than_the_pods(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'peer1')
        set_options(self, parent='eth1', strict=True)
        with self.assertRaisesRegex(driver.PodNotConnected, 'eth1.*eth0'):
            self.connect()


class TestParentDirectly(TestParent):

    binding = 'auto'


class TestDetection(DriverTestCase):
    """The driver detects the same parent as Kuryr."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.run('ip', 'link', 'add', 'a0', 'type', 'veth',
                     'peer', 'name', 'b0')
        for name in ('a0', 'b0'):
            self.lab.run('ip', 'link', 'set', name, 'up')
        self.lab.run('ip', 'address', 'add', '10.9.0.1/24', 'dev', 'a0')
        self.lab.run('ip', 'address', 'add', 'fd00:9::1/64', 'dev', 'b0',
                     'nodad')
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'a0',
                     'altname', 'an-altname')

    def parent(self, make: Any) -> Any:
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod', check=False)
        make(self.vif, 'eth0', self.netns, CONTAINER)
        index = self.pod_links()['eth0']['link_index']
        return next(link['ifname'] for link in self.lab.ip('link', 'show')
                    if link['ifindex'] == index)

    def assert_as_kuryr(self, expected: str, link_iface: str = '') -> None:
        set_options(self, 'binding', link_iface=link_iface)
        self.assertEqual(expected, self.parent(
            nested.MacvlanDriver().connect))
        self.assertEqual(expected, self.parent(self.driver.connect))
        self.assertEqual({expected}, {
            link['link'] for link in self.lab.ip('link', 'show')
            if link['ifname'] == 'break0'})
        self.lab.run('ip', 'link', 'del', 'break0')

    def test_the_first(self) -> None:
        for link_iface in ('', 'gone', 'an-altname', 'x' * 40):
            with self.subTest(link_iface):
                self.assert_as_kuryr('eth0', link_iface)

    def listening(self, address: str) -> socket.socket:
        # A test can open only one such socket: Kuryr's processes inherit the
        # socket and outlive the test.
        return socket.create_server(
            (address, 10250),
            family=socket.AF_INET6 if ':' in address else socket.AF_INET)

    def test_the_one_that_kubelet_listens_on(self) -> None:
        with self.listening('10.9.0.1'):
            self.assert_as_kuryr('a0')

    def test_the_same_with_ipv6(self) -> None:
        with self.listening('fd00:9::1'):
            self.assert_as_kuryr('b0')

    def test_if_kubelet_listens_on_all(self) -> None:
        with self.listening('0.0.0.0'):
            self.assert_as_kuryr('eth0')

    def test_the_configured_one(self) -> None:
        self.assert_as_kuryr('b0', 'b0')


class TestDetectionDirectly(TestDetection):

    binding = 'auto'


class TestKuryrsOwn(test_binding.TestNestedMacvlanDriver):
    """Kuryr's unit tests of its macvlan driver pass with break0's driver.

    The namespace in these tests exists. The tests mock IPDB, so the parent
    does not exist: break0 logs an error and binds nothing.
    """

    def setUp(self) -> None:
        super().setUp()
        self.node = lab.Lab()
        self.addCleanup(self.node.close)
        self.ipdbs['/run/netns/pod'] = self.ipdbs.pop(self.netns)
        self.netns = self.node.add_netns('pod')
        self.vif = vif('192.168.0.2', subnets=['192.168.0.1/24'], mtu=1)
        self.vif.vif_name = 'h_interface'
        set_options(self, pod_binding='kuryr')
        # The driver replaces _configure_l3 until Kuryr calls the replacement.
        # In these tests Kuryr does not call it, so the next test would inherit
        # the replacement. kuryr-daemon uses one process per request.
        b_base._configure_l3 = patches._configure_l3

    def test_it_is_our_driver(self) -> None:
        self.assertIsInstance(b_base._get_binding_driver(self.vif),
                              driver.Break0MacvlanDriver)

    def test_connect_hands_over_to_kuryr(self) -> None:
        with mock.patch.object(nested.MacvlanDriver, 'connect',
                               side_effect=exceptions.Break0Error):
            self.assertRaises(driver.PodNotConnected, self._test_connect)
