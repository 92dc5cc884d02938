# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 cleanup``: deletes everything that kuryr-break0 created."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any, Iterable, Iterator, NamedTuple, Optional

from oslo_config import cfg

from kuryr_break0.break0.guard import Guard
from kuryr_break0.break0 import podside
from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine.apply import apply
from kuryr_break0.engine.apply import Work
from kuryr_break0.engine import rebuild
from kuryr_break0.engine import snapshot
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model

_DESCRIPTION = """\
Delete everything that kuryr-break0 has created on this node, and nothing
else: its routes and neighbours, on the node and in pods, break0, its nftables
tables, and the state directory. Pods keep running, but their node cannot
reach them.

First set [break0] enabled = false or uninstall the package, and restart
kuryr-daemon. Otherwise kuryr-daemon creates break0 again. Then stop the agent.

It prints each item: - if the item is deleted, ! if it is left, with the
reason. Exit status: 0 if no item is left, 1 otherwise (with --dry-run: if
there are items to delete).
"""
_EPILOG = """\
example:
  kuryr-break0 --config-file /etc/kuryr/kuryr.conf cleanup --dry-run
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(subparsers, 'cleanup', _run, _DESCRIPTION, _EPILOG)
    added.add_flag('--dry-run', 'print the changes, but make none')


def _run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    cleanup = Cleanup(options, config.read_link_iface(conf),
                      conf.command.dry_run)
    removals: list[Removal] = []
    try:
        for removal in cleanup.run():
            removals.append(removal)
            if not conf.command.output:
                output.write((output.Wrong if removal.reason else str)(
                    removal))
    finally:
        if conf.command.output:
            output.write_document({
                'removed': [each.what for each in removals if not each.reason],
                'left': [each._asdict() for each in removals if each.reason]
            }, conf.command.output)
    if conf.command.dry_run:
        return common.DRIFT if removals else common.IN_SYNC
    return (common.DRIFT if any(each.reason for each in removals)
            else common.IN_SYNC)


class Removal(NamedTuple):
    """An item that is deleted or left.

    :ivar what: the item, as its kind and its name
    :ivar reason: the reason why the item is left; None if it is deleted
    """

    what: str
    reason: Optional[str] = None

    def __str__(self) -> str:
        return ('- %s' % self.what if self.reason is None
                else '! %s: %s' % self)


@dataclasses.dataclass
class Cleanup:
    """Deletes everything that kuryr-break0 created on the node.

    :ivar link_iface: Kuryr's option for the parent of pods, if it is set
    :ivar dry_run: change nothing
    """

    options: config.Options
    link_iface: Optional[str]
    dry_run: bool

    def run(self) -> Iterator[Removal]:
        """Delete all items, and yield each item when it is deleted or left.

        The lock is held from the first change to the last; a dry run does
        not take it. The ledger is deleted last: if a run is killed, the next
        run finds the remaining items.

        :raises Break0Error: if the ledger cannot be read, or the kernel
            refuses
        """
        options = self.options
        ledger = Ledger(options.state_dir)
        existed = ledger.exists()
        with contextlib.ExitStack() as stack:
            netlink = stack.enter_context(kernel.Netlink())
            current = actual.read(options, ledger, netlink)
            # The records of some bound pods may be lost. Rebuild them.
            records = list(rebuild.find(options, current, [
                parent for parent in current.parents.values()
                if parent.ownership is not Ownership.OTHER]))
            if not self.dry_run:
                stack.enter_context(ledger.lock())
                current = actual.read(options, ledger, netlink, 0)
            for address in current.contents.unreadable:
                yield Removal(
                    'record of %s' % address, 'it cannot be read, so its pod '
                    'keeps the routes and neighbours for the node. Restart '
                    'the pod')
            records += itertools.chain(*current.contents.claims.values())
            for record in self._interfaces(current, records):
                yield from self._pod(record)
            for parent in current.parents.values():
                yield from self._node(
                    netlink, parent, Guard(options, ledger, parent.device))
            if ledger.heartbeat.age() is not None:
                yield Removal('agent', 'it is running, and will create the '
                              'state directory again. Stop it, and repeat '
                              'the cleanup')
            if existed:
                yield Removal('directory %s' % options.state_dir)
            if not self.dry_run:
                ledger.clear()

    @staticmethod
    def _interfaces(current: Snapshot, records: Iterable[model.Record]
                    ) -> list[model.Record]:
        """Return one record for each interface in an existing namespace.

        Pods behind the break0 of another ledger are left out: that ledger
        still needs their routes and neighbours.
        """
        by_interface = {}
        parents = {parent.name for parent in current.parents.values()
                   if parent.ownership is Ownership.OTHER}
        for record in records:
            if (record.netns is not None and record not in current.gone
                    and record.parent not in parents):
                by_interface[record.netns, record.owner.ifname] = record
        return [by_interface[key] for key in sorted(by_interface)]

    def _pod(self, record: model.Record) -> Iterator[Removal]:
        try:
            items = podside.withdraw(record, self.options,
                                     dry_run=self.dry_run)
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            yield Removal('namespace %s' % record.netns, str(err))
        else:
            for item in items:
                yield Removal('%s namespace %s' % (names.described(
                    item, record.owner.ifname), record.netns))

    def _node(self, netlink: kernel.Netlink, parent: Parent,
              guarding: Guard) -> Iterator[Removal]:
        link = parent.present
        if link is None:
            return
        # This check precedes all changes: if break0 belongs to another
        # ledger, the pods of that ledger need all items of this break0.
        reason = self._not_ours(parent)
        if reason is not None:
            yield Removal('interface %s' % link.name, reason)
            return
        items = snapshot.items_of(parent, self.options.route_protocol)
        works = [Work(address, unset=tuple(some)) for address, some
                 in model.by_address(items).items()]
        errors = {} if self.dry_run else apply(netlink, guarding, works).errors
        for err in errors.values():
            raise err
        for item in items:
            yield Removal(names.described(item, link.name))
        # The table is deleted before break0: if this run is killed, the next
        # run finds the table only through break0.
        if guarding.is_loaded() or guarding.is_there():
            if not self.dry_run:
                guarding.remove()
            yield Removal('table netdev %s' % guarding.table)
        if not self.dry_run:
            netlink.delete_link(link.name)
        yield Removal('interface %s' % link.name)

    def _not_ours(self, parent: Parent) -> Optional[str]:
        """Return the reason against deleting an interface, or None.

        An interface with a name conflict, or of another ledger, is not ours.
        Any other interface is ours if pods are recorded on its parent, if it
        has the alias of a break0, or if its parent is configured.
        """
        if parent.conflict is not None:
            return str(parent.conflict)
        if parent.ownership is Ownership.OTHER and parent.other:
            return 'it belongs to the ledger %s in %s' % parent.other
        if (parent.live or parent.ownership is not Ownership.UNMARKED
                or parent.name in (self.options.parent, self.link_iface)):
            return None
        return ('it may belong to another program: no pod is recorded on it, '
                'and it lacks the alias of a break0. If kuryr-break0 created '
                'it, set [break0] parent to %s' % parent.name)
