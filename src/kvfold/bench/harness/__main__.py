"""lm_eval's own command with kvfold's class in it: `python -m kvfold.bench.harness run --model kvfold ...`.

The plain `lm_eval` command cannot find a class outside its package, so this one brings it. All options, tables and
output files are lm_eval's.
"""

import sys

from kvfold.errors import KvfoldError


def main() -> int:
    """Run lm_eval's command line; what kvfold refuses is one line and code 2."""
    from lm_eval.__main__ import cli_evaluate

    import kvfold.bench.harness.model  # noqa: F401  (registers the class)

    try:
        cli_evaluate()
    except KvfoldError as error:
        print("kvfold:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
