# SPDX-License-Identifier: Apache-2.0

"""Exit statuses and errors of all verbs. Imports nothing slow."""

from __future__ import annotations

import sys
from typing import Any
import warnings

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


def kuryr_api(conf: Any) -> Any:
    """Return kuryr_break0.kuryr.api with the configuration of a command.

    :raises ImportError: if Kuryr cannot be imported
    :raises oslo_config.cfg.Error: if its options cannot be read
    """
    # It takes a second, and most verbs do without. What its libraries say of
    # theirs is not for who calls this.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from kuryr_break0.kuryr import api
    api.configure(conf.config_file or [], conf.config_dir or [])
    return api


def no_verb(name: str) -> int:
    """Print that there is no such command, and return the exit code."""
    return fail(USAGE, 'there is no command %s%s (see %s --help)' % (
        name or "''", close_to(name, verbs.VERBS), verbs.PROGRAM))
