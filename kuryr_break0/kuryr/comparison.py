# SPDX-License-Identifier: Apache-2.0

"""Compares Kuryr's binding code with the code that direct binding replaces.

With ``pod_binding = auto``, this package replaces functions of Kuryr, with the
same result. A distribution or a later release of Kuryr may have changed these
functions. In that case, Kuryr's own code is used.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from typing import Callable, Iterator, NamedTuple, Optional

#: The replaced functions and their callers, by module of kuryr_kubernetes.
FUNCTIONS = {
    'cni/binding/base.py': ('_enable_ipv6', '_configure_l3', 'connect',
                            'disconnect', '_need_configure_l3'),
    'cni/binding/nested.py': ('_detect_iface_name', '_remove_ifaces',
                              '_get_iface_create_args', 'connect',
                              'disconnect')}
#: Digests of the known sources; ``python -m tools.releases`` prints them.
DIGESTS = {'7da9ea26c694e531': '6.0.0',
           '123a7dd60b449324': '7.0.0 to 10.0.0'}


class Comparison(NamedTuple):
    """Whether the installed Kuryr's binding code is known, with details."""

    is_known: bool
    text: str


def digest(read: Callable[[str], Optional[str]]) -> str:
    """Return a digest of the source of all FUNCTIONS.

    :param read: returns the source of a module of kuryr_kubernetes, or None
    """
    hashed = hashlib.sha256()
    for path, names in FUNCTIONS.items():
        text = read(path) or ''
        for name, source in _sources(text):
            if name in names:
                hashed.update(source.encode())
    return hashed.hexdigest()[:16]


def _sources(text: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, ast.get_source_segment(text, node) or ''


@functools.lru_cache(maxsize=None)
def compare() -> Comparison:
    """Compare the installed Kuryr; child processes inherit the result."""
    try:
        number = digest(_read)
    except (OSError, SyntaxError, ValueError) as err:
        return Comparison(False, 'its source is not readable: %s' % err)
    if number in DIGESTS:
        return Comparison(
            True, 'it is the same as in Kuryr %s' % DIGESTS[number])
    return Comparison(False, 'it differs from Kuryr 6.0.0 to 10.0.0')


def _read(path: str) -> str:
    name = 'kuryr_kubernetes.' + path[:-len('.py')].replace('/', '.')
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise OSError('there is no module %s' % name)
    with open(spec.origin, encoding='utf-8') as file:
        return file.read()
