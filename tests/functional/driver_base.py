# SPDX-License-Identifier: Apache-2.0

"""The base of tests of the VIF driver."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator
import unittest

from kuryr_kubernetes.cni.binding import nested
from kuryr_kubernetes import config as k_config

from kuryr_break0.kuryr import driver
from kuryr_break0.kuryr import vif as break0_vif
from tests.functional import base
from tests.functional.base import POD
from tests.support import kuryr
from tests.support import lab

CONTAINER = base.OWNER.container_id


def vif(*addresses: str, **kwargs: Any) -> Any:
    """Return a VIF as kuryr-daemon deserializes it with break0."""
    primitive = kuryr.macvlan_vif(*addresses, **kwargs).obj_to_primitive()
    return break0_vif.VIFMacvlanBreak0._obj_from_primitive(
        None, '1.0', primitive)


def names(links: list[dict[str, Any]]) -> set[str]:
    return {link['ifname'] for link in links}


def set_options(test: unittest.TestCase, group: str = 'break0',
                **values: Any) -> None:
    """Set options of kuryr.conf until the test ends."""
    driver.config.register(k_config.CONF)
    for name, value in values.items():
        k_config.CONF.set_override(name, value, group=group)
        test.addCleanup(k_config.CONF.clear_override, name, group=group)


class DriverTestCase(base.LabTestCase):

    #: The value of the option pod_binding
    binding = 'kuryr'
    #: The class or module with the function ``disconnect`` that the driver
    #: calls if pod_binding has this value
    disconnecting: Any = nested.MacvlanDriver

    def setUp(self) -> None:
        super().setUp()
        k_config.CONF([], project='kuryr', default_config_files=[])
        set_options(self, 'binding', link_iface=lab.PARENT)
        set_options(self, pod_binding=self.binding)
        self.netns = self.lab.add_netns('pod')
        self.vif = vif(POD)
        self.driver = driver.Break0MacvlanDriver()

    def connect(self, **changes: Any) -> None:
        self.driver.connect(
            **{'vif': self.vif, 'ifname': 'eth0', 'netns': self.netns,
               'container_id': CONTAINER, **changes})

    def disconnect(self, **changes: Any) -> None:
        self.driver.disconnect(
            **{'vif': self.vif, 'ifname': 'eth0', 'netns': self.netns,
               'container_id': CONTAINER, **changes})

    def pod_links(self) -> dict[str, Any]:
        return {link['ifname']: link
                for link in self.lab.ip('link', 'show', netns='pod')
                if link['ifname'] != 'lo'}

    @contextlib.contextmanager
    def break0_taken(self) -> Iterator[None]:
        """Make a bind fail within the block by a name conflict."""
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                     'peer', 'name', 'peer0')
        yield
        self.lab.run('ip', 'link', 'del', 'break0')
