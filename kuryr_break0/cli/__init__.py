# SPDX-License-Identifier: Apache-2.0

"""The command ``kuryr-break0``: one module per verb or pair of verbs."""
