# SPDX-License-Identifier: Apache-2.0

"""Adapts remedies to the host: its configuration file and its services."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex

from oslo_config import cfg

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor import installation

_AGENT = 'kuryr-break0-agent'
#: A part of remedies that is left out on hosts without Kuryr.
_OF_KURYR = ', and kuryr-daemon if there is one'


@dataclasses.dataclass(frozen=True)
class Host:
    """The properties of a host on which remedies depend.

    :ivar file: the configuration file in use, or the one to create
    :ivar has_units: whether the agent is a service of systemd
    """

    file: str
    has_kuryr: bool
    has_units: bool

    @classmethod
    def of(cls, conf: cfg.ConfigOpts) -> Host:
        has_kuryr = installation.is_for_kuryr()
        files = getattr(conf, 'config_file', None) or [
            '/etc/kuryr/kuryr.conf' if has_kuryr
            else '/etc/kuryr-break0/kuryr-break0.conf']
        return cls(files[-1], has_kuryr,
                   os.path.isdir('/run/systemd/system') and not has_kuryr)

    @property
    def start(self) -> str:
        """Return the command that starts the agent."""
        if self.has_units:
            return 'systemctl enable --now ' + _AGENT
        return 'kuryr-break0 %sagent' % (
            '--config-file %s ' % self.file if os.path.exists(self.file)
            else '')

    def set(self, **values: str) -> list[str]:
        """Return commands that set options and restart the agent."""
        try:
            with open(self.file) as file:
                text = file.read()
        except OSError:
            text = ''
        path = shlex.quote(self.file)
        directory = os.path.dirname(os.path.abspath(self.file))
        commands = [] if os.path.isdir(directory) else [
            'mkdir -p ' + shlex.quote(directory)]
        for name, value in values.items():
            line = '%s = %s' % (name, value)
            if re.search(r'(?m)^\s*%s\s*=' % name, text):
                commands.append("sed -i 's|^ *%s *=.*|%s|' %s" % (
                    name, line, path))
            elif re.search(r'(?m)^\[break0\]', text):
                commands.append("sed -i '/^\\[break0\\]/a %s' %s" % (
                    line, path))
            else:
                commands.append("printf '\\n[break0]\\n%s\\n' >> %s" % (
                    line, path))
                text += '\n[break0]\n'
        return commands + self._restart()

    def unset(self, name: str) -> list[str]:
        """Return commands that remove an option and restart the agent."""
        return ["sed -i '/^ *%s *=/d' %s" % (name, shlex.quote(self.file)),
                *self._restart()]

    def _restart(self) -> list[str]:
        return ['systemctl restart ' + _AGENT] if self.has_units else []

    def advised(self, finding: Finding) -> Finding:
        """Return a finding with the file and the services of this host."""
        remedy = finding.remedy.replace('kuryr.conf', self.file)
        return dataclasses.replace(
            finding, remedy=remedy if self.has_kuryr
            else remedy.replace(_OF_KURYR, ''))
