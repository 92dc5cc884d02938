# SPDX-License-Identifier: Apache-2.0

"""The command ``kuryr-break0``: options, logging, and which verb to run."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shlex
import sys
from typing import Any, Iterable, Optional, Sequence

from oslo_config import cfg
from oslo_log import log as logging

from kuryr_break0.cli import common
from kuryr_break0.cli import completion
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0 import exceptions

#: The module of each verb, in the order of the documentation. Only that of the
#: verb that is asked for is imported.
_MODULES = {'status': 'status', 'probe': 'probe', 'doctor': 'doctor',
            'check': 'doctor', 'sync': 'sync', 'agent': 'agent',
            'bind': 'bind', 'unbind': 'bind', 'adopt': 'adopt',
            'cleanup': 'cleanup', 'cni': 'cni', 'cni-install': 'cni'}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a verb and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    conf = parser.Config()
    logging.register_options(conf)
    conf.set_default('use_stderr', True)  # stdout is for what was asked
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=functools.partial(
            add_parsers, verbs=_verbs_of(argv))))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the locale cannot write is no reason to fail.
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        return _run(conf, argv)
    except KeyboardInterrupt:
        return common.INTERRUPTED
    except BrokenPipeError:
        # As by ``| head``. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return common.CLOSED_PIPE


def _run(conf: cfg.ConfigOpts, argv: Sequence[str]) -> int:
    if not argv:
        whole_parser().print_help()
        return common.USAGE
    if argv[0] == '--shell_completion' and argv[-1] in completion.SHELLS:
        print(completion.script(argv[-1], whole_parser()), end='')
        return common.IN_SYNC
    try:
        conf(argv, project='kuryr', prog=parser.PROGRAM,
             default_config_files=parser.files()[0],
             version=importlib.metadata.version(parser.PROGRAM))
        args = _prepare(conf, argv)
    except (cfg.Error, exceptions.InvalidOption, exceptions.NotRoot, OSError,
            logging.LogConfigError, UnicodeDecodeError) as err:
        # OSError is of a log file.
        if argv[-1:] == ['cni']:
            from kuryr_break0.cli import cni
            return cni.fail(_told(err, argv))
        return common.fail(common.USAGE, _told(err, argv))
    try:
        code: int = conf.command.func(*args)
        sys.stdout.flush()  # so that a closed pipe is seen here
        return code
    except exceptions.Break0Error as err:
        return common.fail(common.UNREADABLE, err)


def _prepare(conf: cfg.ConfigOpts, argv: Sequence[str]) -> list[Any]:
    """Set up logging, and return the arguments of the verb."""
    verb = conf.command.name
    # A plugin can be installed by whoever may write its directory.
    if os.geteuid() != 0 and verb != 'cni-install':
        raise exceptions.NotRoot(command=shlex.join(argv))
    logging.setup(conf, parser.PROGRAM)
    if verb != 'agent' and not conf.debug:
        logging.getLogger(None).logger.setLevel(logging.WARNING)
    try:
        options = config.load(conf)
    except exceptions.InvalidOption:
        # The doctor examines these too; a CNI runtime is answered.
        if verb in ('doctor', 'check', 'cni'):
            return [conf]
        raise
    if options.discover and not importlib.util.find_spec('kuryr_kubernetes'):
        output.speak_of_containers()
    return [conf] if verb in ('doctor', 'check', 'cni') else [conf, options]


def _told(err: Exception, argv: Sequence[str]) -> Exception:
    """Return an error with what to do about it."""
    if isinstance(err, UnicodeDecodeError):
        return exceptions.InvalidOption(
            option='(all)', reason='%s is no text in UTF-8: %s' % (
                _unreadable(argv) or 'a configuration file', err))
    if isinstance(err, cfg.ConfigFilesPermissionDeniedError) and os.geteuid():
        return exceptions.NotRoot(command=shlex.join(argv))
    return err


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


def whole_parser() -> parser.Parser:
    """Return a parser of all verbs, without the options of oslo.config."""
    made = parser.Parser(prog=parser.PROGRAM)
    add_parsers(made.add_subparsers())
    return made


def _verbs_of(argv: Sequence[str]) -> Iterable[str]:
    """Return the verbs that arguments can be for: all, if it is none."""
    found = [each for each in argv if each in _MODULES]
    if not found or any(each.startswith(('-h', '--h'))
                        for each in argv[:argv.index(found[0])]):
        return _MODULES
    return found


def add_parsers(subparsers: Any, verbs: Iterable[str] = _MODULES) -> None:
    """Register verbs, those of one module together."""
    for name in dict.fromkeys(_MODULES[verb] for verb in verbs):
        importlib.import_module('kuryr_break0.cli.' + name).add_parsers(
            subparsers)
