# SPDX-License-Identifier: Apache-2.0

"""Programs that are run where a library does not do: nft, iptables, ip."""

from __future__ import annotations

import shutil
from typing import Optional

#: They are in none of the directories that a service or a user may search.
_DIRECTORIES = '/usr/sbin:/sbin'


def find_program(name: str) -> Optional[str]:
    """Return the path of a program; None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=_DIRECTORIES)
