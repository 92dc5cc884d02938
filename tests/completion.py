# SPDX-License-Identifier: Apache-2.0

"""Prints the completion for bash, made by shtab of the parser itself."""

from __future__ import annotations

import argparse
from typing import Iterator

from oslo_config import cfg
from oslo_log import log as logging
import shtab

from kuryr_break0.cli import main as cli

#: What options are called that take a path.
_FILES = ('PATH', 'FILE', 'LOG_FILE', 'LOG_CONFIG_APPEND', 'FILENAME')
_DIRECTORIES = ('DIR', 'LOG_DIR')


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command, as oslo.config makes it."""
    conf = cfg.ConfigOpts()
    logging.register_options(conf)
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=cli.add_parsers))
    conf(['status'], project='kuryr', prog='kuryr-break0', version='1',
         default_config_files=[])
    made: argparse.ArgumentParser = conf._oparser
    return made


def actions(made: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Iterate over all options, those of the verbs too."""
    for action in made._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)


def script() -> str:
    """Return the completion."""
    made = parser()
    for action in actions(made):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(made, shell='bash')


if __name__ == '__main__':
    print(script())
