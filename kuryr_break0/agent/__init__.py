# SPDX-License-Identifier: Apache-2.0

"""The agent repairs routes, serves metrics and answers CNI requests."""
