# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""The entry point: runs the command, or says why it cannot be loaded."""

from __future__ import annotations

import sys

from kuryr_break0 import command
from kuryr_break0.doctor import installation
from kuryr_break0.doctor import report


def main() -> int:
    """Run ``kuryr-break0`` and return its exit code."""
    try:
        from kuryr_break0 import cli
    except ImportError as err:
        # As by a pyroute2 that is too new, of which the doctor can tell.
        return _explain(err)
    return cli.main()


def _explain(err: ImportError) -> int:
    found = list(installation.check())
    if 'doctor' in sys.argv[1:] and found:
        print((report.as_json if '--json' in sys.argv else report.as_text)(
            found))
    else:
        print('kuryr-break0: It cannot be loaded: %s. %s' % (
            err, ' '.join(each.seen for each in found)), file=sys.stderr)
    return command.USAGE


if __name__ == '__main__':
    sys.exit(main())
