# SPDX-License-Identifier: Apache-2.0

"""Find the containers of any engine in the kernel, for the agent.

:mod:`finder` finds the macvlans of all namespaces of the node and keeps them
bound, :mod:`engines` asks container engines for names.
"""
