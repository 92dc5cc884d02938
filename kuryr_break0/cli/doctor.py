# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 doctor`` and ``check``: print findings, write a bundle."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Callable, Optional

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0.cli import status
from kuryr_break0 import config
from kuryr_break0.doctor import bundle
from kuryr_break0.doctor import examination
from kuryr_break0.doctor import findings
from kuryr_break0.doctor import installation
from kuryr_break0.doctor import report
from kuryr_break0 import exceptions
from kuryr_break0 import option_types
from kuryr_break0.texts import close_to


_CHECK = """\
Check the requirements of break0 before you install it: capabilities, kernel,
macvlan on the interface, free names and numbers, sysctls, namespaces, and
programs that manage interfaces. Print findings as the doctor does, with the
same exit status. Change nothing.
"""
_DESCRIPTION = """\
Examine everything that node and pods need to reach each other. For each
fault, print the actual state, the effect, and the remedy. Change nothing.
Exit status: 0 if there is no fault, 1 if there are errors, 4 if there are
only warnings, 2 for wrong usage or configuration, 3 if the kernel or the
state directory cannot be read.
"""
#: Seconds to wait for an answer of the Kubernetes API.
_TIMEOUT = 5


def add_parsers(subparsers: Any) -> None:
    """Register doctor and check."""
    added = parser.add_verb(subparsers, 'doctor', run, _DESCRIPTION)
    _add_ignore(added)
    added.add_flag(
        '--no-probe', 'send no pings, ARP requests or neighbour solicitations')
    added.add_value(
        '--bundle', 'FILE', 'also write an archive (tar.gz) for a bug report: '
        'versions, options, status, findings, ledger, network, rules, '
        'sysctls, logs; at most 10 MiB before compression, without secrets')
    added.add_flag(
        '--redact', 'replace addresses, ids and names in the archive of '
        '--bundle')
    added.set_defaults(before=False)
    added = parser.add_verb(subparsers, 'check', run, _CHECK)
    added.add_value(
        '--parent', 'NAME', 'future parent of the containers (default: '
        '[break0] parent, then [binding] link_iface)',
        option_types.device_name)
    _add_ignore(added)
    added.set_defaults(before=True, bundle=None, redact=False)


def _add_ignore(added: Any) -> None:
    added.add_value(
        '--ignore', 'ID', 'leave out this finding, for example route-foreign; '
        'may be repeated', _known, action='append', default=[])


def _bundle(conf: cfg.ConfigOpts, result: examination.Examination) -> None:
    options = config.load(conf)
    bundle.Bundle(options, conf.command.redact).write(conf.command.bundle, {
        'status.json': lambda: json.dumps(status.as_json(options),
                                          indent=2),
        'doctor.json': lambda: json.dumps(report.as_json(
            result.findings, result.not_examined, **result.counts),
            indent=2)})


def _known(name: str) -> str:
    if name not in findings.KINDS:
        raise ValueError('%r is not the id of a finding%s' % (
            name, close_to(name, findings.KINDS)))
    return name


def _waiting(conf: cfg.ConfigOpts
             ) -> Optional[Callable[[float], list[str]]]:
    """Return a function that lists the pods that wait for a port.

    :returns: None on a host without Kuryr, or without Kuryr's Kubernetes
        options
    """
    if not (installation.is_for_kuryr() and config.has_api_root(conf)):
        return None

    def waiting(seconds: float) -> list[str]:
        try:
            api = common.kuryr_api(conf)
        except (ImportError, cfg.Error) as err:
            raise exceptions.KubernetesUnavailable(
                url=conf.kubernetes.api_root or 'its service address',
                reason=err)
        pods: list[str] = api.list_waiting_pods(seconds, _TIMEOUT)
        return pods

    return waiting


def run(conf: cfg.ConfigOpts) -> int:
    """Print findings; return the exit code."""
    command = conf.command
    if command.redact and command.bundle is None:
        raise exceptions.WrongUsage(
            '--redact changes only an archive. Give --bundle too.')
    with output.Counter('check' if command.before else 'doctor') as counter:
        result = (
            examination.examine_before(conf, command.parent)
            if command.before else examination.examine(
                conf, not command.no_probe, counter.over, _waiting(conf)))
    result.findings = [dataclasses.replace(
        each, observed=output.speak(each.observed), why=output.speak(each.why),
        remedy=output.speak(each.remedy)) for each in result.findings
        if each.id not in command.ignore]
    result.not_examined = list(map(output.speak, result.not_examined))
    if command.output:
        output.write_document(
            report.as_json(result.findings, result.not_examined,
                           **result.counts), command.output)
    elif result.findings or result.unreadable is None:
        _print(result)
    if command.bundle is not None:
        try:
            _bundle(conf, result)
        except (OSError, exceptions.InvalidOption) as err:
            raise exceptions.CannotWrite(
                path=command.bundle, reason=getattr(err, 'strerror', err))
    if result.unreadable is not None:
        return common.fail(common.UNREADABLE, result.unreadable)
    if result.invalid:
        return common.USAGE
    return (common.DRIFT if result.has(findings.ERROR) else common.WARNINGS
            if result.has(findings.WARNING) else common.IN_SYNC)


def _print(result: examination.Examination) -> None:
    *blocks, summary = report.as_text(
        result.findings, result.not_examined, result.examined, result.pods,
        **result.counts).split('\n\n')
    for line in '\n\n'.join([*blocks, '']).split('\n')[:-1]:
        output.write((output.Wrong if line.startswith((
            findings.ERROR, findings.WARNING)) else str)(line))
    output.say(' '.join(summary.split()))
