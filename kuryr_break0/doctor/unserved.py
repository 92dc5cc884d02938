# SPDX-License-Identifier: Apache-2.0

"""Reports containers that are not bound, with the reason."""

from __future__ import annotations

import time
from typing import Iterable, Iterator, Sequence

from kuryr_break0 import config
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import inside
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor.node import Node
from kuryr_break0.engine import actual
from kuryr_break0.engine import containers
from kuryr_break0 import kernel
from kuryr_break0 import model

#: Maximum seconds that the agent needs to bind a new container.
_SETTLED = 1.0
_KINDS = {
    containers.Reason.MODE: 'container-mode',
    containers.Reason.OTHER_PARENT: 'container-other-parent',
    containers.Reason.NOT_ALLOWED: 'container-not-allowed',
    containers.Reason.DUPLICATE: 'container-refused',
    containers.Reason.REFUSED: 'container-refused',
    containers.Reason.CLAIMED: 'address-twice',
    containers.Reason.NOT_DISCOVERED: 'container-not-discovered',
    containers.Reason.TENTATIVE: 'container-pending',
    containers.Reason.NO_ADDRESS: 'container-pending',
    containers.Reason.PENDING: 'container-pending'}


def check(node: Node, netlink: kernel.Netlink, host: Host
          ) -> Iterator[Finding]:
    """Report containers that stay unbound, one finding for each remedy."""
    if not node.options.enabled:  # the finding "disabled" is the reason
        return
    unserved = containers.unserved(node.snapshot, node.ledger)
    if unserved:
        time.sleep(_SETTLED)
        node.refresh()
        still = set(map(str, containers.unserved(actual.read(
            node.options, node.ledger, netlink), node.ledger)))
        unserved = [each for each in unserved if str(each) in still
                    and each.address not in node.changing]
    for kind in dict.fromkeys(_KINDS.values()):
        some = [each for each in unserved if _KINDS[each.reason] == kind]
        if some:
            yield KINDS[kind].finding(
                str(some[0]),
                [each.address or '%s in %s' % (each.macvlan.link.name,
                                               each.macvlan.netns)
                 for each in some],
                commands=_commands(kind, some, node.options, host))


def _commands(kind: str, unserved: Sequence[containers.Unserved],
              options: config.Options, host: Host) -> list[str]:
    if kind == 'container-mode':
        return list(dict.fromkeys(
            inside(each.macvlan.netns,
                   'ip link set %s type macvlan mode bridge',
                   each.macvlan.link.name)
            for each in unserved if each.macvlan.link.mode != 'passthru'))
    if kind == 'container-other-parent':
        # The option allows one parent. Without it, all parents are allowed.
        return host.unset('parent') if kernel.has_interface(
            str(options.parent)) else host.set(
                parent=min(each.macvlan.parent for each in unserved))
    if kind == 'container-not-allowed':
        return host.set(allowed_cidrs=with_networks(
            _addresses(unserved), options))
    if kind == 'container-not-discovered':
        if host.has_kuryr:
            return ['kuryr-break0 adopt']
        change = [] if options.discover else host.set(
            discover='true', allowed_cidrs=with_networks(
                _addresses(unserved), options))
        return [*change, host.start]
    return []


def _addresses(unserved: Sequence[containers.Unserved]
               ) -> list[model.IPAddress]:
    return [each.address for each in unserved if each.address is not None]


def with_networks(addresses: Iterable[model.IPAddress],
                  options: config.Options) -> str:
    """Return a value of allowed_cidrs that also allows these addresses."""
    new = {*map(containers.network_of, addresses)} - {*options.allowed_cidrs}
    return ','.join(map(str, (*options.allowed_cidrs, *sorted(
        new, key=lambda each: model.address_order(each.network_address)))))
