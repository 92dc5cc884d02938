# SPDX-License-Identifier: Apache-2.0

"""Reads the configuration, sets up logging, and runs a verb."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib.metadata
import importlib.util
import logging
import os
import shlex
from typing import Any, Callable, Optional, Sequence

from oslo_config import cfg
from oslo_log import _options as log_options

from kuryr_break0.cli import common
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0.cli import verbs
from kuryr_break0 import config
from kuryr_break0 import exceptions

#: Completion scripts by shell, generated from the parser.
COMPLETION = {shell: os.path.join(os.path.dirname(__file__), 'completion',
                                  name) for shell, name in (
    ('bash', verbs.PROGRAM), ('zsh', '_' + verbs.PROGRAM),
    ('fish', verbs.PROGRAM + '.fish'))}
#: Verbs that load the options themselves: the doctor reports invalid options,
#: and the CNI plugin answers the runtime with an error.
_READERS = 'doctor', 'check', 'cni'
#: Options of oslo.log. If none of them is set, verbs other than agent log only
#: warnings, to stderr.
_LOGGED = ('debug', 'log_config_append', 'log_file', 'log_dir', 'use_syslog',
           'use_journal', 'use_json')


class _Parser(parser.Parser, cfg._CachedArgumentParser):
    """The parser of verbs, with the methods that oslo.config calls."""


class _HelpAll(argparse.Action):
    """Prints help that includes the options of oslo.config and oslo.log."""

    def __call__(self, parser: argparse.ArgumentParser,
                 *args: Any, **kwargs: Any) -> None:
        print(argparse.ArgumentParser.format_help(parser), end='')
        parser.exit()


class Config(cfg.ConfigOpts):
    """oslo.config with our parser, for which oslo.config has no argument."""

    def _pre_setup(self, *args: Any) -> Any:
        parser = super()._pre_setup(*args)
        assert self._oparser is not None
        self._oparser.__class__ = _Parser
        self._oparser.add_parser_argument(
            self._oparser, '--help-all', nargs=0, action=_HelpAll,
            help='show this help message and exit')
        return parser


def run(argv: Sequence[str]) -> int:
    """Run the verb that the arguments name; return its exit code."""
    if argv[0].startswith('--shell_completion'):
        shell = argv[-1].rpartition('=')[2]
        if shell not in COMPLETION:
            return common.fail(common.USAGE, '--shell_completion must be %s, '
                               'not %s' % (', '.join(COMPLETION), shell))
        with open(COMPLETION[shell]) as file:
            print(file.read(), end='')
        return common.IN_SYNC
    try:
        conf = _read(argv)
        # Installing the plugin needs write access to a directory, not root.
        if os.geteuid() != 0 and conf.command.name != 'cni-install':
            raise exceptions.NotRoot(command=shlex.join(argv))
        conf = _set_up_logging(conf, argv)
        args = _arguments(conf)
    except (cfg.Error, exceptions.WrongUsage, OSError,
            UnicodeDecodeError) as err:
        if argv[-1:] == ['cni']:
            from kuryr_break0.cli import cni

            return cni.fail(_explained(err, argv))
        return common.fail(common.USAGE, _explained(err, argv))
    except SystemExit as end:
        # oslo.config exits with status 1 after it has printed the invalid
        # value.
        raise SystemExit(common.USAGE if end.code == 1 else end.code)
    try:
        code: int = conf.command.func(*args)
        return code
    except exceptions.WrongUsage as err:
        return common.fail(common.USAGE, err)
    except OSError as err:
        if err.filename is None:  # main handles a closed pipe
            raise
        return common.fail(common.UNREADABLE, 'A system call failed: %s' % err)
    except exceptions.Break0Error as err:
        return common.fail(common.UNREADABLE, err)


def _register_log_options(conf: cfg.ConfigOpts) -> None:
    """Register the options of oslo.log without importing oslo.log."""
    for opts in log_options.common_cli_opts, log_options.logging_cli_opts:
        conf.register_cli_opts(opts)
    for opts in log_options.generic_log_opts, log_options.log_opts:
        conf.register_opts(opts)


def _read(argv: Sequence[str], register: Callable[
        [cfg.ConfigOpts], None] = _register_log_options) -> Config:
    """Read arguments and configuration files.

    :param register: registers the options of oslo.log
    """
    conf = Config()
    register(conf)
    conf.set_default('use_stderr', True)  # stdout is for the output of verbs
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=functools.partial(
            parser.add_parsers, names=[
                each for each in argv if each in verbs.VERBS] or verbs.VERBS)))
    conf(argv, project='kuryr', prog=verbs.PROGRAM,
         default_config_files=verbs.files()[0],
         version=importlib.metadata.version(verbs.PROGRAM)
         if '--version' in argv else None)
    for path in conf.config_dir or ():
        if not os.path.isdir(path):  # oslo.config would ignore it
            raise exceptions.WrongUsage('%s is not a directory' % path)
    return conf


def _set_up_logging(conf: Config, argv: Sequence[str]) -> Config:
    """Set up logging by the options of oslo.log, or warnings to stderr.

    oslo.log is imported only if an option needs it, because the import takes a
    quarter of the start time of a command.

    :returns: the configuration, read again if oslo.log is used
    :raises cfg.Error: if log_config_append names an unreadable file
    :raises CannotWrite: if the log file cannot be written
    """
    verb = conf.command.name
    if verb != 'agent' and not any(getattr(conf, each) for each in _LOGGED):
        logging.basicConfig(format='%(asctime)s %(levelname)s %(message)s',
                            level=logging.WARNING)
        return conf
    from oslo_log import log

    conf = _read(argv, log.register_options)
    try:
        _start_log(conf, log.setup)
    # RuntimeError: --use-journal needs the Python package systemd.
    except (log.LogConfigError, RuntimeError) as err:
        raise cfg.Error(str(err)) from err
    except OSError as err:
        raise exceptions.CannotWrite(path=err.filename,
                                     reason=err.strerror) from err
    if verb != 'agent' and not conf.debug:
        logging.getLogger().setLevel(logging.WARNING)
    return conf


def _start_log(conf: Config, setup: Callable[[Any, str], None]) -> None:
    """Open the log; if the agent cannot write its file, it logs to stderr.

    The log file that kuryr.conf names is kuryr-daemon's. In its unit or its
    container, the agent has a read-only file system, and a log of its own.

    :raises OSError: if the log file cannot be written for another reason
    """
    try:
        setup(conf, verbs.PROGRAM)
    except OSError as err:
        if conf.command.name != 'agent' or err.errno not in (
                errno.EROFS, errno.EACCES):
            raise
        for name, value in (('log_file', None), ('log_dir', None),
                            ('use_stderr', True)):
            conf.set_override(name, value)
        setup(conf, verbs.PROGRAM)
        logging.getLogger(__name__).warning(
            'The agent cannot write the log file %s (%s), and logs to stderr '
            'instead. To log to the file, make it writable for the agent.',
            err.filename, err.strerror)


def _arguments(conf: Config) -> list[Any]:
    """Return the arguments for the function of the verb."""
    is_reader = conf.command.name in _READERS
    try:
        options = config.load(conf)
    except exceptions.InvalidOption:
        if is_reader:
            return [conf]
        raise
    if options.discover and not importlib.util.find_spec('kuryr_kubernetes'):
        output.speak_of_containers()
    return [conf] if is_reader else [conf, options]


def _explained(err: Exception, argv: Sequence[str]) -> Exception:
    """Return a clearer error if a file is not UTF-8 or needs root to read."""
    if isinstance(err, UnicodeDecodeError):
        return exceptions.InvalidOption(
            option='(all)', reason='%s is not valid UTF-8: %s' % (
                _unreadable(argv) or 'a configuration file', err))
    if isinstance(err, cfg.ConfigFilesPermissionDeniedError) and os.geteuid():
        return exceptions.NotRoot(command=shlex.join(argv))
    return err


def _unreadable(argv: Sequence[str]) -> Optional[str]:
    """Return the first file in the arguments that is not valid UTF-8."""
    for path in [each.partition('=')[2] or each for each in argv]:
        try:
            with open(path, encoding='utf-8') as file:
                file.read(2 ** 20)
        except UnicodeDecodeError:
            return path
        except (OSError, ValueError):
            continue
    return None
