# SPDX-License-Identifier: Apache-2.0

"""Paths of the alert rules, their tests, the dashboard and their page."""

from __future__ import annotations

import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
RULES = os.path.join(ROOT, 'etc/prometheus/kuryr-break0.rules.yaml')
RULE_TESTS = os.path.join(ROOT, 'tests/prometheus/kuryr-break0.test.yaml')
DASHBOARD = os.path.join(ROOT, 'etc/grafana/kuryr-break0.json')
MONITORING = os.path.join(ROOT, 'doc/source/admin/monitoring.rst')


def read(path: str) -> str:
    with open(path) as file:
        return file.read()
