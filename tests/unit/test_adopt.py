# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import tempfile
import types
from typing import Any
import unittest

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
        """As a container may have while its own interface is down."""
        port: Any = types.SimpleNamespace(
            mac=MAC, not_ours=None, damaged=None, pod='default/pod',
            ifname='eth0', addresses=tuple(base.addresses('10.0.0.71')))
        found = macvlan('/run/netns/pod', True), macvlan('/evil', False)
        for order in itertools.permutations(found):
            with tempfile.TemporaryDirectory() as directory:
                finding = adopt.Adopter(base.options(state_dir=directory),
                                        None, order, True).adopt(port)
            self.assertEqual(('adopted', '/run/netns/pod'),
                             (finding.outcome, finding.netns))
