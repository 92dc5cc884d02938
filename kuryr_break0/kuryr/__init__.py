# SPDX-License-Identifier: Apache-2.0

"""All that knows of Kuryr: its driver, its API, what is private to it."""
