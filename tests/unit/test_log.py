# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import logging
import unittest

from oslo_config import cfg
from oslo_log import formatters
from oslo_log import log as oslo_logging

from kuryr_break0 import exceptions
from kuryr_break0 import log


class TestLog(unittest.TestCase):

    def setUp(self) -> None:
        conf = cfg.ConfigOpts()
        oslo_logging.register_options(conf)
        conf([], default_config_files=[])
        self.stream = io.StringIO()
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(formatters.ContextFormatter(config=conf))
        logger = logging.getLogger('kuryr_break0.test')
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        logger.propagate = False

    def lines(self, logger: logging.LoggerAdapter[logging.Logger],
              exc_info: bool = False) -> list[str]:
        try:
            raise exceptions.ParentNotFound(parent='eth7')
        except exceptions.ParentNotFound as err:
            logger.error('Not bound: %s', err, exc_info=exc_info)
        return self.stream.getvalue().splitlines()

    def test_the_reason_is_said_once(self) -> None:
        line, = self.lines(log.get_logger('kuryr_break0.test'))
        self.assertEqual(1, line.count('eth7'), line)
        self.assertIn(' ERROR kuryr_break0.test [-] Not bound: ', line)
        self.assertNotIn('ParentNotFound', line)

    def test_by_oslo_log_it_is_said_twice(self) -> None:
        """oslo.log alone repeats the error, so our logger is needed."""
        line, = self.lines(oslo_logging.getLogger('kuryr_break0.test'))
        self.assertEqual(2, line.count('eth7'), line)

    def test_a_traceback_is_kept(self) -> None:
        lines = self.lines(log.get_logger('kuryr_break0.test'), True)
        self.assertIn('Traceback (most recent call last):', lines[1])
        self.assertIn('ParentNotFound', '\n'.join(lines[1:]))

    def test_levels_below_are_logged_too(self) -> None:
        logging.getLogger('kuryr_break0.test').setLevel(logging.INFO)
        log.get_logger('kuryr_break0.test').info('one %s', 'line')
        self.assertIn('one line', self.stream.getvalue())
