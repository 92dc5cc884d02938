# SPDX-License-Identifier: Apache-2.0

"""The class that replaces Kuryr's nested macvlan VIF in kuryr-daemon."""

from __future__ import annotations

import ipaddress
from typing import Any

from kuryr_kubernetes.objects import vif as k_vif
from oslo_versionedobjects import base as obj_base

from kuryr_break0 import model


# os_vif_plugin registers the class; this decorator only prepares it.
@obj_base.VersionedObjectRegistry.objectify
class VIFMacvlanBreak0(k_vif.VIFMacvlanNested):  # type: ignore[misc]
    """A ``VIFMacvlanNested`` with another class name.

    Kuryr selects the binding driver by ``type(vif).__name__``, but serializes
    the VIF by ``obj_name()``. So a nested macvlan VIF of any controller
    becomes an object of this class, and is serialized as before.
    """

    VERSION = k_vif.VIFMacvlanNested.VERSION

    @classmethod
    def obj_name(cls) -> str:
        return k_vif.VIFMacvlanNested.obj_name()  # type: ignore[no-any-return]


def addresses(vif: Any) -> list[model.IPAddress]:
    """Return the fixed IPs of all subnets of a VIF."""
    return [ipaddress.ip_address(str(fixed_ip.address))
            for subnet in vif.network.subnets.objects
            for fixed_ip in subnet.ips.objects]


def subnets(vif: Any) -> list[model.IPNetwork]:
    """Return the networks of the subnets of a VIF."""
    return [ipaddress.ip_network(str(subnet.cidr), strict=False)
            for subnet in vif.network.subnets.objects]
