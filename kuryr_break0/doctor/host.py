# SPDX-License-Identifier: Apache-2.0

"""Adapts remedies to the host: its configuration file and its services."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import sys
from typing import Iterator, Optional

from oslo_config import cfg

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor import installation

_AGENT = 'kuryr-break0-agent'
_DAEMON = 'kuryr-daemon'
#: Directories of unit files (systemd.unit(5)).
_UNITS = ('/etc/systemd/system', '/run/systemd/system',
          '/usr/local/lib/systemd/system', '/usr/lib/systemd/system',
          '/lib/systemd/system')
#: The sentence in remedies by which programs read the options again: its text
#: in findings.txt, and its text on hosts without Kuryr.
_RELOAD = ('Then reload the agent, and restart kuryr-daemon if there is one.',
           'Then reload the agent.')
#: A phrase in other remedies, which is left out on hosts without Kuryr.
_OF_KURYR = ', and kuryr-daemon if there is one'
#: A sentence in remedies that is only for hosts with Kuryr, or only for hosts
#: without Kuryr.
_FOR_ONE = re.compile(r'(With|Without) Kuryr, (\w)([^ ]*(?: .*?)?\.)'
                      r'(?: (?=[A-Z])|$)')
#: A command of kuryr-break0 that reads the configuration.
_PROGRAM = re.compile(r'\bkuryr-break0 (?=[a-z])')
#: The service of systemd in the path of a control group.
_SERVICE = re.compile(r'/((?!user@)[^/\n]+\.service)(?=[/\n])')
_KUBECTL = 'kubectl --namespace kube-system '


@dataclasses.dataclass(frozen=True)
class Host:
    """The properties of a host that determine its remedies.

    :ivar file: the configuration file in use, or the one to create
    :ivar has_units: whether systemd manages the host
    :ivar arguments: options of kuryr-break0 that name configuration files,
        each followed by a blank; empty if these are the default files
    :ivar daemon_set: in a pod, the DaemonSet of the agent
    """

    file: str
    has_kuryr: bool
    has_units: bool
    arguments: str = ''
    daemon_set: Optional[str] = None

    @classmethod
    def of(cls, conf: cfg.ConfigOpts) -> Host:
        has_kuryr = installation.is_for_kuryr()
        used = getattr(conf, 'config_file', None) or []
        named = [] if used == (getattr(conf, 'default_config_files', None)
                               or []) else used
        return cls(
            (used or ['/etc/kuryr/kuryr.conf' if has_kuryr
                      else '/etc/kuryr-break0/kuryr-break0.conf'])[-1],
            has_kuryr, os.path.isdir('/run/systemd/system'),
            ''.join('--config-file %s ' % shlex.quote(os.path.abspath(each))
                    for each in named if os.path.exists(each)),
            ('kuryr-cni-ds' if has_kuryr else 'break0')
            if os.environ.get('KUBERNETES_SERVICE_HOST') else None)

    @property
    def start(self) -> str:
        """Return the command that starts the agent."""
        if self.daemon_set is not None:
            return self._roll_out()
        if self._has_unit() and not self.arguments:
            return 'systemctl enable --now ' + _AGENT
        return 'kuryr-break0 %sagent' % self.arguments

    @property
    def restart(self) -> str:
        """Return the command that restarts the agent."""
        if self.daemon_set is not None:
            return self._roll_out()
        pid = _agent()
        unit = (_unit_of(pid) if pid else None) or (
            _AGENT if self._has_unit() else None)
        if self.has_units and unit:
            return 'systemctl restart ' + unit
        return 'kill %s; %s' % (pid, self.start) if pid else self.start

    @property
    def restart_daemon(self) -> str:
        """Return the command that restarts kuryr-daemon."""
        if self.daemon_set is not None:
            return self._roll_out()
        units = [_unit_of(pid) for pid, _, _ in installation.daemons()]
        return 'systemctl restart ' + (next(filter(None, units), None)
                                       or _DAEMON)

    @property
    def upgrade(self) -> str:
        """Return the command that installs another version of the package."""
        if self.daemon_set is not None:
            return _KUBECTL + 'rollout undo daemonset/' + self.daemon_set
        if 'dist-packages' in __file__ and __file__.startswith('/usr/lib/'):
            return 'apt-get install ./kuryr-break0_*_all.deb'
        return '%s -m pip install --upgrade ./kuryr-break0' % sys.executable

    def _roll_out(self) -> str:
        return '%srollout restart daemonset/%s' % (_KUBECTL, self.daemon_set)

    def _has_unit(self) -> bool:
        return self.has_units and any(os.path.exists(
            '%s/%s.service' % (each, _AGENT)) for each in _UNITS)

    def reload(self) -> list[str]:
        """Return commands that make all programs read the options again."""
        if self.daemon_set is not None:
            return [self._roll_out()]
        daemon = [self.restart_daemon] if self.has_kuryr and (
            self.has_units) else []
        pid = _agent()
        unit = (_unit_of(pid) if pid else None) or (
            _AGENT if self._has_unit() and not self.arguments else None)
        if self.has_units and unit:
            return ['systemctl reload-or-restart ' + unit, *daemon]
        return ['kill -HUP %s' % pid, *daemon] if pid else daemon

    def set(self, **values: str) -> list[str]:
        """Return commands that set options and make programs read them."""
        if self.daemon_set is not None:
            return [self._set_variables(*(
                '%s=%s' % (name, value) for name, value in values.items()))]
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
        return commands + self.reload()

    def unset(self, name: str) -> list[str]:
        """Return commands that remove an option."""
        if self.daemon_set is not None:
            return [self._set_variables(name + '-')]
        return ["sed -i '/^ *%s *=/d' %s" % (name, shlex.quote(self.file)),
                *self.reload()]

    def _set_variables(self, *changes: str) -> str:
        return '%sset env daemonset/%s %s' % (
            _KUBECTL, self.daemon_set, ' '.join(
                'OS_BREAK0__' + re.sub(r'^\w+', lambda name: name[0].upper(),
                                       each) for each in changes))

    def advised(self, finding: Finding) -> Finding:
        """Return a finding whose remedy has this host's file and services."""
        remedy = _FOR_ONE.sub(self._choose, finding.remedy).strip()
        commands = [_PROGRAM.sub('kuryr-break0 ' + self.arguments, each)
                    if '--config-file' not in each else each
                    for each in finding.commands]
        if _RELOAD[0] in remedy:
            reload = [each for each in self.reload() if each not in commands]
            if any(each.startswith(_KUBECTL) for each in commands):
                reload = []
            # If a sentence follows the reload, the commands are for that
            # sentence, so they follow the reload too.
            is_last = not remedy.partition(_RELOAD[0])[2].startswith(' Then ')
            commands = [*commands, *reload] if is_last else [
                *reload, *commands]
        remedy = remedy.replace('kuryr.conf', self.file)
        return dataclasses.replace(
            finding, commands=tuple(commands), remedy=remedy
            if self.has_kuryr else remedy.replace(*_RELOAD).replace(
                _OF_KURYR, ''))

    def _choose(self, sentence: re.Match[str]) -> str:
        if (sentence[1] == 'With') != self.has_kuryr:
            return ''
        return '%s%s ' % (sentence[2].upper(), sentence[3])


def _agent() -> Optional[int]:
    """Return the process id of the agent in this network namespace."""
    for pid, args in _processes():
        if args[-1] == 'agent' and any(
                os.path.basename(each) == 'kuryr-break0'
                for each in args[:2]):
            with contextlib.suppress(OSError):
                if os.path.samefile('/proc/%d/ns/net' % pid,
                                    '/proc/self/ns/net'):
                    return pid
    return None


def _processes() -> Iterator[tuple[int, list[str]]]:
    for pid in sorted(map(int, filter(str.isdigit, os.listdir('/proc')))):
        with contextlib.suppress(OSError):  # the process ended
            with open('/proc/%d/cmdline' % pid, errors='replace') as file:
                yield pid, file.read().rstrip('\0').split('\0')


def _unit_of(pid: int) -> Optional[str]:
    """Return the systemd service that a process belongs to, or None."""
    with contextlib.suppress(OSError), open('/proc/%d/cgroup' % pid) as file:
        units = _SERVICE.findall(file.read())
        return units[-1] if units else None
    return None
