# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import tempfile
import types
from typing import Any
import unittest
from unittest import mock

from kuryr_break0.cli import adopt
from kuryr_break0 import kernel
from kuryr_break0.model import NamespaceId
from tests.functional import base

MAC = 'fa:16:3e:00:00:01'


def macvlan(netns: str, up: bool) -> kernel.Macvlan:
    link: Any = types.SimpleNamespace(mac=MAC, mode='bridge', up=up,
                                      name='eth0')
    return kernel.Macvlan(netns, NamespaceId(4, 1), 'eth0', link, ())


class TestAdopter(unittest.TestCase):

    def test_another_one_with_its_mac_address(self) -> None:
        """A container with its interface down can have a pod's MAC address."""
        port: Any = types.SimpleNamespace(
            mac=MAC, refusal=None, damaged=None, pod='default/pod',
            ifname='eth0', addresses=tuple(base.addresses('10.0.0.71')))
        found = macvlan('/run/netns/pod', True), macvlan('/evil', False)
        for order in itertools.permutations(found):
            with tempfile.TemporaryDirectory() as directory:
                finding = adopt.Adopter(base.options(state_dir=directory),
                                        None, order, True).adopt(port)
            self.assertEqual(('adopted', '/run/netns/pod'),
                             (finding.outcome, finding.netns))

    def test_a_dry_run_refuses_as_the_run_does(self) -> None:
        port: Any = types.SimpleNamespace(
            mac=MAC, refusal=None, damaged=None, pod='default/pod',
            ifname='eth0', addresses=tuple(base.addresses('10.0.0.71')),
            subnets=())
        for options, next_hops, reason in (
                ({'allowed_cidrs': ['10.1.0.0/16']}, (),
                 'it is outside [break0] allowed_cidrs'),
                ({}, port.addresses, 'it is a next hop of a route')):
            for dry_run in (True, False):
                with self.subTest(reason=reason, dry_run=dry_run), \
                        tempfile.TemporaryDirectory() as directory, \
                        mock.patch.object(kernel.Netlink, 'next_hops',
                                          return_value=next_hops):
                    finding = adopt.Adopter(
                        base.options(state_dir=directory, **options), None,
                        [macvlan('/proc/self/ns/net', True)], dry_run
                    ).adopt(port)
                    self.assertEqual('failed', finding.outcome)
                    self.assertIn(reason, str(finding.reason))
