# SPDX-License-Identifier: Apache-2.0

"""Find the containers of any engine by their namespaces, for the agent.

:mod:`finder` searches all namespaces of the node for macvlans, and keeps their
addresses bound. :mod:`engines` asks container engines for container names.
"""
