# SPDX-License-Identifier: Apache-2.0

"""Check that Kuryr finds and loads the driver, in supported versions.

Nothing that needs the kernel is imported at the top, so that this works
also if an unsupported version cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Iterator
import warnings

from packaging import requirements

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding

_DISTRIBUTION = 'kuryr-break0'
#: What is required for Kuryr alone. Where none of the first two is installed,
#: the package was installed for CNI, by etc/cni/requirements.txt.
_KURYR = ('kuryr-kubernetes', 'os-vif', 'oslo.concurrency',
          'oslo.versionedobjects', 'stevedore', 'cotyledon')
#: What setup.cfg registers, by the names that Kuryr and os-vif look for.
_ENTRY_POINTS = (('kuryr_kubernetes.cni.binding', 'VIFMacvlanBreak0',
                  'kuryr_break0.kuryr.driver'),
                 ('os_vif', 'kuryr_break0',
                  'kuryr_break0.kuryr.os_vif_plugin'))


def check() -> Iterator[Finding]:
    """Examine the Python environment of this process."""
    unfit = list(_unfit())
    if unfit:
        yield findings.DEPENDENCY_UNFIT.found(
            '; '.join('%s is %s, but %s is needed' % (
                each.name, found or 'not installed',
                str(each.specifier) or 'any version')
                for each, found in unfit),
            python=sys.executable, requirements=' '.join(
                "'%s%s'" % (each.name, each.specifier) for each, _ in unfit))
        return  # what follows would only say the same in other words
    if not is_for_kuryr():
        return
    for group, name, module in _ENTRY_POINTS:
        yield from _check_entry_point(group, name, module)


def is_for_kuryr() -> bool:
    """Return whether Kuryr is in this Python environment."""
    return any(map(_version, _KURYR[:2]))


def _unfit() -> Iterator[tuple[requirements.Requirement, str]]:
    """Return the requirements that are not met, with the present version."""
    try:
        wanted = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return  # it has no entry points either
    for text in wanted:
        requirement = requirements.Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if requirement.name in _KURYR and not is_for_kuryr():
            continue
        found = _version(requirement.name)
        if not found or not requirement.specifier.contains(
                found, prereleases=True):
            yield requirement, found


def _version(name: str) -> str:
    """Return the version of a distribution; empty if not installed."""
    # Before Python 3.10, oslo.config is not found as oslo_config is.
    for spelling in (name, _normalized(name)):
        try:
            return importlib.metadata.version(spelling)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ''


def _check_entry_point(group: str, name: str,
                       module: str) -> Iterator[Finding]:
    found = [each for each in _entry_points(group) if each.name == name]
    if len(found) != 1:
        yield findings.ENTRY_POINT_MISSING.found(
            '%s has %d entry points named %s, where there must be one, for '
            '%s' % (group, len(found), name, sys.executable),
            python=sys.executable)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Kuryr's imports warn
            found[0].load()
    except Exception as err:  # whatever its import raises
        yield findings.DRIVER_BROKEN.found(
            'the entry point %s of %s does not load: %s: %s' % (
                name, group, type(err).__name__, err),
            python=sys.executable, module=module)


def _entry_points(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    """Find entry points like stevedore, without writing its cache.

    Of a distribution that is there twice, the first hides the other.
    """
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = _normalized(distribution.metadata['Name'])
        if name not in seen:
            seen.add(name)
            yield from (each for each in distribution.entry_points
                        if each.group == group)


def _normalized(name: str) -> str:
    return re.sub('[-_.]+', '_', name or '').lower()
