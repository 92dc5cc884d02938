# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 agent``: runs the agent."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

from kuryr_break0.agent.loop import Agent
from kuryr_break0.cli import common
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import log

LOG = log.get_logger(__name__)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'agent', help='repair at once what other programs change',
        description='Run until SIGTERM. Repair break0, routes and pods when '
                    'another program changes them, and reconcile everything '
                    'every resync_interval seconds. Serve metrics and the '
                    'CNI plugin, and find containers if [break0] discover is '
                    'true. SIGHUP reads the configuration again.')
    parser.set_defaults(func=run)


def _warn(conf: cfg.ConfigOpts) -> None:
    for text in config.unknown(conf):
        LOG.warning('%s. It has no effect.', text)


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Run the agent until a signal ends it."""
    def load() -> config.Options:
        # It says what was wrong in the log, and returns False.
        if not conf.reload_config_files():
            raise exceptions.InvalidOption(
                option='(all)', reason='the configuration files cannot be '
                'read; the line before says why')
        _warn(conf)
        return config.load(conf)

    _warn(conf)
    Agent(options, load).run()
    return common.IN_SYNC
