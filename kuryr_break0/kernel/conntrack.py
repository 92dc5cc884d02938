# SPDX-License-Identifier: Apache-2.0

"""Deletes connections that the node tracks.

The formats are those of linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from typing import Iterator

from kuryr_break0.kernel.netlink import attribute
from kuryr_break0.kernel.netlink import Message
from kuryr_break0.kernel.netlink import NESTED
from kuryr_break0.kernel.netlink import number
from kuryr_break0.kernel import nft
from kuryr_break0.kernel.node import read_sysctl
from kuryr_break0.kernel import wire
from kuryr_break0.model import IPAddress

_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
_ORIGINAL, _REPLY = 1, 2  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, and their flags
_TUPLE_IP, _FILTER = 1, 25
_SOURCE, _DESTINATION = 1, 2  # CTA_FILTER_F_CTA_IP_SRC, _DST; CTA_IP_V4_*


def forget_connections(address: IPAddress) -> None:
    """Delete what the node tracks of the connections of an address.

    Nobody waits for an answer: an older kernel than linux 6.8 refuses, and
    leaves the connections to time out.

    :raises KernelRefused: if there is no socket for it
    """
    if read_sysctl('netfilter/nf_conntrack_count'):
        nft.post(list(deletions(address)))


def deletions(address: IPAddress) -> Iterator[Message]:
    """Return a request for each way in which an address takes part.

    It began a connection, was spoken to, or answers for the address of a
    Service.
    """
    for which, end in ((_ORIGINAL, _SOURCE), (_ORIGINAL, _DESTINATION),
                       (_REPLY, _SOURCE)):
        # CTA_IP_V6_SRC and CTA_IP_V6_DST are two more.
        kind = end if address.version == 4 else end + 2
        yield Message(_DELETE, 0, b''.join((
            struct.pack('!BBH', wire.family_of(address), 0, 0),
            attribute(which, attribute(
                _TUPLE_IP, attribute(kind, address.packed))),
            attribute(NESTED | _FILTER, number(which, end)))))
