# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 cni`` and ``cni-install``: the plugin for CNI runtimes."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from typing import Any, Iterator

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import cni
from kuryr_break0.cni import plugin
from kuryr_break0.cni import request
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import option_types

PLUGIN = 'break0'
_CNI = """\
Run as the CNI plugin break0, in one process, without the agent. A runtime
sets CNI_COMMAND and other variables, and writes a network configuration to
standard input. In the list of plugins, {"type": "break0"} comes after
macvlan. Exit status: 0, or 1 with an error in JSON on standard output.
"""
_INSTALL = """\
Install the CNI plugin break0 in a directory of plugins, and replace an
existing one. If the shim was built (make cni), the plugin is the shim, which
passes requests to the agent. Otherwise it is a script that runs kuryr-break0
cni. Exit status: 0 if the plugin is installed, otherwise 2.
"""
_INSTALL_EPILOG = """\
example:
  kuryr-break0 cni-install --bin-dir %s
""" % cni.PLUGIN_DIRS[0]
#: Paths in a clone: the shim that "make cni" builds, and its source.
_BUILT, _SOURCE = 'build/cni/' + PLUGIN, 'kuryr_break0/cni/shim.c'
#: Path of the shim after "make install", and in the image.
_INSTALLED = '/usr/libexec/kuryr-break0/' + PLUGIN


def add_parsers(subparsers: Any) -> None:
    parser.add_verb(subparsers, 'cni', run, _CNI, json=False)
    added = parser.add_verb(subparsers, 'cni-install', install, _INSTALL,
                            _INSTALL_EPILOG)
    added.add_value(
        '--bin-dir', 'DIR', 'absolute path of the directory of CNI plugins',
        option_types.absolute_path, required=True)
    added.add_value(
        '--shim', 'FILE', 'absolute path of the shim (default: '
        'build/cni/break0 in the clone of the package, then in the current '
        'directory, then /usr/libexec/kuryr-break0/break0)',
        option_types.absolute_path)
    added.add_flag(
        '--without-agent', 'install the script, even if a shim exists')


def fail(err: Exception) -> int:
    """Answer the runtime with a configuration error; return the exit code."""
    sys.stdout.write(plugin.failure(exceptions.InvalidOption(
        option='(all)', reason=err) if not isinstance(
            err, exceptions.Break0Error) else err).output)
    return 1


def run(conf: cfg.ConfigOpts) -> int:
    """Answer one CNI request; return the exit code."""
    data = sys.stdin.buffer.read(request.LIMIT + 1)
    answer = plugin.answer(os.environ, data, lambda: config.load(conf))
    sys.stdout.write(answer.output)
    sys.stdout.flush()
    if answer.status == 0 and os.environ.get('CNI_COMMAND') in (
            request.ADD, request.DEL):
        Break0Manager(config.load(conf)).try_to_housekeep()
    return answer.status


def install(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Install the plugin: the shim, or the script."""
    command = conf.command
    target = os.path.join(command.bin_dir, PLUGIN)
    shims = [] if command.without_agent else (
        [command.shim] if command.shim else list(_shims()))
    try:
        if shims:
            with open(shims[0], 'rb') as file:
                content = file.read()
        else:
            content = '\n'.join(_script(conf)).encode()
        _replace(target, content)
    except PermissionError:
        raise exceptions.NotRoot(command=shlex.join(sys.argv[1:]))
    except OSError as err:
        if err.filename in shims:
            raise exceptions.WrongUsage('Cannot read the shim: %s' % err)
        raise exceptions.CannotWrite(path=target, reason='%s: %s' % (
            err.filename, err.strerror))
    output.show(
        command.output,
        {'installed': target, 'shim': shims[0] if shims else None},
        ['Installed %s: %s' % (
            target, 'the shim ' + shims[0] if shims
            else 'a script that runs kuryr-break0 cni')])
    return common.IN_SYNC


def _shims() -> Iterator[str]:
    """Yield the existing shims that can be trusted.

    In a clone, the shim and its directories must belong to root or the caller
    and must not be world-writable. The current directory may belong to
    another user, and a shim from there would run as root.
    """
    trusted = {0, os.geteuid(), int(os.environ.get('SUDO_UID') or 0)}
    for clone in (pathlib.Path(__file__).parents[2], pathlib.Path.cwd()):
        path = clone / _BUILT
        if path.is_file() and (clone / _SOURCE).is_file() and all(
                each.stat().st_uid in trusted
                and not each.stat().st_mode & 0o002
                for each in (path, *list(path.parents)[:3])):
            yield str(path)
    if os.path.isfile(_INSTALLED):
        yield _INSTALLED


def _script(conf: cfg.ConfigOpts) -> Iterator[str]:
    command = [sys.executable, '-m', 'kuryr_break0']
    for option, paths in (('--config-file', conf.config_file),
                          ('--config-dir', conf.config_dir)):
        for path in paths or ():
            command += [option, os.path.abspath(path)]
    yield '#!/bin/sh'
    yield '# Written by kuryr-break0 cni-install.'
    yield 'exec %s cni' % shlex.join(command)
    yield ''


def _replace(target: str, content: bytes) -> None:
    """Replace a program atomically."""
    new = '%s/.%s.%d' % (*os.path.split(target), os.getpid())
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                     | os.O_NOFOLLOW, 0o755)
        with open(fd, 'wb') as file:
            os.fchmod(fd, 0o755)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(new, target)
    except OSError:
        if os.path.exists(new):
            os.unlink(new)
        raise
