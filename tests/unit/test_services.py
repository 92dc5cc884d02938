# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
import unittest

from kuryr_break0 import config
from tests import overlay

ETC = os.path.join(overlay.ROOT, 'etc')
UNIT = 'kuryr-break0-agent.service'
BIN = os.path.dirname(sys.executable)


def parsed(*path: str) -> configparser.ConfigParser:
    """A file of etc/, as the section that it has."""
    parser = configparser.ConfigParser(delimiters='=', strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    with open(os.path.join(ETC, *path)) as file:
        parser.read_file(file)
    return parser


class TestUnit(unittest.TestCase):

    def analyze(self, *arguments: str) -> str:
        """What systemd-analyze says of it; it must be content."""
        with open(os.path.join(ETC, 'systemd', 'system', UNIT)) as file:
            text = file.read()
        # It has to be there; whether it is on the path does not matter here.
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
        # Also what it ignores, like a key that it does not know.
        self.assertEqual('', self.analyze('verify', '--man=no'))

    def test_exposure(self) -> None:
        # Of 0 to 100, where 100 is a service that may do anything.
        self.analyze('security', '--offline=true', '--threshold=30')

    def test_what_it_must_be_able_to_do(self) -> None:
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

    def validate(self, text: str) -> int:
        """The exit code of oslo.config's validator."""
        with tempfile.NamedTemporaryFile('w', suffix='.conf') as file:
            file.write(text)
            file.flush()
            namespaces = ['--namespace=' + name for name in (
                'kuryr_break0', 'kuryr_kubernetes', 'kuryr', 'oslo.log')]
            return subprocess.run(
                [os.path.join(BIN, 'oslo-config-validator'),
                 '--fatal-warnings', '--input-file', file.name, *namespaces],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL).returncode

    def test_options_exist(self) -> None:
        with open(os.path.join(ETC, 'kuryr.conf.bare')) as file:
            text = file.read()
        self.assertEqual(0, self.validate(text))
        # It would tell.
        self.assertNotEqual(0, self.validate(
            text.replace('allowed_cidrs', 'allowed_cidr')))


class TestNames(unittest.TestCase):
    """The drop-ins are about the device and protocol of the defaults."""

    def test_of_the_device(self) -> None:
        device, = (opt.default for opt in config.OPTS if opt.dest == 'device')
        self.assertEqual(
            'interface-name:' + device,
            parsed('NetworkManager', 'conf.d', 'kuryr-break0.conf')
            # With + it is one more, whatever others have set.
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
