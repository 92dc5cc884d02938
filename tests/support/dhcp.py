# SPDX-License-Identifier: Apache-2.0

"""A DHCP server on the LAN, and a client, both from busybox.

Other DHCP programs call setgroups(2), which the lab's user namespace forbids.
"""

from __future__ import annotations

import subprocess

CLIENT_SCRIPT = '''#!/bin/sh
case $1 in
bound|renew) ip address replace "$ip/$mask" dev "$interface" ;;
deconfig) ip -4 address flush dev "$interface" ;;
esac
'''


def serve(first: str, last: str, netns: str = 'lan',
          seconds: int = 3600) -> 'subprocess.Popen[bytes]':
    """Serve addresses of a range on the interface ``nic``."""
    open('/run/leases', 'a').close()
    with open('/run/udhcpd.conf', 'w') as file:
        file.write('start %s\nend %s\ninterface nic\nlease_file /run/leases\n'
                   'pidfile /run/udhcpd.pid\noption subnet 255.255.255.0\n'
                   'option lease %d\n' % (first, last, seconds))
    with open('/run/udhcpd.log', 'ab') as log:
        return subprocess.Popen(
            ['ip', 'netns', 'exec', netns, 'busybox', 'udhcpd', '-f',
             '/run/udhcpd.conf'], stdout=log, stderr=log)


def client(netns: str, interface: str = 'eth0') -> 'subprocess.Popen[bytes]':
    """Obtain and renew a lease until the process ends; SIGUSR2 releases it."""
    with open('/run/udhcpc.sh', 'w') as file:
        file.write(CLIENT_SCRIPT)
    subprocess.run(['chmod', '755', '/run/udhcpc.sh'], check=True)
    with open('/run/udhcpc.log', 'ab') as log:
        return subprocess.Popen(
            ['ip', 'netns', 'exec', netns, 'busybox', 'udhcpc', '-f', '-i',
             interface, '-s', '/run/udhcpc.sh', '-R'], stdout=log,
            stderr=log)
