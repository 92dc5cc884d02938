# SPDX-License-Identifier: Apache-2.0

"""The errors of this package that are caught, or raised in several modules.

Each text names the object, the problem and the remedy, so the log line that
contains it needs nothing else.
"""

from __future__ import annotations

import errno as errnos
import shlex
from typing import Any


#: Errors of this process, not of the requested object: it has no more
#: descriptors or memory.
EXHAUSTED = frozenset((errnos.EMFILE, errnos.ENFILE, errnos.ENOMEM,
                       errnos.ENOBUFS))
#: The remedy for an error of the kernel
_ADVICE = {
    errnos.EPERM: 'Run it as root, in a container with CAP_NET_ADMIN.',
    errnos.EADDRINUSE: 'Another interface on the same parent has its MAC '
                       'address, perhaps of a pod that is just being deleted'}


class Break0Error(Exception):
    """Base of all errors of this package.

    :param text: the text, instead of ``msg_fmt``
    :param kwargs: the values of the fields named in ``msg_fmt``
    """

    msg_fmt = 'An unknown error occurred.'

    def __init__(self, text: str = '', **kwargs: Any) -> None:
        super().__init__(text or self.msg_fmt % kwargs)


class WrongUsage(Break0Error):
    """The user's command or configuration is invalid."""


class InvalidOption(WrongUsage):
    msg_fmt = 'Invalid configuration: [break0] %(option)s: %(reason)s'


class ParentNotFound(Break0Error):
    msg_fmt = ('The parent interface %(parent)s does not exist on this node. '
               'Correct it where it is named: --parent, [break0] parent, or '
               '[binding] link_iface of Kuryr.')


class ParentUnfit(Break0Error):
    msg_fmt = 'Pods cannot be on %(parent)s: %(reason)s.'


class ParentMismatch(Break0Error):
    msg_fmt = ('[break0] parent is %(configured)s, but the pods of this node '
               'are on %(actual)s: a macvlan reaches only its siblings. Set '
               'it to %(actual)s, or remove it.')


class DeviceConflict(Break0Error):
    msg_fmt = ('The interface %(device)s exists and is %(found)s, but '
               '%(expected)s is needed. It is left as it is: rename or '
               'delete it, or choose another name by [break0] device.')


class CannotCreate(Break0Error):
    msg_fmt = ('The interface %(device)s cannot be created, since pyroute2 '
               'cannot be imported: %(reason)s. See which version is needed: '
               'kuryr-break0 doctor')


class AddressRefused(Break0Error):
    msg_fmt = ('The address %(address)s gets no route through %(device)s: '
               '%(reason)s.')


class InputRefused(Break0Error):
    msg_fmt = ('Refused to bind %(owner)r: %(reason)s.')


class GuardUnavailable(Break0Error):
    msg_fmt = ('The guard of %(device)s cannot be loaded: %(reason)s. Pods '
               'can reach the node with forged addresses. Install nftables, '
               'or set [break0] guard = off if that is wanted.')


class AddressTaken(Break0Error):
    msg_fmt = ('The address %(address)s belongs to %(owner)s, and stays so. '
               'If that is wrong, take it away first: kuryr-break0 unbind '
               '%(address)s --owner %(container_id)s --ifname %(ifname)s')

    def __init__(self, container_id: str, ifname: str, **kwargs: Any) -> None:
        # A container chooses the names of its interfaces.
        super().__init__(container_id=shlex.quote(container_id),
                         ifname=shlex.quote(ifname), **kwargs)


class ForeignRoute(Break0Error):
    msg_fmt = ('The address %(address)s has a route that is not ours, on '
               '%(on)s with protocol %(protocol)s: %(reason)s. '
               'See it: ip route show table all %(address)s')


class LockTimeout(Break0Error):
    msg_fmt = ('The lock %(path)s was not free within %(timeout)d seconds. '
               'See what holds it: fuser -v %(path)s')


class LedgerUnavailable(Break0Error):
    msg_fmt = ('The state directory %(path)s cannot be used: %(reason)s. '
               'Correct it, or set [break0] state_dir to a directory that '
               'only root can write.')


class RecordNewer(LedgerUnavailable):
    msg_fmt = ('The record of %(address)s in %(path)s was written by a later '
               'version of this program: %(reason)s. Nothing is set or '
               'deleted for it. Install that version, or bind the address '
               'again.')


class KernelRefused(Break0Error):
    """The kernel answered a netlink request with an error.

    :ivar errno: its error number
    """

    msg_fmt = 'The kernel refused to %(action)s: %(reason)s. %(advice)s'

    def __init__(self, action: str, reason: str, errno: int,
                 advice: str = '') -> None:
        super().__init__(
            action=action, reason=reason, advice=advice or _ADVICE.get(
                errno, 'See the kernel log: dmesg'))
        self.errno = errno

    @property
    def device_lost(self) -> bool:
        """Return whether the interface in the request is down or gone."""
        return self.errno in (errnos.ENETDOWN, errnos.ENODEV)

    @property
    def exhausted(self) -> bool:
        """Return whether this process lacked a descriptor or memory."""
        return self.errno in EXHAUSTED

    @property
    def absent(self) -> bool:
        """Return whether the object to delete does not exist."""
        return self.errno in (errnos.ESRCH, errnos.ENOENT, errnos.ENODEV)


class SystemRefused(Break0Error):
    """A system call failed, for example with EMFILE or ENOMEM."""

    msg_fmt = ('Cannot go on: %(reason)s. See what this process has open, '
               'and its limits: /proc/PID/fd, /proc/PID/limits.')


class OtherLedger(Break0Error):
    msg_fmt = ('%(device)s belongs to the ledger %(ledger)s in '
               '%(directory)s, not to that in %(own)s. It is left as it is. '
               'Set [break0] state_dir of agent and kuryr-daemon to the same '
               'directory; if the other ledger is lost, take %(device)s over '
               'by: kuryr-break0 sync --claim')


class CannotWrite(WrongUsage):
    msg_fmt = ('Cannot write %(path)s: %(reason)s. Name another place, in a '
               'directory that exists and that you may write.')


class NetnsUnusable(Break0Error):
    msg_fmt = 'The network namespace %(netns)r %(reason)s.'


class InterfaceGone(NetnsUnusable):
    msg_fmt = ('The network namespace %(netns)r has no interface %(ifname)s. '
               'If it went with its parent, restart the container.')


class NotTheNode(Break0Error):
    msg_fmt = ('This is the network namespace of %(owner)s, and not that of '
               'the node: run it there.')


class NotAMacvlan(Break0Error):
    msg_fmt = ('The interface %(ifname)s in the network namespace %(netns)s '
               'is not a macvlan in bridge mode on %(parent)s: %(found)s. '
               'Only such can be reached from this node.')


class NotItsAddress(Break0Error):
    msg_fmt = ('The interface %(ifname)s in the network namespace %(netns)s '
               'does not have the address %(address)s, but %(found)s. Bind '
               'an address that it has, or give none to bind all.')


class NoAddress(WrongUsage):
    msg_fmt = ('There is no address to bind for %(owner)s. Give ADDRESS or '
               '--netns to bind, or ipam to the CNI plugin macvlan.')


class NameOfBreak0(Break0Error):
    msg_fmt = ('The VIF of the pod is named %(name)r, which is kept for '
               'break0 on this node: correct vif_name in the KuryrPort.')


class NotALeftover(Break0Error):
    msg_fmt = ('The VIF of the pod is named %(name)r, which is %(found)s of '
               'this node, and not what an earlier ADD has left. It is not '
               'deleted: correct vif_name in the KuryrPort. If nothing uses '
               'the interface, delete it: ip link delete %(name)s')


class CannotTrace(Break0Error):
    msg_fmt = 'Packets cannot be traced: %(reason)s.'


class NotRoot(WrongUsage):
    msg_fmt = 'Run it as root: sudo kuryr-break0 %(command)s'


class NotPermitted(Break0Error):
    msg_fmt = ('This process may not %(action)s: it needs %(capability)s. '
               'Run it as root, in a container with that capability.')


class KubernetesUnavailable(Break0Error):
    msg_fmt = ('The Kubernetes API at %(url)s cannot be used: %(reason)s. '
               'It is what [kubernetes] api_root and the options beside it '
               'say.')
