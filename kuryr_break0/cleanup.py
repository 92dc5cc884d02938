# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Takes away what this package has made on the node, and only that."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, Collection, Iterator, Optional

from oslo_config import cfg

from kuryr_break0 import command
from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from kuryr_break0 import netlink
from kuryr_break0.netlink import Verb
from kuryr_break0.plan import Item
from kuryr_break0.policy import Look
from kuryr_break0.policy import parent_of
from kuryr_break0 import sandbox

_DESCRIPTION = """\
Take away all that kuryr-break0 has made on this node, and only that: its
routes and neighbours, here and in the namespaces of the pods, break0 itself
and the state directory. Pods go on running, out of reach from their node.

First see to it that nothing makes it anew: set [break0] enabled = false, or
uninstall the package, and restart kuryr-daemon; then stop the agent.

Prints each change: - for what is taken away, ! for what is left, and why.
Exits with 0 if nothing is left, 1 if something is (with --dry-run: if there
is anything to do).
"""
_EPILOG = """\
example:
  kuryr-break0 --config-file /etc/kuryr/kuryr.conf cleanup --dry-run
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'cleanup', help='take away all that was made on this node',
        description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dry-run', action='store_true',
                        help='print what there is to do, and do nothing')
    parser.set_defaults(func=_run)


def _run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    cleanup = Cleanup(options, config.link_iface(conf), conf.command.dry_run)
    code = command.IN_SYNC
    for change in cleanup.run():
        print(change)
        if change.startswith('!') or conf.command.dry_run:
            code = command.DRIFT
    return code


class Cleanup:
    """What there is to take away from the node.

    :param link_iface: the interface that Kuryr puts pods on, if configured
    :param dry_run: change nothing
    """

    def __init__(self, options: config.Options, link_iface: Optional[str],
                 dry_run: bool) -> None:
        self._options = options
        self._link_iface = link_iface
        self._dry_run = dry_run
        self._ledger = Ledger(options.state_dir, options.lock_timeout)

    def run(self) -> Iterator[str]:
        """Take it away; a line for each thing.

        All is done under the lock, and the ledger goes last: killed at any
        instruction, what is left can be cleaned up by another run.

        :raises Break0Error: if it cannot be read, or the kernel refuses
        """
        existed = self._ledger.exists()
        with contextlib.ExitStack() as stack:
            if not self._dry_run:
                stack.enter_context(self._ledger.lock())
            entries, unreadable = self._ledger.read()
            for address in unreadable:
                yield ('! entry of %s: it cannot be read, so what its pod '
                       'knows of the node stays' % address)
            namespaces = {(entry.netns, entry.owner.ifname)
                          for entry in entries
                          if entry.netns and not entry.sandbox_gone}
            for netns, ifname in sorted(namespaces):
                yield from self._pod(netns, ifname)
            yield from self._node(entries)
            if self._ledger.attended() is not None:
                yield ('! agent: it is running, and makes the state '
                       'directory again; stop it')
            if existed:
                yield '- directory %s' % self._options.state_dir
            if not self._dry_run:
                self._ledger.clear()

    def _pod(self, netns: str, ifname: str) -> Iterator[str]:
        try:
            items = sandbox.told(netns, ifname, self._options.route_protocol)
            if not self._dry_run:
                sandbox.take_back(netns, items)
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            yield '! namespace %s: %s' % (netns, err)
        else:
            for item in items:
                yield '%s namespace %s' % (
                    command.line('-', item, ifname), netns)

    def _node(self, entries: Collection[Entry]) -> Iterator[str]:
        with netlink.Kernel() as kernel:
            link = kernel.link(self._options.device)
            if link is None:
                return
            look = Look(kernel, link)
            marked: list[Item] = [*look.on_break0.values(),
                                  *look.neighbours.values()]
            items = [item for item in marked
                     if item.protocol == self._options.route_protocol]
            changes: list[netlink.Change] = [(Verb.DELETE, item)
                                             for item in items]
            errors = ([None] * len(items) if self._dry_run
                      else kernel.change(changes))
            for item, err in zip(items, errors):
                if err is not None and not err.absent:
                    raise err
                yield command.line('-', item, link.name)
            reason = self._not_ours(kernel, link, entries)
            if reason is not None:
                yield '! interface %s: %s' % (link.name, reason)
                return
            if not self._dry_run:
                kernel.delete_link(link.name)
            yield '- interface %s' % link.name

    def _not_ours(self, kernel: netlink.Kernel, link: netlink.Link,
                  entries: Collection[Entry]) -> Optional[str]:
        """Why it must not be deleted; None if it may.

        Where nothing says any more which interface the pods were on, its
        MAC address does: it is derived from that of its parent.
        """
        name = (parent_of(entries) if entries
                else self._options.parent or self._link_iface)
        known = name is not None
        if name is None:
            name = link.lower_name
        parent = kernel.link(name) if name is not None else None
        if parent is None:
            return 'it is on no interface that pods were on'
        try:
            device.require_ours(link, parent)
        except exceptions.DeviceConflict as err:
            return str(err)
        if known or link.mac in (self._options.mac, device.derived_mac(
                link.name, parent.mac)):
            return None
        return ('it may be of others: no pod is recorded, and its MAC '
                'address is not the one that it gets. If it is not, set '
                '[break0] parent to %s' % parent.name)
