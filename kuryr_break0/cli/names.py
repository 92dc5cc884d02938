# SPDX-License-Identifier: Apache-2.0

"""Describes routes and neighbours, and finds containers and pods by name."""

from __future__ import annotations

from typing import Mapping

from kuryr_break0 import exceptions
from kuryr_break0 import model
from kuryr_break0 import option_types
from kuryr_break0.texts import close_to

#: Length of a shortened container id, as engines print and accept it.
_SHORT_ID = 12


def described(item: model.Entry, device: str) -> str:
    """Return a route or neighbour in the syntax of ip(8).

    :param device: the name of the interface
    """
    if isinstance(item, model.HostRoute):
        return 'route %s dev %s proto %d table %d%s' % (
            item.dst, device, item.protocol, item.table,
            ' src %s' % item.src if item.src else '')
    return 'neighbour %s dev %s lladdr %s' % (item.dst, device, item.mac)


def is_called(record: model.Record, name: str) -> bool:
    """Return whether a record's container or pod has this name or short id."""
    owner, pod = record.owner.container_id, record.pod or ''
    return name in filter(None, (owner, pod, pod.rpartition('/')[2])) or (
        len(name) >= _SHORT_ID and owner.startswith(name))


def addresses_of(name: str, live: Mapping[model.IPAddress, model.Record]
                 ) -> list[model.IPAddress]:
    """Return the addresses of a container or pod, or the given address.

    :param name: name of a container or pod, container id, or address
    :param live: the newest claim on each address
    :raises WrongUsage: if no container or pod has the name
    """
    try:
        return [option_types.host_address(name)]
    except ValueError as err:
        addresses = sorted((address for address, record in live.items()
                            if is_called(record, name)),
                           key=model.address_order)
        if not addresses:
            raise exceptions.WrongUsage(
                '%s, and no container or pod of that name is bound here '
                '(see kuryr-break0 status)%s' % (err, close_to(name, [
                    each.pod or each.owner.container_id
                    for each in live.values()])))
        return addresses
