# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import option_types


def load(section: str = '', **environ: str) -> config.Options:
    """Return the options of a configuration file.

    :param section: the lines of the section ``[break0]``
    :param environ: additional environment variables
    """
    with tempfile.NamedTemporaryFile('w', suffix='.conf') as file:
        file.write('[break0]\n' + section)
        file.flush()
        conf = cfg.ConfigOpts()
        with mock.patch.dict(os.environ, environ):
            conf(['--config-file', file.name], project='kuryr')
            return config.load(conf)


class TestLoad(unittest.TestCase):

    def test_defaults(self) -> None:
        self.assertEqual(
            config.Options(
                enabled=True, pod_binding='auto', device='break0',
                parent=None, addr=(), route_protocol=176,
                route_table=254, allowed_cidrs=(),
                resync_interval=60, strict=False,
                guard='auto', discover=False,
                state_dir='/run/kuryr-break0',
                proc_dirs=('/proc', '/host_proc'), sysctl_dir='/proc/sys',
                metrics_bind=option_types.Endpoint(
                    ipaddress.ip_address('127.0.0.1'), 9817)),
            load())

    def test_all_set(self) -> None:
        options = load('''
enabled = no
pod_binding = kuryr
device = shim
parent = eth0
addr = 100.75.30.7, fd00::7/128
route_protocol = 200
route_table = 1000
allowed_cidrs = 10.0.0.0/8,fd00::/64
resync_interval = 5
strict = true
guard = on
discover = true
state_dir = /run/other
proc_dirs = /host/proc
sysctl_dir = /host/proc/sys
metrics_bind = [::1]:80
''')
        self.assertEqual(
            config.Options(
                enabled=False, pod_binding='kuryr', device='shim',
                parent='eth0',
                addr=(ipaddress.ip_address('100.75.30.7'),
                      ipaddress.ip_address('fd00::7')),
                route_protocol=200, route_table=1000,
                allowed_cidrs=(ipaddress.ip_network('10.0.0.0/8'),
                               ipaddress.ip_network('fd00::/64')),
                resync_interval=5, strict=True,
                guard='on', discover=True,
                state_dir='/run/other', proc_dirs=('/host/proc',),
                sysctl_dir='/host/proc/sys',
                metrics_bind=option_types.Endpoint(
                    ipaddress.ip_address('::1'), 80)),
            options)

    def test_no_metrics(self) -> None:
        self.assertIsNone(load('metrics_bind =').metrics_bind)
        self.assertIsNone(load(OS_BREAK0__METRICS_BIND='').metrics_bind)

    def test_an_endpoint_is_written_as_it_is_read(self) -> None:
        for text in ('[fd00::1]:9817', '0.0.0.0:80'):
            self.assertEqual(text,
                             str(load('metrics_bind = ' + text).metrics_bind))

    def test_the_environment_wins(self) -> None:
        options = load('addr = 100.75.30.7',
                       OS_BREAK0__ADDR='100.75.30.8,fd00::8')
        self.assertEqual(['100.75.30.8', 'fd00::8'],
                         [str(address) for address in options.addr])

    def test_bad_values(self) -> None:
        for line, *texts in (
                ('enabled = perhaps', "'perhaps'", 'must be true or false'),
                ('pod_binding = both', "'both'", 'auto or kuryr'),
                ('device = more than fifteen', 'more than', '15 characters'),
                ('device = ..', "'..'", 'interface name'),
                ('device = all', "'all'", 'interface name'),
                ('parent = default', "'default'", 'interface name'),
                ('device = a/b', "'a/b'", '"/"'),
                ('device = br%d', "'br%d'", '"%"'),
                ('device = éééééééé', 'interface name', '15'),
                ('parent = a b', "'a b'", 'interface name'),
                ('addr = 100.75.30.7/24', '100.75.30.7/24', 'single address'),
                ('addr = eth0', "'eth0'", 'IPv4 or IPv6'),
                ('addr = 224.0.0.1', '224.0.0.1', 'multicast'),
                ('addr = fe80::1', 'fe80::1', 'link-local'),
                ('route_protocol = 4', "'4'", 'from 5 to 255'),
                ('route_protocol = kernel', "'kernel'", 'from 5 to 255'),
                ('route_table = 0', "'0'", 'from 1 to 4294967295'),
                ('route_table = ', "''", 'from 1 to 4294967295'),
                ('route_protocol = ', "''", 'from 5 to 255'),
                ('resync_interval = ', "''", 'from 1 to 86400'),
                ('allowed_cidrs = 10.0.0.1/8', '10.0.0.1/8', 'host bits'),
                ('allowed_cidrs = ten', "'ten'", '10.0.0.0/16'),
                ('strict = 2', "'2'", 'must be true or false'),
                ('state_dir = run', "'run'", 'absolute path'),
                ('sysctl_dir = proc/sys', "'proc/sys'", 'absolute path'),
                ('metrics_bind = 9817', "'9817'", '127.0.0.1:9817'),
                ('metrics_bind = localhost:9817', 'localhost', 'IP address'),
                ('metrics_bind = ::1:9817', '::1:9817', '[::1]:9817'),
                ('metrics_bind = [127.0.0.1]:9817', '[127', 'IP address'),
                ('metrics_bind = 127.0.0.1:0', ':0', 'a port'),
                ('metrics_bind = 127.0.0.1:65536', '65536', 'a port')):
            with self.subTest(line=line):
                with self.assertRaises(exceptions.InvalidOption) as caught:
                    load(line)
                message = str(caught.exception)
                option = line.split(' = ')[0]
                for text in ('[break0] %s' % option, *texts, '.conf)'):
                    self.assertIn(text, message)
                self.assertNotIn('\n', message)
                self.assertNotIn('LocationInfo', message)

    def test_a_bad_value_of_the_environment_names_it(self) -> None:
        with self.assertRaisesRegex(exceptions.InvalidOption,
                                    'OS_BREAK0__STRICT'):
            load(OS_BREAK0__STRICT='maybe')

    def test_the_name_is_known_despite_wrong_options(self) -> None:
        for section, name in (('device = shim\naddr = x', 'shim'),
                              ('device = a/b', 'break0')):
            with tempfile.NamedTemporaryFile('w') as file:
                file.write('[break0]\n' + section)
                file.flush()
                conf = cfg.ConfigOpts()
                conf(['--config-file', file.name])
                self.assertEqual(name, config.read_device_name(conf))

    def test_two_configurations_do_not_mix(self) -> None:
        first, second = cfg.ConfigOpts(), cfg.ConfigOpts()
        for conf in (first, second):
            config.register(conf)
            conf([], default_config_files=[])
        first.set_override('device', 'shim', group='break0')
        self.assertEqual('break0', config.load(second).device)


class TestHelp(unittest.TestCase):

    def test_the_documented_options_are_the_options(self) -> None:
        (group, opts), = config.list_opts()
        self.assertEqual('break0', group.name)
        self.assertEqual([opt.name for opt in config.OPTS],
                         [opt.name for opt in opts])
        for ours, theirs in zip(config.OPTS, opts):
            self.assertIsNot(ours, theirs)

    def test_the_configuration_needs_nothing_else(self) -> None:
        # The generator and the doctor must work without a working Kuryr.
        loaded = subprocess.run(
            [sys.executable, '-c',
             'import sys; import kuryr_break0.config; '
             'print([m for m in sys.modules if m.split(".")[0] in '
             '("pyroute2", "kuryr_kubernetes", "os_vif")])'],
            check=True, text=True, stdout=subprocess.PIPE).stdout
        self.assertEqual('[]', loaded.strip())


class TestUnicastMAC(unittest.TestCase):
    """The type of MAC addresses on the command line."""

    def test_bad_ones(self) -> None:
        for text, reason in (('2:0:0:0:0:1', 'six hexadecimal'),
                             ('01:00:5e:00:00:01', 'unicast'),
                             ('00:00:00:00:00:00', 'unicast')):
            with self.assertRaisesRegex(ValueError, reason):
                option_types.unicast_mac(text)

    def test_it_is_written_as_the_kernel_writes_it(self) -> None:
        self.assertEqual('02:aa:00:00:00:01',
                         option_types.unicast_mac('02:AA:00:00:00:01'))


class TestUnknown(unittest.TestCase):

    def test_a_program_that_has_read_no_files(self) -> None:
        """A program with os-vif loads our plugin, but reads no files."""
        conf = cfg.ConfigOpts()
        with mock.patch.dict(os.environ, OS_BREAK0__STRIKT='true'):
            self.assertEqual(
                ['[break0] strikt in the environment is no option: did you '
                 'mean strict?'], config.list_unknown(conf))

    def test_names_that_oslo_config_does_not_take(self) -> None:
        with tempfile.NamedTemporaryFile('w', suffix='.conf') as file:
            file.write('[break0]\nallowed-cidrs = 10.0.0.0/8\n'
                       '[Break0]\nstrikt = true\n')
            file.flush()
            conf = cfg.ConfigOpts()
            conf(['--config-file', file.name])
            self.assertEqual((), config.load(conf).allowed_cidrs)
            self.assertEqual(
                ['[break0] %s in %s is no option: did you mean %s?' % (
                    name, file.name, meant) for name, meant in (
                        ('allowed-cidrs', 'allowed_cidrs'),
                        ('strikt', 'strict'))], config.list_unknown(conf))
