# SPDX-License-Identifier: Apache-2.0

"""Checks of the addresses of the node."""

from __future__ import annotations

from typing import Iterator

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.node import Node
from kuryr_break0.engine.snapshot import Parent


def check(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report pod addresses whose version of IP the node does not have."""
    own = {address.version for address in node.snapshot.facts.node_addresses
           if not (address.is_link_local or address.is_loopback)}
    for address in node.settled(parent.live):
        if address.version not in own:
            yield KINDS['node-address-missing'].finding(
                'the node has no IPv%d address' % address.version, [address],
                parent=parent.name)
