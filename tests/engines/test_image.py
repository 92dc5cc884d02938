# SPDX-License-Identifier: Apache-2.0

"""Tests the agent as a container of Docker: etc/docker/compose.yaml."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any
import unittest

import yaml

from tests.cluster import image as cluster_image
from tests.engines import base
from tests.engines import discovery_base
from tests.engines import image
from tests.support import lab

COMPOSE = pathlib.Path(__file__).parents[2] / 'etc/docker/compose.yaml'
ARCHIVE = os.path.join(cluster_image.DIRECTORY, image.ARCHIVE)
#: Keys of the service that arguments() does not translate. The tests run the
#: command and the health check themselves.
_IGNORED = {'build', 'image', 'command', 'restart', 'healthcheck'}


def arguments(service: dict[str, Any]) -> list[str]:
    """Return the arguments of ``docker run`` for a service.

    Debian 12 has no "docker compose".

    :raises KeyError: for an unknown key
    """
    found = []
    for key, value in service.items():
        if key == 'environment':
            found += ['--env=%s=%s' % (
                name, discovery_base.CIDRS if name.endswith('CIDRS') else each)
                for name, each in value.items()]
        elif key == 'read_only':
            found += ['--read-only'] * value
        elif key not in _IGNORED:
            option = {'container_name': 'name', 'network_mode': 'network',
                      'pid': 'pid', 'cap_drop': 'cap-drop',
                      'cap_add': 'cap-add', 'security_opt': 'security-opt',
                      'volumes': 'volume'}[key]
            found += ['--%s=%s' % (option, each) for each in (
                value if isinstance(value, list) else [value])]
    return found


@unittest.skipUnless(os.path.exists(ARCHIVE), 'needs tests.engines.image')
class TestImage(discovery_base.DiscoveryTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.docker = base.Docker(self)
        self.docker('load', '--input', ARCHIVE)
        self.docker('tag', 'localhost/' + image.NAME, image.NAME)
        self.docker('network', 'create', '--driver', 'macvlan', '--ipv6',
                    '--subnet', '100.75.30.0/24', '--gateway', lab.LAN,
                    '--subnet', 'fd00:30::/64', '--ip-range',
                    '100.75.30.224/27', '--opt', 'parent=eth0', 'lan')
        service, = yaml.safe_load(COMPOSE.read_text())['services'].values()
        self.service = service
        self.arguments = arguments(service)

    def start_agent_container(self) -> None:
        self.docker('run', '--detach', *self.arguments, image.NAME,
                    *self.service['command'])

    def call_inside(self, *args: str) -> str:
        return self.docker('exec', 'kuryr-break0', 'kuryr-break0', *args)

    def test_containers_are_bound_and_unbound(self) -> None:
        self.docker.run('before', '--network', 'lan')
        self.start_agent_container()
        self.reach(self.docker, 'before')
        self.docker.run('web', '--network', 'lan')
        address = self.reach(self.docker, 'web')
        self.until(lambda: 'web/eth0' in self.call_inside('status'))
        # The doctor would report any other fault.
        findings = json.loads(self.docker(
            'exec', 'kuryr-break0', 'kuryr-break0', 'doctor', '--json'))
        self.assertEqual([], [each for each in findings['findings']
                              if each['severity'] != 'hint'])
        test = self.service['healthcheck']['test']
        self.assertEqual('CMD', test[0])
        self.docker('exec', 'kuryr-break0', *test[1:])
        self.docker('rm', '--force', 'web')
        self.until(lambda: address not in self.lab.routes())

    def test_a_restart_of_the_agent_loses_no_route(self) -> None:
        self.start_agent_container()
        self.docker.run('web', '--network', 'lan')
        address = self.reach(self.docker, 'web')
        self.docker('rm', '--force', 'kuryr-break0')
        self.assertTrue(self.lab.ping(address))
        self.docker.run('meanwhile', '--network', 'lan')
        self.start_agent_container()
        self.reach(self.docker, 'meanwhile')
        self.reach(self.docker, 'web')

    def test_cleanup_in_a_container_of_its_own(self) -> None:
        self.start_agent_container()
        self.docker.run('web', '--network', 'lan')
        self.reach(self.docker, 'web')
        self.docker('rm', '--force', 'kuryr-break0')
        self.docker('run', '--rm', *self.arguments, image.NAME,
                    'kuryr-break0', 'cleanup')
        self.assertIsNone(self.lab.link('break0'))
        self.assertEqual('', self.lab.run('nft', 'list', 'ruleset').stdout)


class TestArguments(unittest.TestCase):

    def test_each_key_is_known(self) -> None:
        service, = yaml.safe_load(COMPOSE.read_text())['services'].values()
        self.assertIn('--cap-add=SYS_PTRACE', arguments(service))
        with self.assertRaises(KeyError):
            arguments({**service, 'privileged': True})
