# SPDX-License-Identifier: Apache-2.0

"""Generate the shell completion from the parser, for make completion."""

from __future__ import annotations

import argparse
import pathlib
from typing import Iterator

from kuryr_break0.cli import command
from kuryr_break0.cli import parser
from kuryr_break0.cli.parser import Parser
from kuryr_break0.cli.verbs import VERBS

_OPTIONS = '--help --help-all --version --debug --config-file --config-dir'
_BASH = """\
# Completion of kuryr-break0 for bash.
_kuryr_break0() {
    local word verb= words=
    local previous=${COMP_WORDS[COMP_CWORD-1]}
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
%s
    done
%s
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _kuryr_break0 kuryr-break0
"""
_ZSH = """\
#compdef kuryr-break0
# Completion of kuryr-break0 for zsh.
_kuryr_break0() {
    local word verb= words_= previous=${words[CURRENT-1]}
    for word in ${words[2,CURRENT-1]}; do
%s
    done
%s
    compadd -- ${=words_} || _files
}
if [ "${funcstack[1]}" = _kuryr-break0 ]; then
    _kuryr_break0 "$@"
else
    compdef _kuryr_break0 kuryr-break0
fi
"""

_FISH = """\
# Completion of kuryr-break0 for fish.
complete -c kuryr-break0 -n __fish_use_subcommand -f
%s
"""


def script(shell: str) -> str:
    """Return the completion script of a shell.

    :param shell: bash, zsh or fish
    """
    verbs = parser.whole()
    if shell == 'fish':
        return _FISH % '\n'.join(_fish(verbs))
    made, variable = SHELLS[shell]
    return made % ('\n'.join(_verbs(verbs)),
                   '\n'.join(_words(verbs, variable)))


#: The template of a shell's script and the name of its variable for the
#: proposals, by shell.
SHELLS = {'bash': (_BASH, 'words'), 'zsh': (_ZSH, 'words_')}


def _fish(parser: Parser) -> Iterator[str]:
    first = 'complete -c kuryr-break0 -n __fish_use_subcommand '
    for option in _OPTIONS.split():
        yield '%s-l %s%s' % (first, option[2:], ' -rF' if option.startswith(
            '--config-') else '')
    for verb, each in parser.verbs.items():
        yield "%s-a %s -d '%s'" % (first, verb, VERBS[verb].summary)
        for action in each._actions:
            if not action.option_strings or (
                    action.help is argparse.SUPPRESS):
                continue
            yield "complete -c kuryr-break0 -n '__fish_seen_subcommand_from " \
                "%s' -l %s%s" % (
                    verb, action.option_strings[-1][2:],
                    " -xa '%s'" % ' '.join(action.choices)
                    if action.choices else
                    '' if action.nargs in (0, '?') else ' -r')


def _verbs(parser: Parser) -> Iterator[str]:
    yield '        case $word in'
    yield '        %s)' % '|'.join(parser.verbs)
    yield '            verb=$word; break ;;'
    yield '        esac'


def _words(parser: Parser, variable: str) -> Iterator[str]:
    """Yield the lines that set the proposals after each verb and option.

    An option with a free argument has no proposals, so the shell offers files.
    """
    yield '    case "$verb $previous" in'
    yield "    ' --config-file'|' --config-dir') ;;"
    for verb, each in parser.verbs.items():
        free = []
        for action in each._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            patterns = ["'%s %s'" % (verb, option)
                        for option in action.option_strings]
            if action.choices:
                yield "    %s) %s='%s' ;;" % ('|'.join(patterns), variable,
                                              ' '.join(action.choices))
            else:
                free += patterns
        if free:
            yield '    %s) ;;' % ('|\\\n    '.join(free))
        yield "    '%s '*)\n        %s='%s' ;;" % (
            verb, variable, ' '.join(
                action.option_strings[-1] for action in each._actions
                if action.option_strings
                and action.help is not argparse.SUPPRESS))
    yield "    *)\n        %s='%s\n        %s' ;;" % (
        variable, ' '.join(parser.verbs), _OPTIONS)
    yield '    esac'


if __name__ == '__main__':
    for _shell, _path in command.COMPLETION.items():
        pathlib.Path(_path).write_text(script(_shell))
