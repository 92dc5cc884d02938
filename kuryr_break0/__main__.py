# SPDX-License-Identifier: Apache-2.0

"""Entry point of the command ``kuryr-break0``."""

from __future__ import annotations

import sys

#: The exit code of a program that was interrupted by Ctrl-C.
_INTERRUPTED = 130


def main() -> int:
    """Run ``kuryr-break0`` and return its exit code."""
    try:
        # Ctrl-C may interrupt the import too.
        from kuryr_break0.cli import main as cli

        return cli.main()
    except ImportError as err:
        # A dependency may be missing or have an unsupported version.
        return _explain(err)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _explain(err: ImportError) -> int:
    import re

    # Do not import oslo.config here: it may be the broken dependency.
    from kuryr_break0.cli import common
    from kuryr_break0.cli import output
    from kuryr_break0.doctor import installation
    from kuryr_break0.doctor import report

    findings = list(installation.check())
    if 'doctor' in sys.argv[1:] and findings:
        # The parser of the command line needs oslo.config, so search for the
        # output format here.
        forms = re.findall(r'(?m)^(?:--|-o|--output=)?(json|yaml)$',
                           '\n'.join(sys.argv[1:]))
        output.show(forms[-1] if forms else None, report.as_json(findings),
                    [report.as_text(findings)])
    else:
        print('kuryr-break0: The command cannot be loaded: %s. %s' % (
            err, ' '.join(each.observed for each in findings)),
            file=sys.stderr)
    return common.USAGE


if __name__ == '__main__':
    sys.exit(main())
