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

"""The command ``kuryr-break0``."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any, Optional, Sequence

from oslo_config import cfg
from oslo_log import log as logging
import prettytable

from kuryr_break0 import adopt
from kuryr_break0.agent import Agent
from kuryr_break0 import by_hand
from kuryr_break0 import cleanup
from kuryr_break0 import command
from kuryr_break0.command import DRIFT
from kuryr_break0.command import IN_SYNC
from kuryr_break0.command import UNREADABLE
from kuryr_break0.command import USAGE
from kuryr_break0 import config
from kuryr_break0.doctor import command as doctor
from kuryr_break0 import exceptions
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import netlink
from kuryr_break0 import probe
from kuryr_break0 import status as status_of


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand and return its exit code."""
    conf = cfg.ConfigOpts()
    logging.register_options(conf)
    conf.set_default('use_stderr', True)  # stdout is for what was asked
    conf.register_cli_opt(cfg.SubCommandOpt(
        'command', title='commands', handler=_add_subcommands))
    try:
        # kuryr.conf is where Kuryr's own programs look for it.
        conf(sys.argv[1:] if argv is None else argv, project='kuryr',
             prog='kuryr-break0',
             version=importlib.metadata.version('kuryr-break0'))
        logging.setup(conf, 'kuryr-break0')
        if conf.command.func is not _agent and not conf.debug:
            logging.getLogger(None).logger.setLevel(logging.WARNING)
        # The doctor looks at invalid options too.
        args = [conf] if conf.command.func is doctor.run else [
            conf, config.load(conf)]
    except (cfg.Error, exceptions.InvalidOption, OSError) as err:
        # OSError is of a log file, or of oslo.config's --shell_completion,
        # whose template its package lacks.
        return command.fail(USAGE, err)
    try:
        status: int = conf.command.func(*args)
        return status
    except exceptions.Break0Error as err:
        return command.fail(UNREADABLE, err)


def _add_subcommands(subparsers: Any) -> None:
    status = subparsers.add_parser(
        'status', help='show break0 and the pod addresses behind it',
        description='Show break0 and the pod addresses behind it. Exits '
                    'with 0 if each address has its route and each route '
                    'its pod, 1 if not, 2 for wrong usage or configuration, '
                    '3 if the kernel or the state directory cannot be read.')
    status.add_argument('--json', action='store_true',
                        help='print JSON instead of tables')
    status.set_defaults(func=_status)
    doctor.add_parser(subparsers)
    sync = subparsers.add_parser(
        'sync', help='make break0 and the routes what they should be',
        description='Make break0 and the routes what the ledger says, and '
                    'print each change: + for a route that is set, - for one '
                    'that is deleted, ! for one of others that is in the '
                    'way. Exits with 0 if all is as it should be afterwards, '
                    '1 if not (with --dry-run: if there is anything to do).')
    sync.add_argument('--dry-run', action='store_true',
                      help='print what there is to do, and do nothing')
    sync.add_argument('--json', action='store_true',
                      help='print JSON instead of a diff')
    sync.set_defaults(func=_sync)
    agent = subparsers.add_parser(
        'agent', help='keep break0 and the routes what they should be',
        description='Run until SIGTERM, repair break0 and the routes when '
                    'something changes them, and look at all of them every '
                    'resync_interval seconds. SIGHUP reads the configuration '
                    'again.')
    agent.set_defaults(func=_agent)
    adopt.add_parser(subparsers)
    by_hand.add_parsers(subparsers)
    cleanup.add_parser(subparsers)
    probe.add_parser(subparsers)


def _agent(conf: cfg.ConfigOpts, options: config.Options) -> int:
    def load() -> config.Options:
        conf.reload_config_files()
        return config.load(conf)

    Agent(load).run()
    return IN_SYNC


def _sync(conf: cfg.ConfigOpts, options: config.Options) -> int:
    plan = Break0Manager(options).sync(dry_run=conf.command.dry_run)
    routes = (('set', '+', plan.replace), ('delete', '-', plan.delete),
              ('foreign', '!', plan.foreign))
    neighbours = (('set', '+', plan.learn), ('delete', '-', plan.forget))

    def name_of(ifindex: Optional[int]) -> str:
        if ifindex == 0:
            return options.device  # which is to be created
        return netlink.name_of(ifindex)

    if conf.command.json:
        print(json.dumps({
            'routes': {name: [{
                'address': str(route.dst), 'interface_index': route.oif,
                'interface': (None if route.oif is None
                              else name_of(route.oif)),
                'protocol': route.protocol, 'table': route.table,
                'source': str(route.src) if route.src else None}
                for route in some] for name, _, some in routes},
            'neighbours': {name: [{
                'address': str(each.dst), 'interface_index': each.ifindex,
                'interface': name_of(each.ifindex),
                'mac': each.mac} for each in some]
                for name, _, some in neighbours}}, indent=2))
    else:
        for _, sign, some in routes:
            for route in some:
                print(command.line(sign, route, name_of(route.oif)))
        for _, sign, others in neighbours:
            for each in others:
                print(command.line(sign, each, name_of(each.ifindex)))
    left = plan.foreign or (conf.command.dry_run and plan)
    return DRIFT if left else IN_SYNC


def _status(conf: cfg.ConfigOpts, options: config.Options) -> int:
    status = status_of.read(options)
    if conf.command.json:
        print(json.dumps(_as_json(status), indent=2))
    else:
        _print_tables(status, options.device)
    return IN_SYNC if status.in_sync else DRIFT


def _as_json(status: status_of.Status) -> dict[str, Any]:
    link = status.link
    return {
        'in_sync': status.in_sync,
        'device': None if link is None else {
            'name': link.name, 'index': link.index, 'kind': link.kind,
            'mode': link.mode, 'parent_index': link.lower,
            'parent': link.lower_name, 'mac': link.mac, 'mtu': link.mtu,
            'up': link.up,
            'addresses': [str(each) for each in status.link_addresses]},
        'host_addresses': [str(each) for each in status.peer.addresses]
        if status.peer else [],
        'addresses': [_address_as_json(each) for each in status.addresses],
        'totals': _totals(status)}


def _address_as_json(each: status_of.AddressStatus) -> dict[str, Any]:
    entry = each.entry
    return {
        'address': str(each.address),
        'container_id': entry.owner.container_id if entry else None,
        'ifname': entry.owner.ifname if entry else None,
        'pod': entry.pod if entry else None,
        'netns': entry.netns if entry else None,
        'routed': each.route is not None,
        'neighbour': each.neighbour.mac if each.neighbour else None,
        'problem': each.problem, 'in_sync': each.problem is None}


def _totals(status: status_of.Status) -> dict[str, int]:
    return {'bound': sum(each.entry is not None
                         for each in status.addresses),
            'routed': sum(each.route is not None
                          for each in status.addresses),
            'out_of_sync': sum(each.problem is not None
                               for each in status.addresses)}


def _print_tables(status: status_of.Status, device: str) -> None:
    link = status.link
    if link is None:
        print('There is no %s yet: it comes with the first pod.' % device)
    else:
        table = prettytable.PrettyTable(
            ['Device', 'Kind', 'Parent', 'MAC', 'MTU', 'Addresses', 'State'])
        table.add_row([
            link.name, '%s %s' % (link.kind or 'physical', link.mode or ''),
            link.lower_name or '-', link.mac, link.mtu,
            ' '.join(map(str, status.link_addresses)) or 'unnumbered',
            'up' if link.up else 'down'])
        print(table)
    table = prettytable.PrettyTable(
        ['Address', 'Owner', 'Route', 'Neighbour', 'In sync'])
    for each in status.addresses:
        table.add_row([
            each.address, each.entry.owner if each.entry else 'nobody',
            'yes' if each.route else '-',
            each.neighbour.mac if each.neighbour else '-',
            'no: ' + each.problem if each.problem else 'yes'])
    print(table)
    print('%(bound)d bound, %(routed)d routed, %(out_of_sync)d out of sync'
          % _totals(status))
