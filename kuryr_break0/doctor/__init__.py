# SPDX-License-Identifier: Apache-2.0

"""The diagnosis of a node: faults, their effects and their remedies."""
