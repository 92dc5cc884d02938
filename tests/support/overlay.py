# SPDX-License-Identifier: Apache-2.0

"""The overlay of etc/kubernetes, built with an operator's commands."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any, Optional

import yaml

ROOT = str(pathlib.Path(__file__).parents[2])
OVERLAY = os.path.join(ROOT, 'etc', 'kubernetes')
#: The DaemonSet that Kuryr's generator creates for Docker or containerd.
BASE = os.path.join(ROOT, 'tests', 'support', 'data', 'cni_ds.yml')
AGENT = 'kuryr-break0-agent'
#: The mounts of the host's /proc, which the generator omits for CRI-O.
_PROC = {'mount': {'name': 'proc', 'mountPath': '/host_proc'},
         'volume': {'name': 'proc', 'hostPath': {'path': '/proc'}}}


def base(crio: bool = False) -> dict[str, Any]:
    """Return Kuryr's own DaemonSet."""
    with open(BASE) as file:
        daemon_set: dict[str, Any] = yaml.safe_load(file)
    if crio:
        spec = daemon_set['spec']['template']['spec']
        spec['containers'][0]['volumeMounts'].remove(_PROC['mount'])
        spec['volumes'].remove(_PROC['volume'])
    return daemon_set


def build(onto: Optional[dict[str, Any]] = None,
          uncommented: str = '') -> dict[str, dict[str, Any]]:
    """Build the overlay with ``kubectl kustomize``; return objects by kind.

    :param onto: Kuryr's DaemonSet; by default base()
    :param uncommented: the beginning of a commented line in
        kustomization.yaml; the block from this line to the next empty line is
        uncommented
    """
    with tempfile.TemporaryDirectory() as directory:
        for name in os.listdir(OVERLAY):
            shutil.copy(os.path.join(OVERLAY, name), directory)
        with open(os.path.join(directory, 'cni_ds.yml'), 'w') as file:
            yaml.safe_dump(onto or base(), file)
        path = os.path.join(directory, 'kustomization.yaml')
        with open(path) as file:
            text = file.read()
        if uncommented:
            before, line, after = text.partition('# ' + uncommented)
            assert line, 'no such line: ' + uncommented
            indent = before[before.rindex('\n') + 1:]
            block, blank, rest = after.partition('\n\n')
            text = (before + uncommented
                    + block.replace('\n%s# ' % indent, '\n' + indent)
                    + blank + rest)
        with open(path, 'w') as file:
            file.write(text)
        built = subprocess.run(['kubectl', 'kustomize', directory],
                               capture_output=True, text=True)
    if built.returncode:
        raise AssertionError('kubectl kustomize:\n' + built.stderr)
    found = {}
    for document in yaml.safe_load_all(built.stdout):
        assert document['kind'] not in found, built.stdout
        found[document['kind']] = document
    return found


def patched(daemon_set: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a DaemonSet after ``kubectl patch`` with a file of the overlay.

    :param name: the name of the file
    """
    with open(os.path.join(OVERLAY, name)) as file:
        done = subprocess.run(
            ['kubectl', 'patch', '--local', '--filename', '-', '--output',
             'yaml', '--patch', file.read()], text=True,
            input=yaml.safe_dump(daemon_set), capture_output=True)
    if done.returncode:
        raise AssertionError('kubectl patch:\n' + done.stderr)
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def without_kuryr() -> dict[str, Any]:
    """Return the DaemonSet of etc/cni."""
    with open(os.path.join(ROOT, 'etc', 'cni', 'daemonset.yaml')) as file:
        daemon_set: dict[str, Any] = yaml.safe_load(file)
    return daemon_set


def container(daemon_set: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a container of a DaemonSet, by name."""
    spec = daemon_set['spec']['template']['spec']
    found, = (each for each
              in [*spec.get('initContainers', ()), *spec['containers']]
              if each['name'] == name)
    return dict(found)


def volumes(daemon_set: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the volumes of a DaemonSet, by name."""
    listed = daemon_set['spec']['template']['spec']['volumes']
    found = {each['name']: each for each in listed}
    assert len(found) == len(listed), listed
    return found
