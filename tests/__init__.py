# SPDX-License-Identifier: Apache-2.0

import logging

from pyroute2 import netlink

# Kuryr's IPDB logs that it is deprecated at each use, which would hide the
# output of tests. kuryr-daemon disables this logger too.
logging.getLogger('pyroute2').setLevel(logging.ERROR)
# pyroute2 also has a leftover print() of "fail", which means no failure.
netlink.print = lambda *args: None
