# SPDX-License-Identifier: Apache-2.0

"""The parts of a break0: its device, its guard, and the pod sides.

Each module configures one part. The engine decides which addresses a break0
has.
"""
