# SPDX-License-Identifier: Apache-2.0

"""Parsers of verbs, whose errors are one line."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import Any, Callable, Iterable, NoReturn, Optional

from kuryr_break0.cli import common
from kuryr_break0.cli import verbs as known_verbs
from kuryr_break0.cli.verbs import VERBS
from kuryr_break0.texts import close_to


class Parser(argparse.ArgumentParser):
    """The parser of the command and of each verb."""

    @property
    def verbs(self) -> dict[str, Parser]:
        """Return the parsers of the verbs; those of a verb are none."""
        return next((dict(each.choices) for each in self._actions if
                     isinstance(each, argparse._SubParsersAction)), {})

    def add_flag(self, name: str, text: str) -> None:
        """Add an option without a value."""
        self.add_argument(name, action='store_true', help=text)

    def add_value(self, name: str, metavar: str, text: str,
                  parse: Callable[[str], Any] = str, **kwargs: Any) -> None:
        """Add an argument with the errors of an option's type.

        :param parse: raises a ValueError that says what is wrong
        """
        def checked(value: str) -> Any:
            try:
                return parse(value)
            except ValueError as err:
                raise argparse.ArgumentTypeError(str(err)) from err

        self.add_argument(name, metavar=metavar, help=text, type=checked,
                          **kwargs)

    def format_help(self) -> str:
        """Return the page of all verbs, or that of one."""
        return known_verbs.page() if self.verbs else super().format_help()

    def parse_known_args(self, args: Any = None,
                         namespace: Any = None) -> Any:
        """Parse; what a verb does not know is its own error."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error('unrecognized arguments: ' + ' '.join(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """End with one line that says what is wrong."""
        found = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if found:
            sys.exit(common.fail(common.USAGE, common.NO_VERB % (
                found[1], close_to(found[1], VERBS))))
        found = re.match(r'unrecognized arguments: (\S*)', message)
        if found:
            message = '%s is not understood%s' % (
                found[1], close_to(found[1], self._option_string_actions))
        sys.exit(common.fail(common.USAGE, '%s (see %s --help)' % (
            message, self.prog)))


def whole() -> Parser:
    """Return a parser of all verbs, without the options of oslo.config."""
    made = Parser(prog=known_verbs.PROGRAM)
    add_parsers(made.add_subparsers())
    return made


def add_parsers(subparsers: Any, names: Iterable[str] = VERBS) -> None:
    """Register verbs, those of one module together."""
    subparsers.metavar = 'COMMAND'  # the list of all is wider than a screen
    for name in dict.fromkeys(VERBS[each].module for each in names):
        importlib.import_module('kuryr_break0.cli.' + name).add_parsers(
            subparsers)


def add_verb(subparsers: Any, name: str, func: Any, description: str,
             epilog: Optional[str] = None, json: bool = True) -> Any:
    """Register a verb, and return its parser.

    :param json: whether it can print JSON
    """
    parser = subparsers.add_parser(
        name, help=VERBS[name].summary, description=description,
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(func=func)
    if json:
        parser.add_flag('--json', 'print JSON for programs')
    return parser
