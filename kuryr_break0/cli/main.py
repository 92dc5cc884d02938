# SPDX-License-Identifier: Apache-2.0

"""The entry point of the command. --help and --version import no verb."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Optional, Sequence

from kuryr_break0.cli import common
from kuryr_break0.cli import verbs


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a verb; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in ('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'):
        if getattr(sys, name) is None:  # closed by the calling process
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Escape characters that the encoding of the locale does not have.
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        code = _answer(argv)
        sys.stdout.flush()  # a closed pipe fails here, not at exit
        return code
    except OSError as err:
        if err.errno not in (errno.EPIPE, errno.ENOSPC) or err.filename:
            raise
        # The pipe is closed (``| head``) or the file system is full. Send the
        # buffer to /dev/null: Python would fail to flush the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return common.CLOSED_PIPE if err.errno == errno.EPIPE else common.fail(
            common.UNREADABLE, 'Cannot print: %s' % err.strerror)


def _answer(argv: Sequence[str]) -> int:
    first = argv[0] if argv else ''
    if not argv or first in ('-h', '--help'):
        print(end=verbs.page())
        return common.IN_SYNC if argv else common.USAGE
    if first == '--version':
        import importlib.metadata

        print(importlib.metadata.version(verbs.PROGRAM))
        return common.IN_SYNC
    if not first.startswith('-') and first not in verbs.VERBS:
        return common.no_verb(first)
    from kuryr_break0.cli import command

    return command.run(argv)
