# SPDX-License-Identifier: Apache-2.0

"""The findings of the doctor, whose texts are in findings.txt.

Each has an id that never changes, for alerts, runbooks and searches. The other
modules of this package decide whether it applies. The documentation prints the
texts as they are in that file.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from typing import Any, Collection, Iterable, Iterator, Optional

#: Node and pods cannot reach each other, or soon will not.
ERROR = 'error'
#: They can, but that depends on something that may end, or it harms others.
WARNING = 'warning'
#: It may be intended. It does not change the exit status.
NOTE = 'note'
#: What to do first.
SEVERITIES = (ERROR, WARNING, NOTE)

PATH = os.path.join(os.path.dirname(__file__), 'findings.txt')
#: A line continues the one before it if it is indented by six blanks.
_TEXT = re.compile(r'(?P<id>\S+): (?P<severity>\w+)\n'
                   r'when  (?P<when>.*)\nwhy   (?P<why>.*)\n'
                   r'do    (?P<remedy>.*)(?P<commands>(?:\n    \$ .*)*)')


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, or the template of that.

    :ivar when: the condition under which it is reported, for the
        documentation
    :ivar why: why it matters
    :ivar remedy: what to do about it
    :ivar commands: how, by commands that can be pasted into a shell; those
        of a template have fields of the form ``%(name)s``
    :ivar seen: what was found, in this case
    :ivar subjects: what it is about, if it is several: addresses, files
    """

    id: str
    severity: str
    when: str
    why: str
    remedy: str
    commands: tuple[str, ...]
    seen: str = ''
    subjects: tuple[str, ...] = ()

    def found(self, seen: str, subjects: Collection[Any] = (),
              commands: Collection[str] = (), severity: Optional[str] = None,
              **fields: Any) -> Finding:
        """Fill in the template.

        :param subjects: printed after ``seen``, the first of them
        :param commands: used instead of those of the template
        :param severity: used instead of that of the template
        :param fields: values for the fields of the commands
        """
        return dataclasses.replace(
            self, severity=severity or self.severity, seen=seen,
            commands=tuple(commands) or tuple(command % fields
                                              for command in self.commands),
            subjects=tuple(map(str, subjects)))


def inside(netns: object, command: str, *names: object) -> str:
    """Return a command that is run in a namespace.

    :param names: what others have chosen, as a container the names of its
        interfaces, for the fields of the command; it goes into a shell
    """
    return 'nsenter --net=%s %s' % (shlex.quote(str(netns)), command % tuple(
        shlex.quote(str(name)) for name in names))


def merged(found: Iterable[Finding]) -> Iterator[Finding]:
    """Make one finding of all of a kind, in the words of the worst.

    A command that several have is the last one, as a sync after all others.
    """
    kinds: dict[str, list[Finding]] = {}
    for each in found:
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


#: The templates by their ids, in the order in which they are looked for.
KINDS = {kind.id: kind for kind in _read()}
