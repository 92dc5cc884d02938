# SPDX-License-Identifier: Apache-2.0

"""Runs all checks, in an order in which one fault is reported once."""

from __future__ import annotations

import dataclasses
import time
from typing import Callable, Optional

from oslo_config import cfg

from kuryr_break0 import actual
from kuryr_break0 import config
from kuryr_break0 import containers
from kuryr_break0.doctor import daemon
from kuryr_break0.doctor import device
from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor import firewall
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor import installation
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor.node import ParentView
from kuryr_break0.doctor import pods
from kuryr_break0.doctor.preconditions import Preconditions
from kuryr_break0.doctor import reachability
from kuryr_break0.doctor import records
from kuryr_break0.doctor import routes
from kuryr_break0.doctor import services
from kuryr_break0.doctor import unserved
from kuryr_break0 import exceptions
from kuryr_break0 import kernel

#: Seconds for which the lock is waited for, that is held for milliseconds.
PATIENCE = 2.0
#: Seconds within which a container is bound.
_SETTLED = 1.0


@dataclasses.dataclass
class Examination:
    """What was found, and how much was examined.

    :ivar addresses: those that pods of the node have
    :ivar looked_up: those for which the kernel was asked what it uses
    :ivar pods: their number
    :ivar entered: those whose namespaces were entered
    :ivar pinged: addresses that were pinged, both ways
    :ivar answered: those of which each ping was answered
    :ivar useless: the break0s by which nothing can be reached
    :ivar examined: what was, in words, before the installation
    :ivar invalid: whether it ended early, by the configuration
    :ivar unreadable: what ended it early
    :ivar not_examined: what could not be examined, and why
    """

    findings: list[Finding] = dataclasses.field(default_factory=list)
    addresses: int = 0
    looked_up: int = 0
    pods: int = 0
    entered: int = 0
    pinged: int = 0
    answered: int = 0
    useless: set[str] = dataclasses.field(default_factory=set)
    examined: str = ''
    invalid: bool = False
    unreadable: Optional[exceptions.Break0Error] = None
    not_examined: list[str] = dataclasses.field(default_factory=list)


def examine(conf: cfg.ConfigOpts, probe: bool = True) -> Examination:
    """Examine a node, and change nothing.

    :param probe: ping pods and node, unless what was found stops that
    """
    return _examined(conf, lambda options, done, host: _examine_node(
        options, done, host, probe))


def examine_before(conf: cfg.ConfigOpts,
                   parent: Optional[str] = None) -> Examination:
    """Examine a node on which break0 is not in use yet.

    :param parent: the interface that containers will be on; by default that
        of the options
    """
    def check(options: config.Options, done: Examination,
              host: Host) -> None:
        preconditions = Preconditions(
            options, parent or options.parent or config.link_iface(conf))
        done.findings += preconditions.check()
        done.not_examined += preconditions.not_examined
        done.examined = preconditions.examined

    return _examined(conf, check)


def _examined(conf: cfg.ConfigOpts, check: Callable[
        [config.Options, Examination, Host], None]) -> Examination:
    done, host = Examination(), Host.of(conf)
    done.findings += installation.check()
    done.findings += daemon.check()
    unknown = config.unknown(conf)
    if unknown:
        done.findings.append(findings.OPTION_UNKNOWN.found(
            unknown[0], unknown[1:]))
    try:
        check(config.load(conf), done, host)
    except exceptions.InvalidOption as err:
        done.findings.append(findings.OPTIONS_INVALID.found(str(err)))
        done.invalid = True
    except exceptions.Break0Error as err:
        done.unreadable = err
    done.findings = list(map(host.advised, done.findings))
    # What to do first; within that, pings, then causes before effects.
    done.findings.sort(key=lambda each: findings.SEVERITIES.index(
        each.severity))
    return done


def _unserved(node: Node) -> list[containers.Unserved]:
    """Return what is not bound, and not about to be."""
    found = containers.unserved(node.seen, node.ledger)
    if found:
        time.sleep(_SETTLED)
        node.refresh()
        with kernel.Netlink() as netlink:
            still = set(map(str, containers.unserved(actual.read(
                node.options, node.ledger, netlink), node.ledger)))
        found = [each for each in found if str(each) in still
                 and each.address not in node.changing]
    return found


def _examine_node(options: config.Options, done: Examination,
                  host: Host, probe: bool) -> None:
    if not options.enabled:
        done.findings.append(findings.DISABLED.found(
            '[break0] enabled is false'))
    directory = list(records.check_directory(options))
    done.findings += directory
    if any(each.id == findings.STATE_DIR_UNUSABLE.id for each in directory):
        return  # without it nothing can be compared
    with kernel.Netlink() as netlink:
        node = Node(options, netlink, PATIENCE)
        done.addresses, done.pods = len(node.live), len(node.pods())
        done.findings += records.check_ledger(node, host)
        done.findings += routes.check_addresses(node)
        done.findings += unserved.check(_unserved(node), options, host)
        for view in node.views:
            _examine_parent(view, netlink, done)
        done.findings += services.check(
            [view.link for view in node.views if view.link is not None])
        for what, looked, of in (
                ('pods from inside', done.entered, done.pods),
                ('the routing of addresses', done.looked_up, done.addresses)):
            if looked < of:
                done.not_examined.append('%s: %d of %d were examined' % (
                    what, looked, of))
        if not node.live:
            return
        done.not_examined += firewall.not_examined()
        if probe:
            done.findings = [*_ping(node, done), *done.findings]
        else:
            done.not_examined.append('whether pings are answered: it was not '
                                     'asked for')


def _ping(node: Node, done: Examination) -> list[Finding]:
    """Ping, but where what was found stops these very pings."""
    stopped = {subject for each in done.findings
               if each.severity == findings.ERROR
               or each.id == findings.NEIGHBOUR_MISSING.id
               for subject in each.subjects}
    # What is wrong with an interface concerns all of its addresses.
    ill = {subject for each in done.findings if each.id.startswith('pod-')
           and each.severity == findings.ERROR or each.id == 'pod-unreadable'
           for subject in each.subjects}
    found: list[Finding] = []
    for view in node.views:
        records = [record for each in routes.sample(
            pods.enterable(view), pods.ENTERED)
            if view.name not in done.useless and not ill & {
                str(each[0].owner), *(str(one.address) for one in each)}
            for record in each if str(record.address) not in stopped]
        pings = reachability.Pings(view)
        try:
            found += pings.check(records)
        except exceptions.NotPermitted as err:
            done.not_examined.append('whether pings are answered: %s' % err)
        done.pinged += pings.pinged
        done.answered += pings.pinged - len(pings.silent)
        if len(records) < len(view.live):
            done.not_examined.append(
                'whether pings are answered: %d of %d addresses were left '
                'out, because of what was found, or since their namespaces '
                'are not known' % (len(view.live) - len(records),
                                   len(view.live)))
    return found


def _examine_parent(view: ParentView, netlink: kernel.Netlink,
                    done: Examination) -> None:
    useless = [*device.check_parent(view)] or [*device.check_existence(view)]
    done.findings += useless
    if useless:
        done.useless.add(view.name)
    # What is on an interface that is not there, or not ours, says nothing
    # more.
    if useless or view.seen.link is None:
        return
    done.findings += device.check_owner(view)
    done.findings += device.check_properties(view)
    done.findings += device.check_others(
        view, netlink, {each.name for each in view.node.views})
    done.findings += routes.check_sources(view)
    done.findings += routes.check_routes(view)
    done.findings += routes.check_neighbours(view)
    looked_up = routes.sample(routes.usable(view), routes.LOOKED_UP)
    done.looked_up += len(looked_up)
    done.findings += routes.check_use(view, netlink, looked_up)
    done.findings += pods.check_configured(view)
    entered = routes.sample(pods.enterable(view), pods.ENTERED)
    done.entered += len(entered)
    done.findings += pods.check_inside(view, entered)
