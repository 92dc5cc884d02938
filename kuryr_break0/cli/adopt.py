# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 adopt``: binds pods that started before the installation."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Optional, TYPE_CHECKING

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import model

if TYPE_CHECKING:
    from kuryr_break0.kuryr.api import Port

_DESCRIPTION = """\
Bind the pods that Kuryr started before break0 was installed. The pods are not
restarted. Kuryr's API client lists the pods of this node, with the
[kubernetes] options and KUBERNETES_NODE_NAME, as in kuryr-daemon. The command
finds each pod by the MAC address of its macvlan, in /run/netns and in the
namespaces of all processes. The later DEL of a pod unbinds it.

First restart kuryr-daemon with break0. Then run the command on each node, in
the environment of kuryr-daemon. You can repeat it: bound pods do not change.
Pods that are not found, or are being deleted, are skipped.

Exit status: 0 if all pods that were found are bound, 1 if one could not be
bound (with --dry-run: if there is one to adopt), 2 for wrong usage or
configuration, 3 if API, kernel or state directory cannot be read, or if the
API has no pod for the name of this node, which is printed.
"""
_EPILOG = """\
example:
  kuryr-break0 --config-file /etc/kuryr/kuryr.conf adopt --dry-run
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(subparsers, 'adopt', _run, _DESCRIPTION, _EPILOG)
    added.add_flag('--dry-run', 'print the changes, but make none')
    added.add_flag('--wide', 'do not fold long lines')


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome for an interface of a pod.

    :ivar pod: namespace and name of the pod in Kubernetes
    :ivar ifname: empty if the outcome is for the whole pod
    :ivar outcome: ``adopted``; ``bound`` if the interface was bound before;
        ``skipped`` if it needs no bind; ``not found``; ``failed``
    :ivar reason: the reason for the outcome; None for ``adopted`` and
        ``bound``
    :ivar netns: path of the network namespace, if found
    """

    pod: str
    ifname: str
    addresses: tuple[model.IPAddress, ...]
    outcome: str
    reason: Optional[str] = None
    netns: Optional[str] = None


def _run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    try:
        api = common.kuryr_api(conf)
    except ImportError as err:
        return common.fail(common.USAGE, (
            'Cannot list the pods of Kuryr: %s. Run the command in the '
            'environment of kuryr-daemon. For containers that Kuryr has not '
            'started, set [break0] discover or run kuryr-break0 bind.' % err))
    except cfg.Error as err:
        return common.fail(common.USAGE, err)
    ports = api.list_ports()
    if not ports:
        raise exceptions.Break0Error(
            'The API has no KuryrPort for the node %r. If that is not the '
            'name of this node in Kubernetes, set KUBERNETES_NODE_NAME to it. '
            'Nodes with KuryrPorts: %s.' % (
                api.node_name(), ', '.join(api.list_nodes()[:20]) or 'none'))
    adopter = Adopter(
        options, options.parent or api.link_iface(),
        kernel.list_macvlans([api.find_proc(), *options.proc_dirs]),
        conf.command.dry_run)
    with output.Counter('adopt') as counter:
        findings = [adopter.adopt(port) for port in counter.over(ports)]
    if conf.command.output:
        output.write_document([{**vars(each), 'addresses': list(
            map(str, each.addresses))} for each in findings],
            conf.command.output)
    else:
        output.table(
            ['Pod', 'Interface', 'Addresses', 'Outcome', 'Namespace',
             'Reason'],
            [[each.pod, each.ifname or '-',
              ' '.join(map(str, each.addresses)) or '-',
              output.Wrong(each.outcome) if each.outcome == 'failed'
              else each.outcome, each.netns or '-', each.reason or '-']
             for each in findings], conf.command.wide)
    outcomes = {each.outcome for each in findings}
    if 'failed' in outcomes or (conf.command.dry_run
                                and 'adopted' in outcomes):
        return common.DRIFT
    return common.IN_SYNC


class Adopter:
    """Binds pods that are not bound yet.

    :param parent: the parent of the pods' macvlans; None for any
    :param macvlans: all macvlans in the namespaces of the node
    :param dry_run: change nothing
    """

    def __init__(self, options: config.Options, parent: Optional[str],
                 macvlans: Iterable[kernel.Macvlan],
                 dry_run: bool) -> None:
        self._parent = parent
        # On one parent, only one of several macvlans with the same MAC
        # address can be up (macvlan_open). The sort puts that macvlan last, so
        # that it replaces the other ones.
        self._macvlans = {
            macvlan.link.mac: macvlan
            for macvlan in sorted(macvlans, key=lambda each: each.link.up)
            if macvlan.link.mode == 'bridge'
            and parent in (None, macvlan.parent)}
        self._dry_run = dry_run
        self._ledger = Ledger(options.state_dir)
        self._manager = Break0Manager(options)

    def adopt(self, port: Port) -> Finding:
        """Bind the interface of a port, unless it is bound already.

        :raises LedgerUnavailable: if the ledger cannot be read
        """
        macvlan = self._macvlans.get(port.mac)
        outcome, reason, netns = 'bound', None, None
        if port.refusal is not None:
            outcome, reason = 'skipped', port.refusal
        elif port.damaged is not None:
            outcome, reason = 'failed', port.damaged
        elif macvlan is None:
            outcome, reason = 'not found', (
                'no namespace has a macvlan in bridge mode with its MAC '
                'address %s%s' % (port.mac, ' on ' + self._parent
                                  if self._parent else ''))
        else:
            netns = macvlan.netns
            try:
                if self._bind(port, macvlan):
                    outcome = 'adopted'
            except exceptions.LedgerUnavailable:
                raise
            except exceptions.Break0Error as err:
                outcome, reason = 'failed', str(err)
        return Finding(port.pod, port.ifname, port.addresses, outcome, reason,
                       netns)

    def _bind(self, port: Port, macvlan: kernel.Macvlan) -> bool:
        """Bind a port's unbound addresses; return whether there were any.

        :raises Break0Error: if an address cannot be bound
        """
        # The runtime chooses the name of the first interface (CNI_IFNAME), so
        # the KuryrPort does not contain that name.
        ifname = macvlan.link.name
        owner = model.Owner.adopted(macvlan.namespace, ifname)
        unbound = []
        for address in port.addresses:
            record = self._ledger.records.get(address)
            if (record is not None and record.namespace is not None
                    and record.namespace.is_same(macvlan.namespace)):
                continue
            if self._dry_run:
                self._manager.check(model.Record(
                    address, owner, macvlan.parent, port.mac,
                    namespace=macvlan.namespace, origin=model.Origin.KURYR))
            unbound.append(address)
        if unbound and not self._dry_run:
            self._manager.bind(
                owner, unbound, parent=macvlan.parent, mac=port.mac,
                subnets=port.subnets, netns=macvlan.netns, pod=port.pod,
                yielding=True, origin=model.Origin.KURYR)
        return bool(unbound)
