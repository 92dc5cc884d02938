# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 agent``: runs the agent."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import parser
from kuryr_break0.cli import verbs
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import log

LOG = log.get_logger(__name__)


def add_parsers(subparsers: Any) -> None:
    parser.add_verb(
        subparsers, 'agent', run,
        'Run until SIGTERM. Repair break0, routes and containers when another '
        'program\nchanges them, and reconcile everything every '
        'resync_interval seconds. Serve\nmetrics and the CNI plugin, and find '
        'containers if [break0] discover is true.\nSIGHUP reads the '
        'configuration again. Exit status: 2 if the configuration is\nwrong.',
        json=False)


def _warn(conf: cfg.ConfigOpts) -> None:
    for text in config.unknown(conf):
        LOG.warning('%s. It has no effect.', text)
    used = [*(conf.config_file or ()), *(conf.config_dir or ())]
    LOG.info('The configuration is read from %s', ', '.join(used)
             or 'no file: all options have their defaults')
    if conf.config_file == verbs.files()[0]:
        for path in verbs.files()[1]:
            LOG.warning('%s is not read, because there is %s. Move its '
                        'options there, or delete that file.', path, used[0])


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Run the agent until a signal ends it."""
    def load() -> config.Options:
        # oslo.config logs the error, and returns False.
        if not conf.reload_config_files():
            raise exceptions.InvalidOption(
                option='(all)', reason='the configuration files cannot be '
                'read; the line before says why')
        _warn(conf)
        return config.load(conf)

    # Imported here, since no other verb needs the server for metrics.
    from kuryr_break0.agent.loop import Agent

    _warn(conf)
    Agent(options, load).run()
    return common.IN_SYNC
