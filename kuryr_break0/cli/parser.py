# SPDX-License-Identifier: Apache-2.0

"""The command line: help in groups, errors of one line, and completion."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, Callable, Iterator, NoReturn, Optional

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0 import config

PROGRAM = 'kuryr-break0'
_HEAD = """\
Let a host and the macvlan containers or pods on its interfaces reach each
other, which the kernel by itself prevents.

usage: kuryr-break0 COMMAND [ARGUMENT ...]
"""
_FOOT = """
The configuration is the section [break0] of kuryr.conf and kuryr-break0.conf,
each from the first of ~/.kuryr, ~, /etc/kuryr and /etc that has it. If there
is neither: kuryr-break0.conf in ~/.kuryr-break0, ~, /etc/kuryr-break0, /etc.
%s
kuryr-break0 COMMAND --help explains a command. --help-all lists the options
for configuration files and logging, which come before COMMAND.
"""
#: The verbs of --help, in its order.
_GROUPS = {'Look': ('status', 'probe', 'doctor', 'check'),
           'Repair': ('sync', 'agent'),
           'Set up': ('bind', 'unbind', 'adopt', 'cleanup', 'cni',
                      'cni-install')}


def files() -> tuple[list[str], list[str]]:
    """Return the configuration files that are read, and those that are not.

    kuryr.conf is where Kuryr's own programs look for it. Hosts without have
    a file of ours: /etc/kuryr-break0/kuryr-break0.conf.
    """
    # The same one twice, as project and program have one name.
    ours = cfg.find_config_files(project=PROGRAM, prog=PROGRAM)[:1]
    used = cfg.find_config_files(project='kuryr', prog=PROGRAM) or ours
    return used, [each for each in ours if each not in used]


class Parser(argparse.ArgumentParser):
    """The parser of the command and of each verb."""

    summary = ''

    @property
    def verbs(self) -> dict[str, Parser]:
        """Return the parsers of the verbs; those of a verb are none."""
        return next((dict(each.choices) for each in self._actions if
                     isinstance(each, argparse._SubParsersAction)), {})

    def add_flag(self, name: str, text: str) -> None:
        """Add an option without a value."""
        self.add_argument(name, action='store_true', help=text)

    def format_help(self) -> str:
        """Return the page of all verbs, or that of one."""
        return ''.join(_page(self.verbs)) if self.verbs else (
            super().format_help())

    def parse_known_args(self, args: Any = None,
                         namespace: Any = None) -> Any:
        """Parse; what a verb does not know is its own error."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error('unrecognized arguments: ' + ' '.join(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """End with one line that says what is wrong."""
        for pattern, text, known in (
                (r"argument command: invalid choice: '(.*?)'",
                 'there is no command %s', self.verbs),
                (r'unrecognized arguments: (\S*)',
                 '%s is not understood', self._option_string_actions)):
            found = re.match(pattern, message)
            if found:
                message = text % found[1] + config.close_to(found[1], known)
        sys.exit(common.fail(common.USAGE, '%s (see %s --help)' % (
            message, self.prog)))


class _Parser(Parser, cfg._CachedArgumentParser):
    """The same, as oslo.config uses it."""


class _HelpAll(argparse.Action):
    """Prints the options of oslo.config and oslo.log too."""

    def __call__(self, parser: argparse.ArgumentParser,
                 *args: Any, **kwargs: Any) -> None:
        print(argparse.ArgumentParser.format_help(parser), end='')
        parser.exit()


class Config(cfg.ConfigOpts):
    """oslo.config with our parser, which it lets nobody choose."""

    def _pre_setup(self, *args: Any) -> Any:
        found = super()._pre_setup(*args)
        assert self._oparser is not None
        self._oparser.__class__ = _Parser
        self._oparser.add_parser_argument(
            self._oparser, '--help-all', nargs=0, action=_HelpAll,
            help='show this help message and exit')
        return found


def _page(verbs: dict[str, Parser]) -> Iterator[str]:
    yield _HEAD
    for title, names in _GROUPS.items():
        yield '\n%s:\n' % title
        for name in names:
            yield '  %-12s %s\n' % (name, verbs[name].summary)
    used, ignored = files()
    yield _FOOT % ''.join(
        '%s: %s\n' % (what, ' '.join(paths)) for what, paths in (
            ('On this host', used), ('Not read', ignored)) if paths)


def add_verb(subparsers: Any, name: str, summary: str, func: Any,
             description: str, epilog: Optional[str] = None,
             json: bool = True) -> Any:
    """Register a verb, and return its parser.

    :param summary: its line in --help
    :param json: whether it can print JSON
    """
    parser = subparsers.add_parser(
        name, help=summary, description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.summary = summary
    parser.set_defaults(func=func)
    if json:
        parser.add_flag('--json', 'print JSON for programs')
    return parser


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type of argparse with the errors of an option's type."""
    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return checked
