# SPDX-License-Identifier: Apache-2.0

"""The VIF that stands for Kuryr's nested macvlan VIF in kuryr-daemon."""

from __future__ import annotations

import ipaddress
from typing import Any

from kuryr_kubernetes.objects import vif as k_vif
from oslo_versionedobjects import base as obj_base

from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPNetwork


# Only made ready here: who registers it decides that it is used.
@obj_base.VersionedObjectRegistry.objectify
class VIFMacvlanBreak0(k_vif.VIFMacvlanNested):  # type: ignore[misc]
    """A ``VIFMacvlanNested`` in all but the name of its class.

    Kuryr chooses the binding driver by that name, ``type(vif).__name__``,
    while what is on the wire goes by ``obj_name()``. So an object that any
    controller has written becomes one of this class when it is read, and is
    written again as what it was.
    """

    VERSION = k_vif.VIFMacvlanNested.VERSION

    @classmethod
    def obj_name(cls) -> str:
        return k_vif.VIFMacvlanNested.obj_name()  # type: ignore[no-any-return]


def addresses(vif: Any) -> list[IPAddress]:
    """Return the addresses of a VIF: all fixed IPs of all its subnets."""
    return [ipaddress.ip_address(str(fixed_ip.address))
            for subnet in vif.network.subnets.objects
            for fixed_ip in subnet.ips.objects]


def subnets(vif: Any) -> list[IPNetwork]:
    """Return the networks that a VIF is in on its link."""
    return [ipaddress.ip_network(str(subnet.cidr), strict=False)
            for subnet in vif.network.subnets.objects]
