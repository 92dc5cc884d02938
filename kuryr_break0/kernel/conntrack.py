# SPDX-License-Identifier: Apache-2.0

"""Deletes connections that the node tracks."""

from __future__ import annotations

import pyroute2
from pyroute2 import netlink
from pyroute2.netlink.nfnetlink import nfctsocket

from kuryr_break0.kernel.errors import translated
from kuryr_break0.kernel.node import read_sysctl
from kuryr_break0.kernel.wire import family_of
from kuryr_break0.model import IPAddress


def forget_connections(address: IPAddress) -> None:
    """Delete what the node tracks of the connections of an address.

    The kernel looks for them (since linux 6.8), once for each way in which
    an address takes part: it began them, it was spoken to, it answers for
    the address of a Service.

    :raises KernelRefused: if it cannot, as an older one
    """
    if not read_sysctl('netfilter/nf_conntrack_count'):
        return  # nothing is tracked
    with translated('forget the connections of %s' % address), \
            pyroute2.NFCTSocket(nfgen_family=family_of(address)) as tracker:
        for which, end in (('ORIG', 'saddr'), ('ORIG', 'daddr'),
                           ('REPLY', 'saddr')):
            wanted = nfctsocket.NFCTAttrTuple(
                family=family_of(address), **{end: str(address)})
            message = nfctsocket.nfct_msg()
            message['attrs'] = [
                ('CTA_TUPLE_' + which, {'attrs': wanted.attrs()}),
                ('CTA_FILTER', {'attrs': [
                    ('CTA_FILTER_%s_FLAGS' % which, wanted.flags)]})]
            tracker.request(
                message, nfctsocket.IPCTNL_MSG_CT_DELETE,
                msg_flags=netlink.NLM_F_REQUEST | netlink.NLM_F_ACK,
                terminate=nfctsocket.terminate_error_msg)
