# SPDX-License-Identifier: Apache-2.0

"""Finds what is wrong with a node, why it matters, and what to do."""
