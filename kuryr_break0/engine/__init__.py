# SPDX-License-Identifier: Apache-2.0

"""Reconciles the kernel with the ledger, and reports problems.

:mod:`transitions` binds and unbinds single addresses, and :mod:`reconciler`
syncs the whole node. Both use :mod:`apply` to change routes, neighbours and
guard entries.
"""
