# SPDX-License-Identifier: Apache-2.0

"""The CNI plugin break0, to be chained behind macvlan.

:mod:`request` reads what a runtime asks for, :mod:`plugin` does it. It runs
in the agent, which the shim in C asks by its socket, or in a process of its
own. Source of all of it: the CNI specification, 0.3.1 to 1.1.0.
"""

#: The directories in which runtimes find plugins: the usual one, then those of
#: the packages of Debian and of Fedora.
PLUGIN_DIRS = ('/opt/cni/bin', '/usr/lib/cni', '/usr/libexec/cni')
