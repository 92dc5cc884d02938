# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
import unittest

from kuryr.lib import opts as lib_opts
from kuryr_kubernetes import opts as kuryr_opts
from oslo_config import cfg
from oslo_log import log as logging

from kuryr_break0.cli import common
from kuryr_break0 import config
from tests.support import overlay
from tests.support import pages

ETC = os.path.join(overlay.ROOT, 'etc')
UNIT = 'kuryr-break0-agent.service'
BIN = os.path.dirname(sys.executable)


def parsed(*path: str) -> configparser.ConfigParser:
    """Return the parsed file at a path below etc/."""
    parser = configparser.ConfigParser(delimiters='=', default_section='')
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    with open(os.path.join(ETC, *path)) as file:
        parser.read_file(file)
    return parser


class TestUnit(unittest.TestCase):

    def analyze(self, *arguments: str) -> str:
        """Return the output of systemd-analyze, which has to succeed."""
        with open(os.path.join(ETC, 'systemd', 'system', UNIT)) as file:
            text = file.read()
        # systemd-analyze fails unless the program exists, so the program of
        # this environment replaces the unit's program.
        self.assertIn('\nExecStart=kuryr-break0 ', text)
        text = text.replace('\nExecStart=kuryr-break0 ',
                            '\nExecStart=%s/kuryr-break0 ' % BIN)
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, UNIT)
            with open(path, 'w') as file:
                file.write(text)
            done = subprocess.run(
                ['systemd-analyze', *arguments, path], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def test_verify(self) -> None:
        # systemd-analyze also prints the keys that systemd ignores, such as
        # unknown keys.
        self.assertEqual('', self.analyze('verify', '--man=no'))

    def test_block_of_the_page(self) -> None:
        """The block that installs the unit works as pasted."""
        with tempfile.TemporaryDirectory() as top:
            units, share = top + '/units', top + '/venv/share/kuryr-break0'
            os.makedirs(share)
            os.makedirs(top + '/venv/bin')
            os.symlink(os.path.join(ETC, 'systemd'), share + '/systemd')
            os.symlink(BIN + '/kuryr-break0', top + '/venv/bin/kuryr-break0')
            with open(top + '/venv/bin/systemctl', 'w') as file:
                file.write('#!/bin/sh\necho "$@"\n')
            os.chmod(file.name, 0o755)
            block = pages.block('install/bare.rst', 'ExecStart').replace(
                '/etc/systemd/system', units)
            shown = subprocess.check_output(
                ['sh', '-eu', '-c', block], text=True, cwd='/', env={
                    'PATH': '%s/venv/bin:%s' % (top, os.environ['PATH'])})
            self.assertEqual('daemon-reload\nenable --now '
                             'kuryr-break0-agent\n', shown)
            done = subprocess.run(
                ['systemd-analyze', 'verify', '--man=no', units + '/' + UNIT],
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((0, ''), (done.returncode, done.stdout))
            with open('%s/%s.d/path.conf' % (units, UNIT)) as file:
                self.assertIn('=%s/venv/bin/kuryr-break0 agent\n' % top,
                              file.read())

    def test_drop_in_for_discovery(self) -> None:
        name = 'kuryr-break0-agent.service.d'
        path = ('systemd', 'system', name, 'discover.conf')
        # systemd adds the drop-in's capabilities to the capabilities of the
        # unit.
        self.assertEqual(
            'CAP_NET_BROADCAST CAP_SYS_PTRACE',
            parsed(*path)['Service']['CapabilityBoundingSet'])

    def test_order(self) -> None:
        unit = parsed('systemd', 'system', UNIT)['Unit']
        # Later targets, such as network-online.target, may depend on a bound
        # container.
        self.assertEqual(['network.target'], unit['After'].split())
        self.assertEqual({'After', 'Description', 'Documentation',
                          'StartLimitIntervalSec'}, set(unit))

    def test_an_upgrade_after_several_restarts_starts_it(self) -> None:
        unit = parsed('systemd', 'system', UNIT)['Unit']
        self.assertEqual('0', unit['StartLimitIntervalSec'])

    def test_reload_needs_no_package(self) -> None:
        service = parsed('systemd', 'system', UNIT)['Service']
        # kill(1) is in the package procps, which a minimal Debian lacks.
        self.assertEqual("sh -c 'kill -HUP $MAINPID'",
                         service['ExecReload'])

    def test_a_wrong_configuration_is_tried_once(self) -> None:
        service = parsed('systemd', 'system', UNIT)['Service']
        self.assertEqual(str(common.USAGE),
                         service['RestartPreventExitStatus'])

    def test_a_reload_waits_until_it_handles_signals(self) -> None:
        service = parsed('systemd', 'system', UNIT)['Service']
        self.assertEqual('notify', service['Type'])

    def test_exposure(self) -> None:
        # The exposure ranges from 0 to 100, the exposure of a service without
        # restrictions.
        self.analyze('security', '--offline=true', '--threshold=30')

    def test_capabilities_of_the_unit(self) -> None:
        service = parsed('systemd', 'system', UNIT)['Service']
        self.assertEqual('CAP_NET_ADMIN CAP_SYS_ADMIN',
                         service['CapabilityBoundingSet'])
        self.assertEqual('net', service['RestrictNamespaces'])
        self.assertIn('AF_NETLINK', service['RestrictAddressFamilies'])
        self.assertIn('/proc/sys/net', service['ReadWritePaths'])
        for taken_away in ('ProtectKernelTunables', 'ProcSubset',
                           'PrivateNetwork', 'PrivateUsers', 'User'):
            self.assertNotIn(taken_away, service)

    def test_the_ledger_outlives_it(self) -> None:
        service = parsed('systemd', 'system', UNIT)['Service']
        self.assertEqual('yes', service['RuntimeDirectoryPreserve'])
        state_dir, = (opt.default for opt in config.OPTS
                      if opt.dest == 'state_dir')
        self.assertEqual(state_dir, '/run/' + service['RuntimeDirectory'])


class TestBareConfiguration(unittest.TestCase):

    def test_options_exist(self) -> None:
        sample = parsed('kuryr.conf.bare')
        conf = cfg.ConfigOpts()
        logging.register_options(conf)
        for group, opts in (*config.list_opts(), *kuryr_opts.list_kuryr_opts(),
                            *lib_opts.list_kuryr_opts()):
            # A section that is missing in the sample may have required
            # options.
            if str(getattr(group, 'name', group)) in sample:
                conf.register_opts(opts, group=group)
        conf(['--config-file', os.path.join(ETC, 'kuryr.conf.bare')])
        for section in sample.sections():
            values = conf if section == 'DEFAULT' else conf[section]
            for option in sample[section]:
                # oslo.config raises an error for unknown options and invalid
                # values.
                self.assertIsNotNone(values[option], option)
        self.assertEqual(['10.0.0.0/16'],
                         list(map(str, conf.break0.allowed_cidrs)))


class TestNames(unittest.TestCase):
    """The drop-ins name the default device and route protocol."""

    def test_of_the_device(self) -> None:
        device, = (opt.default for opt in config.OPTS if opt.dest == 'device')
        self.assertEqual(
            'interface-name:' + device,
            parsed('NetworkManager', 'conf.d', 'kuryr-break0.conf')
            # The + appends to the devices of other configuration files.
            ['keyfile']['unmanaged-devices+'])
        network = parsed('systemd', 'network', '10-kuryr-break0.network')
        self.assertEqual(device, network['Match']['Name'])

    def test_of_the_protocol(self) -> None:
        with open(os.path.join(ETC, 'iproute2', 'rt_protos.d',
                               'kuryr-break0.conf')) as file:
            number, name = file.read().splitlines()[-1].split()
        protocol, = (opt.default for opt in config.OPTS
                     if opt.dest == 'route_protocol')
        self.assertEqual((str(protocol), 'break0'), (number, name))
