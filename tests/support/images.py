# SPDX-License-Identifier: Apache-2.0

"""Images with busybox, for container engines that have no registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile

#: The commands of busybox in the image.
_TOOLS = ('cat', 'hostname', 'httpd', 'ip', 'mkdir', 'nc', 'ping', 'sh',
          'sleep')


def rootfs(directory: str) -> str:
    """Return the path of a root directory with busybox; create it if needed.

    :param directory: the parent directory
    """
    path = os.path.join(directory, 'rootfs')
    if not os.path.isdir(path):
        os.makedirs(path + '/bin')
        shutil.copy('/bin/busybox', path + '/bin')
        for name in _TOOLS:
            os.symlink('busybox', path + '/bin/' + name)
    return path


def tar(directory: str) -> str:
    """Make a tar archive of the root directory; return the archive's path."""
    path = os.path.join(directory, 'rootfs.tar')
    with tarfile.open(path, 'w') as archive:
        archive.add(rootfs(directory), '.')
    return path


def saved(directory: str, name: str, *command: str) -> str:
    """Make an archive like docker save, for containerd; return its path.

    :param name: the name of the image, with its tag
    :param command: the command of its containers
    """
    with open(tar(directory), 'rb') as file:
        layer = file.read()
    config = json.dumps({
        'architecture': 'amd64' if os.uname().machine == 'x86_64'
        else 'arm64', 'os': 'linux', 'config': {'Cmd': command},
        'rootfs': {'type': 'layers', 'diff_ids': [
            'sha256:' + hashlib.sha256(layer).hexdigest()]}}).encode()
    manifest = json.dumps([{'Config': 'config.json', 'RepoTags': [name],
                            'Layers': ['layer.tar']}]).encode()
    path = os.path.join(directory, 'saved.tar')
    with tarfile.open(path, 'w') as archive:
        for member, content in (('layer.tar', layer), ('config.json', config),
                                ('manifest.json', manifest)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
