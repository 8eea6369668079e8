"""What every command shares: options, --config files, and errors in one line.

A command is `main(argv=None)`; `options.run(main)` turns what it raises into one line on standard
error and an exit status: 2 for what the user can mend, 1 for causes outside.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "runs"
RECIPES = ROOT / "recipes"


class UserError(Exception):
    """Something the user did, in one line with the remedy; exit status 2."""

    status = 2


class OutsideError(UserError):
    """Something that failed outside (disk, network, a peer), in one line; exit status 1."""

    status = 1


def run(main, argv=None) -> int:
    """Call main(argv) and return the exit status; the known failures become one line each."""
    try:
        main(argv)
    except UserError as error:
        # Every process of a run meets a user's mistake alike: the first one says it.
        if error.status != 2 or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def nearest(word: str, known) -> str:
    """' (did you mean x?)' for a misspelt word, or '' where nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
