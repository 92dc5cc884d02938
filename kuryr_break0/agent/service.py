# SPDX-License-Identifier: Apache-2.0

"""Tells the service manager about the state of the agent.

oslo.service has such a function, but Debian's package of oslo.service requires
eventlet and a web server.
"""

from __future__ import annotations

import os
import socket

from kuryr_break0 import log

LOG = log.get_logger(__name__)


def notify_ready() -> None:
    """Tell systemd that the agent has started (sd_notify(3)).

    Child processes do not inherit the variable of the socket. Without a
    service manager, the function does nothing.
    """
    address = os.environ.pop('NOTIFY_SOCKET', '')
    if not address:
        return
    if address.startswith('@'):  # an abstract socket, see unix(7)
        address = '\0' + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM
                           | socket.SOCK_CLOEXEC) as notifier:
            notifier.sendto(b'READY=1', address)
    except OSError as err:
        LOG.warning('Cannot tell systemd by $NOTIFY_SOCKET, %s, that the '
                    'agent has started: %s', address.replace('\0', '@'), err)
