# SPDX-License-Identifier: Apache-2.0

"""Makes the kernel equal to the ledger: transitions, syncs and their problems.

:mod:`transitions` binds and unbinds single addresses, :mod:`reconciler` syncs
the whole node. Both change routes, neighbours and guard entries by
:mod:`apply`.
"""
