# SPDX-License-Identifier: Apache-2.0

"""The agent: repairs what others change, and serves metrics."""
