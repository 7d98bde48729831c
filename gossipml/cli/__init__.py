"""The command line: `gossipml`. Thin; each command's work is done where its subject lives.

Importing this package must stay cheap (`gossipml --help` answers in under 0.3 s), so the command modules import
trio, numpy and the daemon inside their functions.
"""

from __future__ import annotations

import os
import sys

from gossipml.errors import GossipmlError


def main() -> None:
    """The entry point. Exit status: 0 done, 1 failed, 2 wrong usage; an error is one paragraph, no traceback."""
    from gossipml.cli.app import app, is_verbose

    try:
        app()
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        cause = _cause(error)
        if isinstance(cause, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(cause, BrokenPipeError):  # `gossipml ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if isinstance(cause, GossipmlError):
            _fail(str(cause))
        if is_verbose():
            raise
        _fail(
            f"unexpected {type(cause).__name__}: {cause}. This is a fault of gossipml; `gossipml -v ...` shows where, "
            "please report it"
        )


def _cause(error: BaseException) -> BaseException:
    """What happened, out of the groups that nurseries wrap it in: an interrupt first, then an error with a remedy."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_cause(inner) for inner in error.exceptions]
    for kind in (KeyboardInterrupt, GossipmlError):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    return causes[0]


def _fail(message: str) -> None:
    print(f"gossipml: {message}", file=sys.stderr)
    sys.exit(1)
