# SPDX-License-Identifier: Apache-2.0

"""The command ``kuryr-break0``: a module for each verb, or pair of verbs."""
