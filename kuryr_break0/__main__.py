# SPDX-License-Identifier: Apache-2.0

"""The entry point: runs the command, or says why it cannot be loaded."""

from __future__ import annotations

import sys

#: Of a program that Ctrl-C ended.
_INTERRUPTED = 130


def main() -> int:
    """Run ``kuryr-break0`` and return its exit code."""
    try:
        # Here, since Ctrl-C can come while they are imported.
        from kuryr_break0.cli import main as cli

        return cli.main()
    except ImportError as err:
        # As of a dependency that is too new. The doctor reports it.
        return _explain(err)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _explain(err: ImportError) -> int:
    # Nothing that imports oslo.config, which may be what is unfit.
    from kuryr_break0.cli import common
    from kuryr_break0.doctor import installation
    from kuryr_break0.doctor import report

    found = list(installation.check())
    if 'doctor' in sys.argv[1:] and found:
        print((report.as_json if '--json' in sys.argv else report.as_text)(
            found))
    else:
        print('kuryr-break0: It cannot be loaded: %s. %s' % (
            err, ' '.join(each.seen for each in found)), file=sys.stderr)
    return common.USAGE


if __name__ == '__main__':
    sys.exit(main())
