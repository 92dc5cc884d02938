# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 sync``: reconciles the kernel with the ledger once."""

from __future__ import annotations

from typing import Any, Iterator, Optional

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0.cli import status
from kuryr_break0 import config
from kuryr_break0.engine.plan import Outcome
from kuryr_break0.engine.reconciler import Reconciler
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model


_DESCRIPTION = """\
Make break0, its routes and the containers match the ledger, and print each
item: + if it is set, - if it is deleted, ~ if it is repaired, ! if it stays
as it is. A sync cannot repair some problems, such as a wrong routing rule.
If the ledger was lost, it is rebuilt from the kernel first.

Exit status: 0 if status would find no problem now, 1 otherwise (with
--dry-run: also if there are items to change), 3 if the kernel or the state
directory refuses.
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(subparsers, 'sync', run, _DESCRIPTION)
    added.add_flag('--dry-run', 'print the changes, but make none')
    added.add_flag('--claim', 'take over break0 from another ledger')
    added.add_flag(
        '--delete-unclaimed', 'also delete routes and neighbours of '
        'kuryr-break0 that have no record and match no pod')


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Reconcile once, and print the changes; return the exit code."""
    command = conf.command
    with output.Counter('sync'):
        outcome = Reconciler(
            options, Ledger(options.state_dir)).sync(
                command.dry_run, command.claim, command.delete_unclaimed)
    after = status.read(options)
    output.show(command.output, {
        **_as_json(outcome, options),
        'problems': list(after.describe_problems())},
        [*_lines(outcome, options),
         *_remaining_lines(outcome, after, command.dry_run)])
    for err in outcome.errors:
        common.fail(common.UNREADABLE, err)
    if outcome.errors:
        return common.UNREADABLE
    return common.IN_SYNC if after.in_sync and not (
        command.dry_run and outcome) else common.DRIFT


def _remaining_lines(outcome: Outcome, after: status.Status,
                     dry_run: bool) -> Iterator[str]:
    """Yield a line for each problem that no other line shows."""
    shown: set[object] = {item.dst for item in (*outcome.foreign,
                                                *outcome.unclaimed)}
    shown.update(outcome.refused, *(
        [record.address for record in records]
        for records in (outcome.missing, outcome.unjudged)))
    if dry_run:  # a sync would remove these problems
        shown.update(name for name, _ in outcome.devices)
        shown.update(item.dst for item in (*outcome.set, *outcome.unset))
        shown.update(record.address for record in (
            *outcome.rebuilt, *outcome.gone, *outcome.released))
        shown.update(after.addresses_of(outcome.pods))
    return ('! ' + text for text in after.describe_problems(shown))


def _name_of(ifindex: Optional[int], options: config.Options) -> str:
    if ifindex == 0:
        return options.device  # break0 is not created yet
    return kernel.format_ifname(ifindex)


def _lines(outcome: Outcome, options: config.Options) -> Iterator[str]:
    for name, text in outcome.devices:
        yield '~ interface %s: %s' % (name, text)
    for record in outcome.rebuilt:
        yield '+ record %s owner %s netns %s' % (record.address,
                                                 record.owner, record.netns)
    for sign, items in (('+', outcome.set), ('-', outcome.unset),
                        ('!', outcome.foreign), ('!', outcome.unclaimed)):
        # Guard entries have no lines: the lines of interfaces count them.
        for route in model.of_kind(model.HostRoute, items):
            yield '%s %s' % (sign, names.described(
                route, _name_of(route.oif, options)))
        for each in model.of_kind(model.Neighbour, items):
            yield '%s %s' % (sign, names.described(
                each, _name_of(each.ifindex, options)))
    for record in outcome.gone:
        yield '- record %s owner %s: its sandbox is gone' % (record.address,
                                                             record.owner)
    for record, reason in outcome.released.items():
        yield '- record %s owner %s: %s' % (record.address, record.owner,
                                            reason)
    for record, reason in outcome.missing.items():
        yield '! record %s owner %s: %s' % (record.address, record.owner,
                                            reason)
    for record, reason in outcome.unjudged.items():
        yield ('! record %s owner %s: it is not known whether its sandbox '
               'exists: %s' % (record.address, record.owner_text, reason))
    for address, reason in outcome.refused.items():
        yield '! address %s: it is %s' % (address, reason)
    for owner in outcome.pods:
        yield '~ sandbox %s: neighbours and routes to the node' % owner


def _as_json(outcome: Outcome, options: config.Options) -> dict[str, Any]:
    def route(each: model.HostRoute) -> dict[str, Any]:
        return {'address': str(each.dst), 'interface_index': each.oif,
                'interface': (None if each.oif is None
                              else _name_of(each.oif, options)),
                'protocol': each.protocol, 'table': each.table,
                'source': str(each.src) if each.src else None}

    def neighbour(each: Any) -> dict[str, Any]:
        return {'address': str(each.dst), 'interface_index': each.ifindex,
                'interface': _name_of(each.ifindex, options),
                'mac': each.mac}

    def record(each: Any) -> dict[str, Any]:
        return {'address': str(each.address),
                'container_id': each.owner.container_id,
                'ifname': each.owner.ifname, 'netns': each.netns}

    return {
        'routes': {
            'set': list(map(route, model.of_kind(
                model.HostRoute, outcome.set))),
            'delete': list(map(route, model.of_kind(
                model.HostRoute, outcome.unset))),
            'foreign': list(map(route, outcome.foreign))},
        'neighbours': {
            name: list(map(neighbour, model.of_kind(model.Neighbour, items)))
            for name, items in (('set', outcome.set),
                                ('delete', outcome.unset))},
        'unclaimed': sorted({str(each.dst) for each in outcome.unclaimed}),
        'interfaces': [{'interface': name, 'repaired': text}
                       for name, text in outcome.devices],
        'pods': [str(owner) for owner in outcome.pods],
        'rebuilt': list(map(record, outcome.rebuilt)),
        'gone': list(map(record, outcome.gone)),
        **{name: [{**record(each), 'reason': reason}
                  for each, reason in getattr(outcome, name).items()]
           for name in ('released', 'missing', 'unjudged')},
        'refused': [{'address': str(address), 'reason': reason}
                    for address, reason in outcome.refused.items()],
        'errors': [str(err) for err in outcome.errors]}
