# SPDX-License-Identifier: Apache-2.0

"""Argument parsers of the command and its verbs, with one-line errors."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import Any, Callable, Iterable, Iterator, NoReturn, Optional
from typing import Sequence

from kuryr_break0.cli import common
from kuryr_break0.cli import verbs as known_verbs
from kuryr_break0.cli.verbs import VERBS
from kuryr_break0.texts import close_to


class Parser(argparse.ArgumentParser):
    """The parser of the command and of each verb."""

    #: The arguments to parse.
    _args: Sequence[str] = ()
    #: In the parser of a verb, the parser of the options before COMMAND.
    _first: Optional[Parser] = None

    @property
    def verbs(self) -> dict[str, Parser]:
        """Return the parsers of all verbs, by name.

        In the parser of a verb, the dictionary is empty.
        """
        return next((dict(each.choices) for each in self._actions if
                     isinstance(each, argparse._SubParsersAction)), {})

    def add_flag(self, name: str, text: str) -> None:
        """Add an option without a value."""
        self.add_argument(name, action='store_true', help=text)

    def add_value(self, name: str, metavar: str, text: str,
                  parse: Callable[[str], Any] = str, **kwargs: Any) -> None:
        """Add an argument with a value.

        :param parse: returns the value, or raises ValueError with the reason
        """
        def checked(value: str) -> Any:
            try:
                return parse(value)
            except ValueError as err:
                raise argparse.ArgumentTypeError(str(err)) from err

        self.add_argument(name, metavar=metavar, help=text, type=checked,
                          **kwargs)

    def format_help(self) -> str:
        """Return the help of all verbs, or of this verb."""
        return known_verbs.page() if self.verbs else super().format_help()

    def parse_known_args(self, args: Any = None,
                         namespace: Any = None) -> Any:
        """Parse arguments; exit with an error if an argument is unknown."""
        self._args = args or []
        for verb in self.verbs.values():
            verb._first = self
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error('unrecognized arguments: ' + ' '.join(unknown))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print an error in one line, and exit.

        An unknown option is reported first, since it can be the cause of
        another error, such as a missing option.
        """
        unknown = [each for parser in (self._first, self) if parser
                   for each in parser._unknown()]
        if unknown:
            message = '%s is not understood%s' % (
                unknown[0], self._meant(unknown[0].partition('=')[0]))
        match = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        sys.exit(common.no_verb(match[1]) if match else common.fail(
            common.USAGE, '%s (see %s --help)' % (re.sub(
                '^unrecognized arguments: (.*)', r'\1 is not understood',
                message, flags=re.S), self.prog)))

    def _unknown(self) -> Iterator[str]:
        """Iterate over the given options that this parser does not have."""
        for each in self._args:
            if each == '--' or each in self.verbs:
                return
            if re.match('-[^0-9]', each) and not any(
                    known.startswith(each.partition('=')[0])
                    or known == each[:2]
                    for known in self._option_string_actions):
                yield each

    def _meant(self, name: str) -> str:
        """Return a hint: the right place of an option, or a similar option."""
        if self._first and name in self._first._option_string_actions:
            return ': it comes before COMMAND'
        if any(name in verb._option_string_actions for verb in (
                [self] if self._first else self.verbs.values())):
            return ': it comes after COMMAND'
        return close_to(name, self._option_string_actions)


def whole() -> Parser:
    """Return a parser of all verbs, without the options of oslo.config."""
    made = Parser(prog=known_verbs.PROGRAM)
    add_parsers(made.add_subparsers())
    return made


def add_parsers(subparsers: Any, names: Iterable[str] = VERBS) -> None:
    """Register all verbs of the modules that contain the given verbs."""
    subparsers.metavar = 'COMMAND'  # a list of all verbs is too long
    for name in dict.fromkeys(VERBS[each].module for each in names):
        importlib.import_module('kuryr_break0.cli.' + name).add_parsers(
            subparsers)


def add_verb(subparsers: Any, name: str, func: Any, description: str,
             epilog: Optional[str] = None, json: bool = True) -> Any:
    """Register a verb, and return its parser.

    :param func: runs the verb, and returns the exit code
    :param json: add the options --output and --json
    """
    parser = subparsers.add_parser(
        name, help=VERBS[name].summary, description=description,
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(func=func)
    if json:
        parser.add_argument('--json', dest='output', action='store_const',
                            const='json', help='the same as -o json')
        parser.add_argument('-o', '--output', choices=('json', 'yaml'),
                            help='print a document for programs')
    return parser
