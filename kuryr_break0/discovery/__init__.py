# SPDX-License-Identifier: Apache-2.0

"""Discovery: the agent finds the containers of any engine by their namespaces.

:mod:`finder` searches all namespaces of the node for macvlans, and keeps the
addresses of the macvlans bound. :mod:`engines` asks container engines for the
names of containers.
"""
