# SPDX-License-Identifier: Apache-2.0

"""The exceptions that this package catches, or raises in several modules.

Each text names the object, the problem and the remedy, so a log line needs no
other text.
"""

from __future__ import annotations

import errno as errnos
import shlex
from typing import Any


#: Error numbers for a lack of descriptors or memory. Such an error does not
#: show whether the requested object exists.
RESOURCE_ERRNOS = frozenset((errnos.EMFILE, errnos.ENFILE, errnos.ENOMEM,
                             errnos.ENOBUFS))
#: Remedies for errors of the kernel, by error number
_ADVICE = {
    errnos.EPERM: 'Run it as root, in a container with CAP_NET_ADMIN.',
    errnos.EADDRINUSE: 'Another interface on the same parent has its MAC '
                       'address. If it belongs to a pod that is being '
                       'deleted, try again later.'}


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
               'Correct its name, which is set by --parent, [break0] parent, '
               'or [binding] link_iface of Kuryr.')


class ParentUnfit(Break0Error):
    msg_fmt = 'Pods cannot be on %(parent)s: %(reason)s.'


class ParentMismatch(Break0Error):
    msg_fmt = ('[break0] parent is %(configured)s, but the pods of this node '
               'are on %(actual)s, and a macvlan reaches only macvlans on the '
               'same parent. Set the option to %(actual)s, or remove it.')


class DeviceConflict(Break0Error):
    msg_fmt = ('The interface %(device)s exists and is %(found)s, but '
               '%(expected)s is needed. It was not changed. Rename or delete '
               'it, or choose another name with [break0] device.')


class CannotCreate(Break0Error):
    msg_fmt = ('The interface %(device)s cannot be created, because pyroute2 '
               'cannot be imported: %(reason)s. To see the required version, '
               'run: kuryr-break0 doctor')


class AddressRefused(Break0Error):
    msg_fmt = ('The address %(address)s gets no route through %(device)s: '
               '%(reason)s.')


class InputRefused(Break0Error):
    msg_fmt = ('Refused to bind %(owner)r: %(reason)s.')


class GuardUnavailable(Break0Error):
    msg_fmt = ('The guard of %(device)s cannot be loaded: %(reason)s. Pods '
               'can reach the node with forged addresses. Install nftables, '
               'or set [break0] guard = off if all pods are trusted.')


class AddressTaken(Break0Error):
    msg_fmt = ('The address %(address)s belongs to %(owner)s, and was not '
               'bound. If the owner is wrong, unbind it first: kuryr-break0 '
               'unbind %(address)s --owner %(container_id)s --ifname '
               '%(ifname)s')

    def __init__(self, container_id: str, ifname: str, **kwargs: Any) -> None:
        # A container can name an interface with characters of the shell, and
        # the user may copy the command in the text.
        super().__init__(container_id=shlex.quote(container_id),
                         ifname=shlex.quote(ifname), **kwargs)


class ForeignRoute(Break0Error):
    msg_fmt = ('The address %(address)s has a foreign route on %(on)s with '
               'protocol %(protocol)s, which stays. To see the route, run: ip '
               'route show table all %(address)s')


class LockTimeout(Break0Error):
    msg_fmt = ('The lock %(path)s was not free within %(timeout)d seconds. '
               'To find the process that holds it, run: fuser -v %(path)s')


class LedgerUnavailable(Break0Error):
    msg_fmt = ('The state directory %(path)s cannot be used: %(reason)s. '
               'Correct this, or set [break0] state_dir to a directory that '
               'only root can write.')


class RecordNewer(LedgerUnavailable):
    msg_fmt = ('The record of %(address)s in %(path)s was written by a later '
               'version of kuryr-break0: %(reason)s. Its route is neither '
               'set nor deleted. Install that version, or bind the address '
               'again.')


class KernelRefused(Break0Error):
    """The kernel answered a netlink request with an error.

    :ivar errno: the error number in the answer
    """

    msg_fmt = 'The kernel refused to %(action)s: %(reason)s. %(advice)s'

    def __init__(self, action: str, reason: str, errno: int,
                 advice: str = '') -> None:
        super().__init__(
            action=action, reason=reason, advice=advice or _ADVICE.get(
                errno, 'To see the kernel log, run: dmesg'))
        self.errno = errno

    @property
    def is_device_lost(self) -> bool:
        """Return whether the interface in the request is down or gone."""
        return self.errno in (errnos.ENETDOWN, errnos.ENODEV)

    @property
    def is_exhausted(self) -> bool:
        """Return whether this process lacked a descriptor or memory."""
        return self.errno in RESOURCE_ERRNOS

    @property
    def is_absent(self) -> bool:
        """Return whether the object to delete does not exist."""
        return self.errno in (errnos.ESRCH, errnos.ENOENT, errnos.ENODEV)


class SystemRefused(Break0Error):
    """A system call failed, for example with EMFILE or ENOMEM."""

    msg_fmt = ('A system call failed: %(reason)s. Compare the open files of '
               'this process with its limits: /proc/PID/fd, '
               '/proc/PID/limits.')


class OtherLedger(Break0Error):
    msg_fmt = ('%(device)s belongs to the ledger %(ledger)s in '
               '%(directory)s, not to the one in %(own)s. It was not '
               'changed. Set [break0] state_dir of agent and kuryr-daemon to '
               'the same directory. If the other ledger is lost, take over '
               '%(device)s: kuryr-break0 sync --claim')


class CannotWrite(WrongUsage):
    msg_fmt = ('Cannot write %(path)s: %(reason)s. Give a path in an existing '
               'directory that you may write.')


class NetnsUnusable(Break0Error):
    msg_fmt = 'The network namespace %(netns)r %(reason)s.'


class InterfaceGone(NetnsUnusable):
    msg_fmt = ('The network namespace %(netns)r has no interface %(ifname)s. '
               'If it was deleted with its parent, restart the container.')


class NotTheNode(Break0Error):
    msg_fmt = ('This is the network namespace of %(owner)s, not of the node. '
               'Run the command on the node.')


class NotAMacvlan(Break0Error):
    msg_fmt = ('The interface %(ifname)s in the network namespace %(netns)s '
               'is not a macvlan in bridge mode on %(parent)s: %(found)s. '
               'This node cannot reach other interfaces.')


class NotItsAddress(Break0Error):
    msg_fmt = ('The interface %(ifname)s in the network namespace %(netns)s '
               'does not have the address %(address)s, but %(found)s. Bind '
               'one of its addresses, or give none to bind all.')


class NoAddress(WrongUsage):
    msg_fmt = ('There is no address to bind for %(owner)s. Give ADDRESS or '
               '--netns to bind, or set ipam of the CNI plugin macvlan.')


class NameOfBreak0(Break0Error):
    msg_fmt = ('The VIF of the pod is named %(name)r, which is reserved for '
               'break0 on this node. Correct vif_name in the KuryrPort.')


class NotALeftover(Break0Error):
    msg_fmt = ('The VIF of the pod is named %(name)r. On this node that is '
               '%(found)s, not a leftover of an earlier ADD, so it was not '
               'deleted. Correct vif_name in the KuryrPort. If nothing uses '
               'the interface, delete it: ip link delete %(name)s')


class CannotTrace(Break0Error):
    msg_fmt = 'Packets cannot be traced: %(reason)s.'


class NotRoot(WrongUsage):
    msg_fmt = 'Run the command as root: sudo kuryr-break0 %(command)s'


class NotPermitted(Break0Error):
    msg_fmt = ('This process may not %(action)s: it needs %(capability)s. '
               'Run it as root, in a container with that capability.')


class KubernetesUnavailable(Break0Error):
    msg_fmt = ('The Kubernetes API at %(url)s cannot be used: %(reason)s. '
               'Check [kubernetes] api_root and the options for its '
               'certificates and token.')
