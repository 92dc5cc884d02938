# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 agent``: runs the agent."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import parser
from kuryr_break0.cli import verbs
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import readers
from kuryr_break0 import log

LOG = log.get_logger(__name__)


def add_parsers(subparsers: Any) -> None:
    parser.add_verb(
        subparsers, 'agent', run,
        'Run until SIGTERM. Repair break0, routes and containers when another '
        'program\nchanges them, and reconcile everything every '
        'resync_interval seconds. Serve\nmetrics and the CNI plugin. If '
        '[break0] discover is true, bind containers\nthat are found on the '
        'host. SIGHUP reloads the configuration. Exit status: 2 if\nthe '
        'configuration is wrong.',
        json=False)


def _warn(conf: cfg.ConfigOpts) -> None:
    for text in config.list_unknown(conf):
        LOG.warning('%s. It has no effect: correct its name or delete it.',
                    text)
    used = [*(conf.config_file or ()), *(conf.config_dir or ())]
    LOG.info('Read the configuration from %s', ', '.join(used)
             or 'no file: all options have their defaults')
    if conf.config_file == verbs.files()[0]:
        for path in verbs.files()[1]:
            LOG.warning('%s is not read, because %s exists. Move all options '
                        'into one of these files, and delete the other one.',
                        path, used[0])


def _find_new_files(conf: cfg.ConfigOpts) -> None:
    """Search the default files again: one may be newer than the agent.

    If a file of the last search no longer exists, change nothing. The reload
    then fails, and the agent keeps its options.
    """
    if all(map(os.path.exists, conf.default_config_files)):
        conf.default_config_files = verbs.files()[0]
        conf.set_default('config_file', conf.default_config_files)


def _store(conf: cfg.ConfigOpts, options: config.Options) -> None:
    """Store the agent's version, the time, and a digest of its options."""
    ledger = Ledger(options.state_dir)
    with contextlib.suppress(exceptions.LedgerUnavailable):
        ledger.prepare()
    readers.store(ledger, readers.AGENT, readers.describe(conf))


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Run the agent until a signal ends it."""
    def load() -> config.Options:
        _find_new_files(conf)
        # If a file is wrong, oslo.config logs the error and returns False.
        if not conf.reload_config_files():
            raise exceptions.InvalidOption(
                option='(all)', reason='the configuration files cannot be '
                'read; see the log line before this one')
        _warn(conf)
        loaded = config.load(conf)
        _store(conf, loaded)
        return loaded

    # Imported here, since no other verb needs the server for metrics.
    from kuryr_break0.agent.loop import Agent

    _warn(conf)
    _store(conf, options)
    Agent(options, load).run()
    return common.IN_SYNC
