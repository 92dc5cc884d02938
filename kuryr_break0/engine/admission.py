# SPDX-License-Identifier: Apache-2.0

"""Validates the arguments of a bind, and refuses addresses by look-ups.

The look-ups take the same time for any number of pods. A sync reads the same
facts from whole tables.
"""

from __future__ import annotations

import contextlib
from typing import Optional

from kuryr_break0.break0.devices import Devices
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: Maximum number of addresses of one interface. A bind holds the lock for
#: about 0.1 ms per address.
MAX_ADDRESSES = 512


class Admission:
    """Decides whether a bind may use an address."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 devices: Devices) -> None:
        self._options = options
        self._policy = policy.Policy(options)
        self._ledger = ledger
        self._devices = devices

    def refusal(self, address: model.IPAddress, parent: str,
                origin: Optional[model.Origin]) -> Optional[str]:
        """Return the reason why a bind refuses an address, or None.

        If the facts about the address cannot be read, the address is bound. A
        later sync reads the facts and refuses the address if necessary.
        """
        reason = self._policy.refusal(address, origin)
        if reason is not None:
            return reason
        try:
            facts = self._facts(address, parent)
        except (exceptions.Break0Error, OSError) as err:
            LOG.warning('Cannot check whether this node itself uses %s: %s. '
                        'Binding it; the next sync checks it again', address,
                        err)
            return None
        return self._policy.refusal(address, origin, facts)

    def _facts(self, address: model.IPAddress, parent: str) -> policy.Facts:
        """Look up the facts about one address."""
        own: set[model.IPAddress] = set()
        try:
            own.update(filter(None, [kernel.find_source(address)]))
        except PermissionError:
            return policy.Facts(no_hosts=(address,))
        # A look-up in a VRF needs a socket that is bound to an interface of
        # the VRF. Before Linux 5.7, SO_BINDTODEVICE needs CAP_NET_RAW.
        with contextlib.suppress(PermissionError):
            own.update(filter(None, [kernel.find_source(address, parent)]))
        cache = self._ledger.cache
        next_hops = cache.get_recent('next_hops')
        if next_hops is None:
            with kernel.Netlink() as netlink:
                by_version = netlink.next_hops(self._devices.indexes(),
                                               self._options.route_protocol)
            next_hops = sorted(map(str, by_version))
            cache.put('next_hops', next_hops)
            self._ledger.add_next_hops(by_version)
        # Only a sync writes `through_break0`, because the time to list the
        # next hops through break0 grows with the number of pods.
        through_break0 = cache.get('through_break0') or ()
        text = str(address)
        return policy.Facts(
            own, (), (address,) if text in next_hops else (),
            (address,) if text in through_break0 else (),
            self._ledger.list_recent_next_hops())


def validate(owner: model.Owner, addresses: list[model.IPAddress], parent: str,
             mac: Optional[str], netns: Optional[str], pod: Optional[str]
             ) -> tuple[list[model.IPAddress], Optional[str]]:
    """Validate the arguments of a bind.

    The arguments come from a KuryrPort, a container engine or a user, and can
    contain any text.

    :returns: the addresses without duplicates, and the MAC address in lower
        case
    :raises InputRefused: if an argument is invalid
    """
    reason = None
    for what, text in (('container id', owner.container_id),
                       ('interface', owner.ifname), ('parent', parent),
                       ('namespace path', netns), ('pod', pod)):
        if text is not None and not (isinstance(text, str)
                                     and model.NAME.fullmatch(text)):
            reason = ('its %s has control characters or more than 512 '
                      'characters' % what)
    if mac is not None:
        mac = mac.lower()
        if not model.MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
            reason = '%r is not a unicast MAC address' % mac[:64]
    if len(addresses) > MAX_ADDRESSES:
        reason = 'it has %d addresses, and %d are allowed' % (
            len(addresses), MAX_ADDRESSES)
    scoped = [each for each in addresses if getattr(each, 'scope_id', None)]
    if scoped:
        reason = 'the address %r has a scope' % str(scoped[0])[:64]
    if reason is not None:
        raise exceptions.InputRefused(owner=str(owner)[:160], reason=reason)
    return list(dict.fromkeys(addresses)), mac
