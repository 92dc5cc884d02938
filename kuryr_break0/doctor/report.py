# SPDX-License-Identifier: Apache-2.0

"""Formats findings as text and as a document for programs."""

from __future__ import annotations

import textwrap
from typing import Any, Iterable, Mapping, Sequence

from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import WARNING

_WIDTH = 79
#: Largest number of subjects, and of commands, of one finding in a text.
_SHOWN = 8


def as_json(findings: Iterable[Finding],
            not_examined: Sequence[str] = (), **counts: Any
            ) -> dict[str, Any]:
    """Return the document of ``doctor --json``."""
    return {
        'findings': [{
            'id': each.id, 'severity': each.severity, 'seen': each.observed,
            'subjects': list(each.subjects), 'why': each.why,
            'remedy': each.remedy, 'commands': list(each.commands)}
            for each in findings],
        'not_examined': list(not_examined), 'looked_at': counts}


def as_text(findings: list[Finding], not_examined: Sequence[str] = (),
            examined: str = '', owners: Mapping[str, str] = {},
            **counts: int) -> str:
    """Return a paragraph for each finding, and a summary.

    :param owners: owner and pod name, by address
    """
    blocks = [_block(each, owners) for each in findings]
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


def _block(finding: Finding, owners: Mapping[str, str]) -> str:
    observed = finding.observed
    more = [each for each in finding.subjects if each not in observed]
    if more:
        # If the text names a subject or has a colon, "Also" starts the list.
        is_first = len(more) == len(finding.subjects) and ': ' not in observed
        observed += (': ' if is_first else ' Also: ' if observed.endswith('?')
                     else '. Also: ') + ', '.join(
            '%s of %s' % (each, owners[each]) if each in owners else each
            for each in more[:_SHOWN]) + (
            ' and %d more' % (len(more) - _SHOWN)
            if len(more) > _SHOWN else '')
    # Commands are not wrapped, so that users can paste them.
    lines = ['%s: %s' % (finding.severity, finding.id),
             _wrapped(observed if observed.endswith('?') else observed + '.',
                      '  seen  '),
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
