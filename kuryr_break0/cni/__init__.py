# SPDX-License-Identifier: Apache-2.0

"""The CNI plugin break0, which is chained after macvlan.

:mod:`request` parses the requests of a runtime, and :mod:`plugin` executes
them. The plugin runs in a process of its own, or in the agent. In the second
case, the runtime starts the shim in C, which sends the request to the agent's
socket. The plugin implements the CNI specification 0.3.1 to 1.1.0.
"""

#: The directories of CNI plugins: the usual directory, and the directories in
#: the packages of Debian and Fedora.
PLUGIN_DIRS = ('/opt/cni/bin', '/usr/lib/cni', '/usr/libexec/cni')
