# SPDX-License-Identifier: Apache-2.0

"""Deletes entries of the node's connection tracking table.

The message formats are defined in linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from typing import Iterator

from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import nft
from kuryr_break0.kernel import node
from kuryr_break0.kernel import wire
from kuryr_break0 import model

_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
_ORIGINAL, _REPLY = 1, 2  # CTA_TUPLE_ORIG, _REPLY; CTA_FILTER_*_FLAGS
_TUPLE_IP, _FILTER = 1, 25
_SOURCE, _DESTINATION = 1, 2  # CTA_FILTER_F_CTA_IP_SRC, _DST; CTA_IP_V4_*


def delete_connections(address: model.IPAddress) -> None:
    """Delete the tracked connections of an address.

    The function does not wait for the kernel's answer. Before Linux 6.8, the
    kernel refuses the request, and the entries remain until they time out.

    :raises KernelRefused: if no netlink socket can be opened
    """
    if node.read_sysctl('netfilter/nf_conntrack_count'):
        nft.post(list(deletions(address)))


def deletions(address: model.IPAddress) -> Iterator[netlink.Message]:
    """Return one request for each role of an address in a connection.

    An address can be the source of a connection, its destination, or the
    endpoint of a Service. In the third case, the destination is the address of
    the Service, and the endpoint is the source of the replies.
    """
    for which, end in ((_ORIGINAL, _SOURCE), (_ORIGINAL, _DESTINATION),
                       (_REPLY, _SOURCE)):
        # CTA_IP_V6_SRC and CTA_IP_V6_DST are the IPv4 numbers plus 2.
        kind = end if address.version == 4 else end + 2
        yield netlink.Message(_DELETE, 0, b''.join((
            struct.pack('!BBH', wire.family_of(address), 0, 0),
            netlink.attribute(which, netlink.attribute(
                _TUPLE_IP, netlink.attribute(kind, address.packed))),
            netlink.nested(_FILTER, netlink.number(which, end)))))
