# SPDX-License-Identifier: Apache-2.0

"""Formats findings as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Iterable, Mapping, Sequence

from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import WARNING

_WIDTH = 79
#: Largest number of subjects, and of commands, of one finding in a text.
_SHOWN = 8


def as_json(findings: Iterable[Finding],
            not_examined: Sequence[str] = (), **counts: Any) -> str:
    """Return a JSON document."""
    return json.dumps({
        'findings': [{
            'id': each.id, 'severity': each.severity, 'seen': each.seen,
            'subjects': list(each.subjects), 'why': each.why,
            'remedy': each.remedy, 'commands': list(each.commands)}
            for each in findings],
        'not_examined': list(not_examined), 'looked_at': counts}, indent=2)


def as_text(findings: list[Finding], not_examined: Sequence[str] = (),
            examined: str = '', pod_names: Mapping[str, str] = {},
            **counts: int) -> str:
    """Return a paragraph for each finding, and a summary.

    :param pod_names: owners and names of pods, by address
    """
    blocks = [_block(each, pod_names) for each in findings]
    if counts.get('pinged'):
        blocks.insert(0, 'Pings, both ways: %(answered)d of %(pinged)d '
                      'addresses answered.' % counts)
    errors, warnings = (sum(each.severity == severity for each in findings)
                        for severity in (ERROR, WARNING))
    if errors or warnings:
        summary = 'Errors: %d, warnings: %d.' % (errors, warnings)
    else:
        summary = ('Nothing wrong was found.' if not_examined or findings
                   else 'Nothing is wrong.')
    if examined:
        summary += ' Examined: %s.' % examined
    if counts:
        summary += (
            ' Examined: the namespaces of %(entered)d of %(pods)d pods, and '
            'the routing of %(looked_up)d of %(addresses)d addresses.'
            % counts)
    if not_examined:
        blocks.append('\n'.join(_wrapped(each, 'Not examined: ')
                                for each in not_examined))
    return '\n\n'.join([*blocks, _wrapped(summary)])


def _block(finding: Finding, pods: Mapping[str, str]) -> str:
    seen = finding.seen
    if not all(subject in seen for subject in finding.subjects):
        more = len(finding.subjects) - _SHOWN
        seen += ': ' + ', '.join(
            '%s of %s' % (each, pods[each]) if each in pods else each
            for each in finding.subjects[:_SHOWN]) + (
            ' and %d more' % more if more > 0 else '')
    # Commands are not wrapped, so that users can paste them.
    lines = ['%s: %s' % (finding.severity, finding.id),
             _wrapped(seen + '.', '  seen  '),
             _wrapped(finding.why, '  why   '),
             _wrapped(finding.remedy, '  do    '),
             *('          ' + each for each in finding.commands[:_SHOWN])]
    if len(finding.commands) > _SHOWN:
        lines.append('          # and %d more, see --json' %
                     (len(finding.commands) - _SHOWN))
    return '\n'.join(lines)


def _wrapped(text: str, label: str = '') -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=label,
                         subsequent_indent=' ' * len(label),
                         break_long_words=False, break_on_hyphens=False)
