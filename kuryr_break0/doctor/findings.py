# SPDX-License-Identifier: Apache-2.0

"""The findings of the doctor; findings.txt has their texts.

The id of a finding never changes, for alerts, runbooks and searches. The
documentation prints the texts of findings.txt unchanged.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from typing import Any, Collection, Iterable, Iterator, Optional

#: Node and pods cannot reach each other, or soon will not.
ERROR = 'error'
#: Node and pods reach each other, but may not after the next change of the
#: node; or the fault harms other hosts.
WARNING = 'warning'
#: A setting that may be intended. It does not change the exit status.
NOTE = 'note'
#: The severities, worst first.
SEVERITIES = (ERROR, WARNING, NOTE)

PATH = os.path.join(os.path.dirname(__file__), 'findings.txt')
#: One finding in findings.txt, after its continuation lines, which begin with
#: six blanks, were joined.
_TEXT = re.compile(r'(?P<id>\S+): (?P<severity>\w+)\n'
                   r'when  (?P<when>.*)\nwhy   (?P<why>.*)\n'
                   r'do    (?P<remedy>.*)(?P<commands>(?:\n    \$ .*)*)')


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault of the node, or the template for it.

    :ivar when: the condition for the report, for the documentation
    :ivar why: the effect of the fault
    :ivar remedy: the action against the fault
    :ivar commands: shell commands for the action; commands of a template
        have fields of the form ``%(name)s``
    :ivar observed: the actual state
    :ivar subjects: the addresses, sandboxes or files with the fault
    """

    id: str
    severity: str
    when: str
    why: str
    remedy: str
    commands: tuple[str, ...]
    observed: str = ''
    subjects: tuple[str, ...] = ()

    def finding(self, observed: str, subjects: Collection[Any] = (),
                commands: Collection[str] = (), severity: Optional[str] = None,
                **fields: Any) -> Finding:
        """Return the finding of this template for an actual state.

        :param commands: replace the commands of the template
        :param severity: replaces the severity of the template
        :param fields: values for the fields of the commands
        """
        return dataclasses.replace(
            self, severity=severity or self.severity, observed=observed,
            commands=tuple(commands) or tuple(command % fields
                                              for command in self.commands),
            subjects=tuple(map(str, subjects)))


def inside(netns: object, command: str, *names: object) -> str:
    """Return a shell command that runs a command in a namespace.

    :param names: values for the fields of the command. They are quoted,
        since a container can choose the names of its interfaces.
    """
    return 'nsenter --net=%s %s' % (shlex.quote(str(netns)), command % tuple(
        shlex.quote(str(name)) for name in names))


def merged(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Merge findings of one kind into the finding with the worst severity.

    A command of several findings is kept once, at its last place: a sync, for
    example, follows the other commands.
    """
    kinds: dict[str, list[Finding]] = {}
    for each in findings:
        kinds.setdefault(each.id, []).append(each)
    for cases in kinds.values():
        worst = min(cases, key=lambda each: SEVERITIES.index(each.severity))
        commands = [command for each in cases for command in each.commands]
        yield dataclasses.replace(
            worst, commands=tuple(dict.fromkeys(commands[::-1]))[::-1],
            subjects=tuple(dict.fromkeys(
                subject for each in cases for subject in each.subjects)))


def _read() -> Iterator[Finding]:
    with open(PATH) as file:
        for each in _TEXT.finditer(file.read().replace('\n      ', ' ')):
            texts: dict[str, Any] = each.groupdict()
            commands = texts.pop('commands').split('\n    $ ')[1:]
            yield Finding(**texts, commands=tuple(commands))


#: The templates by id, in the order of findings.txt.
KINDS = {kind.id: kind for kind in _read()}
