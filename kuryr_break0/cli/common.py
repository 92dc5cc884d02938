# SPDX-License-Identifier: Apache-2.0

"""Exit codes and errors of all verbs, without slow imports."""

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
#: Exit code that a shell reports for a program that SIGPIPE has killed.
CLOSED_PIPE = 141


def fail(code: int, err: object) -> int:
    """Print an error to stderr; return the exit code."""
    output.write(output.Wrong(safe(output.speak('kuryr-break0: %s' % err))),
                 sys.stderr)
    return code


def kuryr_api(conf: Any) -> Any:
    """Import kuryr_break0.kuryr.api, and pass it our configuration files.

    :raises ImportError: if Kuryr cannot be imported
    :raises oslo_config.cfg.Error: if Kuryr's options cannot be read
    """
    # The import takes a second, and most verbs do not need Kuryr. The import
    # also emits deprecation warnings that a user cannot act on.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from kuryr_break0.kuryr import api
    api.configure(conf.config_file or [], conf.config_dir or [])
    return api


def no_verb(name: str) -> int:
    """Print an error for an unknown command; return the exit code."""
    return fail(USAGE, 'there is no command %s%s (see %s --help)' % (
        name or "''", close_to(name, verbs.VERBS), verbs.PROGRAM))
