# SPDX-License-Identifier: Apache-2.0

"""Exit statuses and errors of all verbs. Imports nothing slow."""

from __future__ import annotations

import sys

from kuryr_break0.cli import output
from kuryr_break0.cli import verbs
from kuryr_break0.texts import close_to
from kuryr_break0.texts import safe

#: Exit codes of all verbs.
IN_SYNC, DRIFT, USAGE, UNREADABLE, WARNINGS = range(5)
#: Of a program that SIGPIPE ended, as shells have it.
CLOSED_PIPE = 141


def fail(code: int, err: object) -> int:
    """Print an error, and return the exit code."""
    output.write(output.Wrong(safe(output.speak('kuryr-break0: %s' % err))),
                 sys.stderr)
    return code


def no_verb(name: str) -> int:
    """Print that there is no such command, and return the exit code."""
    return fail(USAGE, 'there is no command %s%s (see %s --help)' % (
        name or "''", close_to(name, verbs.VERBS), verbs.PROGRAM))
