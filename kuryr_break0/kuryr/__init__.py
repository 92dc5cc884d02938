# SPDX-License-Identifier: Apache-2.0

"""All code that depends on Kuryr: drivers, API client, patches."""
