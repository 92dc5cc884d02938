# SPDX-License-Identifier: Apache-2.0

"""Containers that nobody tells of: found in the kernel, by the agent.

:mod:`finder` finds the macvlans of all namespaces of the node and keeps them
bound, :mod:`engines` asks container engines for names.
"""
