# SPDX-License-Identifier: Apache-2.0

"""The list of verbs and the text of --help, without slow imports."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

PROGRAM = 'kuryr-break0'


class Verb(NamedTuple):
    """A verb, described without importing its module.

    :ivar module: name of the module in kuryr_break0.cli
    :ivar summary: the description of the verb in --help
    """

    module: str
    summary: str


#: Verbs by their headings in --help, in this order.
_GROUPS = {
    'Look': {
        'status': Verb('status', 'show break0 and the bound addresses'),
        'probe': Verb('probe', 'ping a container from the node, and the node '
                      'from it'),
        'doctor': Verb('doctor', 'find faults on this node, and remedies'),
        'check': Verb('doctor', 'check whether break0 will work on this '
                      'node')},
    'Repair': {
        'sync': Verb('sync', 'repair everything once'),
        'agent': Verb('agent', 'repair everything continuously')},
    'Set up': {
        'bind': Verb('bind', 'make the addresses of a container reachable'),
        'unbind': Verb('bind', 'revert bind'),
        'adopt': Verb('adopt', 'bind pods that are already running'),
        'cleanup': Verb('cleanup', 'delete everything that kuryr-break0 has '
                        'created'),
        'cni': Verb('cni', 'run as a CNI plugin, after macvlan'),
        'cni-install': Verb('cni', 'install the CNI plugin')}}
VERBS = {name: verb for verbs in _GROUPS.values()
         for name, verb in verbs.items()}
_HEAD = """\
Enable traffic between a host and the macvlan containers or pods on its
interfaces, which the kernel blocks.

usage: kuryr-break0 COMMAND [ARGUMENT ...]
"""
_FOOT = """
The configuration is the section [break0] of kuryr.conf and kuryr-break0.conf,
each from the first of ~/.kuryr, ~, /etc/kuryr and /etc that has the file. If
neither exists: kuryr-break0.conf in ~/.kuryr-break0, ~, /etc/kuryr-break0 or
/etc.
%s
kuryr-break0 COMMAND --help explains a command. --help-all lists the options
for configuration files and logging, which come before COMMAND.
"""


def page() -> str:
    """Return the text of --help."""
    text = _HEAD
    for title, verbs in _GROUPS.items():
        text += '\n%s:\n' % title + ''.join(
            '  %-12s %s\n' % (name, verb.summary)
            for name, verb in verbs.items())
    return text + _FOOT % ''.join(
        '%s: %s\n' % (what, ' '.join(paths)) for what, paths in zip(
            ('On this host', 'Ignored'), files()) if paths)


def files() -> tuple[list[str], list[str]]:
    """Return the configuration files to read, and the ignored ones.

    Like Kuryr's programs, which use oslo.config, this function searches
    ~/.kuryr, ~, /etc/kuryr and /etc for kuryr.conf, and also for
    kuryr-break0.conf. Hosts without Kuryr have
    /etc/kuryr-break0/kuryr-break0.conf.
    """
    of_kuryr = [_find('kuryr', name) for name in ('kuryr', PROGRAM)]
    ours = [path for path in [_find(PROGRAM, PROGRAM)] if path]
    used = [path for path in of_kuryr if path] or ours
    return used, [path for path in ours if path not in used]


def _find(project: str, name: str) -> Optional[str]:
    for directory in ('~/.' + project, '~', '/etc/' + project, '/etc'):
        path = os.path.join(os.path.expanduser(directory), name + '.conf')
        if os.path.exists(path):
            return path
    return None
