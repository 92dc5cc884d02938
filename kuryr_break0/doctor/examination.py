# SPDX-License-Identifier: Apache-2.0

"""Runs all checks, causes before effects, so that a fault is reported once."""

from __future__ import annotations

import dataclasses
from typing import Callable, Optional

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0.doctor import device
from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import merged
from kuryr_break0.doctor.findings import SEVERITIES
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor import installation
from kuryr_break0.doctor import known
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor.node import Over
from kuryr_break0.doctor.node import sample
from kuryr_break0.doctor import pods
from kuryr_break0.doctor import ports
from kuryr_break0.doctor.preconditions import Preconditions
from kuryr_break0.doctor import reachability
from kuryr_break0.doctor import records
from kuryr_break0.doctor import routes
from kuryr_break0.doctor import services
from kuryr_break0.doctor import unserved
from kuryr_break0.engine import containers
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0 import exceptions
from kuryr_break0 import kernel

#: Seconds to wait for the lock. A bind holds it for milliseconds.
PATIENCE = 2.0
#: Largest number of pods to enter and ping. The kubelet's default limit is
#: 110 pods on a node.
MAX_PINGED = 128


@dataclasses.dataclass
class Examination:
    """Findings, and the extent of the examination.

    :ivar counts: numbers of pods and addresses, in total and examined, by
        their names in the JSON schema; empty before the installation
    :ivar examined: the subjects of the checks before the installation
    :ivar invalid: whether invalid options ended the examination
    :ivar unreadable: the error that ended the examination
    :ivar not_examined: subjects that could not be examined, with the reason
    :ivar pods: owner and pod name, by address
    """

    findings: list[Finding] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examined: str = ''
    invalid: bool = False
    unreadable: Optional[exceptions.Break0Error] = None
    not_examined: list[str] = dataclasses.field(default_factory=list)
    pods: dict[str, str] = dataclasses.field(default_factory=dict)

    def has(self, severity: str) -> bool:
        """Return whether at least one finding has this severity."""
        return any(each.severity == severity for each in self.findings)


def examine(conf: cfg.ConfigOpts, probe: bool = True, over: Over = iter,
            waiting: Optional[Callable[[float], list[str]]] = None
            ) -> Examination:
    """Examine a node, and change nothing.

    :param probe: send pings between node and pods, except for addresses for
        which a finding explains lost pings
    :param over: iterates over pods, and may show the progress
    :param waiting: returns the pods of the node that have waited for a port
        for a given number of seconds; None without a Kubernetes API
    """
    def check(options: config.Options, result: Examination,
              host: Host) -> None:
        result.counts = dict.fromkeys((
            'addresses', 'looked_up', 'pods', 'entered', 'pinged',
            'answered'), 0)
        if not options.enabled:
            result.findings.append(KINDS['disabled'].finding(
                '[break0] enabled is false',
                commands=host.set(enabled='true')))
        if waiting is not None:
            try:
                result.findings += ports.check(waiting)
            except exceptions.KubernetesUnavailable as err:
                result.not_examined.append('pods without a port: %s' % err)
        result.findings += records.check_directory(options, host)
        if any(each.id == 'state-dir-unusable' for each in result.findings):
            return  # all further checks compare with the ledger
        with kernel.Netlink() as netlink:
            node = Node(options, netlink, PATIENCE, over)
            result.pods = {str(address): record.owner_text
                           for address, record in node.live.items()}
            _examine_node(node, netlink, result, host, probe)
            if node.live and probe:
                result.findings[:0] = _ping(node, result)
            elif node.live:
                result.not_examined.append('pings: switched off by --no-probe')

    return _examined(conf, check)


def examine_before(conf: cfg.ConfigOpts,
                   parent: Optional[str] = None) -> Examination:
    """Examine a node before the installation of break0.

    :param parent: the interface for the containers; by default the
        configured parent
    """
    def check(options: config.Options, result: Examination,
              host: Host) -> None:
        preconditions = Preconditions(
            options, parent or options.parent or config.read_link_iface(conf),
            host)
        result.findings += preconditions.check()
        result.not_examined += preconditions.not_examined
        result.examined = preconditions.examined

    return _examined(conf, check)


def _examined(conf: cfg.ConfigOpts, check: Callable[
        [config.Options, Examination, Host], None]) -> Examination:
    result, host = Examination(), Host.of(conf)
    result.findings += installation.check()
    result.findings += installation.check_daemon(host.restart_daemon)
    result.findings += installation.check_plugin()
    unknown = config.list_unknown(conf)
    if unknown:
        result.findings.append(KINDS['option-unknown'].finding(
            unknown[0], unknown[1:]))
    try:
        check(config.load(conf), result, host)
    except exceptions.InvalidOption as err:
        result.findings.append(KINDS['options-invalid'].finding(str(err)))
        result.invalid = True
    except exceptions.Break0Error as err:
        result.unreadable = err
    # Errors come first. Findings of the same severity keep their order: pings,
    # then causes before effects.
    result.findings = sorted(
        map(host.advised, result.findings),
        key=lambda each: SEVERITIES.index(each.severity))
    return result


def _examine_node(node: Node, netlink: kernel.Netlink, result: Examination,
                  host: Host, probe: bool) -> None:
    counts, parents = result.counts, node.snapshot.parents.values()
    counts.update(addresses=len(node.live), pods=len(node.pods()))
    result.findings += records.check_ledger(node, host)
    all_problems = problems.find(node.snapshot)
    node.useless = {each.subject for each in all_problems
                    if each.kind in problems.CAUSES}
    result.findings += known.check(node, all_problems, host)
    result.findings += unserved.check(node, netlink, host)
    result.not_examined += filter(None, [containers.blindness()])
    for parent in parents:
        _examine_parent(node, parent, netlink, result, probe)
    result.findings += services.check(
        [each.present for each in parents if each.present is not None])
    for what, some, whole in (
            ('namespaces of pods', 'entered', 'pods'),
            ('the routing of addresses', 'looked_up', 'addresses')):
        if counts[some] < counts[whole]:
            result.not_examined.append('%s: %d of %d were examined' % (
                what, counts[some], counts[whole]))
    if node.live:
        result.not_examined += firewall.not_examined()


def _examine_parent(node: Node, parent: Parent, netlink: kernel.Netlink,
                    result: Examination, probe: bool) -> None:
    # If break0 is missing, or has a fault that stops all traffic, each further
    # check would report the same fault again.
    if parent.device in node.useless or parent.link is None:
        return
    result.findings += device.check(node, parent, netlink, probe)
    result.findings += merged(routes.check(node, parent))
    result.counts['looked_up'] += len(node.settled(parent.desired))
    result.findings += pods.check_asking(node, parent)
    entered = sample(pods.enterable(node, parent), MAX_PINGED)
    result.counts['entered'] += len(entered)
    result.findings += pods.check_inside(node, parent, entered)


def _ping(node: Node, result: Examination) -> list[Finding]:
    """Ping the addresses for which no finding explains lost pings."""
    errors = [each for each in result.findings if each.severity == ERROR
              or each.id in ('neighbour-missing', 'pod-unreadable')]
    stopped = {subject for each in errors for subject in each.subjects}
    # A fault of a pod's interface concerns all addresses of the interface.
    ill = {subject for each in errors if each.id.startswith('pod-')
           for subject in each.subjects}
    findings: list[Finding] = []
    for parent in node.snapshot.parents.values():
        chosen = [] if parent.device in node.useless else [
            record for each in sample(pods.enterable(node, parent), MAX_PINGED)
            if not ill & {str(each[0].owner), *(str(one.address)
                                                for one in each)}
            for record in each if str(record.address) not in stopped]
        pings = reachability.Pings(node, parent)
        try:
            findings += pings.check(chosen)
        except exceptions.NotPermitted as err:
            result.not_examined.append('pings: %s' % err)
        result.counts['pinged'] += pings.pinged
        result.counts['answered'] += pings.pinged - len(pings.silent)
        if len(chosen) < len(parent.live):
            result.not_examined.append(
                'pings to %d of %d addresses: each has a finding, is in an '
                'unknown namespace, or is beyond the limit of %d pods' % (
                    len(parent.live) - len(chosen), len(parent.live),
                    MAX_PINGED))
    return findings
