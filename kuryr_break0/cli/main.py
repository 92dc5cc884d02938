# SPDX-License-Identifier: Apache-2.0

"""The command ``kuryr-break0``: options, logging, and which verb to run."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any, Optional, Sequence

from oslo_config import cfg
from oslo_log import log as logging

from kuryr_break0.cli import adopt
from kuryr_break0.cli import agent
from kuryr_break0.cli import bind
from kuryr_break0.cli import check
from kuryr_break0.cli import cleanup
from kuryr_break0.cli import cni
from kuryr_break0.cli import common
from kuryr_break0.cli import doctor
from kuryr_break0.cli import probe
from kuryr_break0.cli import status
from kuryr_break0.cli import sync
from kuryr_break0 import config
from kuryr_break0 import exceptions


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a verb and return its exit code."""
    conf = cfg.ConfigOpts()
    logging.register_options(conf)
    conf.set_default('use_stderr', True)  # stdout is for what was asked
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=add_parsers))
    try:
        return _run(conf, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return common.INTERRUPTED
    except BrokenPipeError:
        # As by ``| head``. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return common.CLOSED_PIPE


def _run(conf: cfg.ConfigOpts, argv: Sequence[str]) -> int:
    try:
        # kuryr.conf is where Kuryr's own programs look for it. Hosts without
        # have a file of ours: /etc/kuryr-break0/kuryr-break0.conf.
        files = (cfg.find_config_files(project='kuryr', prog='kuryr-break0')
                 or cfg.find_config_files(project='kuryr-break0',
                                          prog='kuryr-break0'))
        conf(argv, project='kuryr', prog='kuryr-break0',
             default_config_files=files,
             version=importlib.metadata.version('kuryr-break0'))
        logging.setup(conf, 'kuryr-break0')
        if conf.command.func is not agent.run and not conf.debug:
            logging.getLogger(None).logger.setLevel(logging.WARNING)
        # The doctor examines invalid options too; a CNI runtime is answered.
        args = [conf] if conf.command.func in (doctor.run, cni.run) else [
            conf, config.load(conf)]
    except (cfg.Error, exceptions.InvalidOption, OSError,
            logging.LogConfigError, UnicodeDecodeError) as err:
        # OSError is of a log file, or of oslo.config's --shell_completion,
        # whose template its package lacks.
        if isinstance(err, UnicodeDecodeError):
            err = exceptions.InvalidOption(
                option='(all)', reason='%s is no text in UTF-8: %s' % (
                    _unreadable(argv) or 'a configuration file', err))
        if cni.is_asked_for(argv):
            return cni.fail(err)
        return common.fail(common.USAGE, err)
    try:
        code: int = conf.command.func(*args)
        sys.stdout.flush()  # so that a closed pipe is seen here
        return code
    except exceptions.Break0Error as err:
        return common.fail(common.UNREADABLE, err)


def _unreadable(argv: Sequence[str]) -> Optional[str]:
    """Return which file of the arguments is no text."""
    for path in [each.partition('=')[2] or each for each in argv]:
        try:
            with open(path, encoding='utf-8') as file:
                file.read(2 ** 20)
        except UnicodeDecodeError:
            return path
        except (OSError, ValueError):
            continue
    return None


def add_parsers(subparsers: Any) -> None:
    """Register all verbs, in the order of ``--help``."""
    status.add_parser(subparsers)
    check.add_parser(subparsers)
    doctor.add_parser(subparsers)
    sync.add_parser(subparsers)
    agent.add_parser(subparsers)
    adopt.add_parser(subparsers)
    bind.add_parsers(subparsers)
    cleanup.add_parser(subparsers)
    cni.add_parsers(subparsers)
    probe.add_parser(subparsers)
