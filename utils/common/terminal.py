"""
What reaches a terminal: names and answers without control characters, one-line errors, and outputs that closed.

Used wherever text that somebody else wrote is printed; no such text may move the cursor or start an escape sequence.
"""

import contextlib
import os
import re
import sys
from typing import IO

# C0 and C1 controls, which begin escape sequences; Unicode's line ends and text direction marks; lone surrogates,
# which stand for bytes of a file name that are not UTF-8.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED_BLANKS = {"\n": "\\n", "\t": "\\t"}


def escape_controls(text: str) -> str:
    """Return `text` with control characters written as `\\x1b`; line feeds and tabs stay."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Return `text` with control characters, line feeds and tabs written as `\\x1b`, `\\n`, `\\t`."""
    return escape_controls(text).translate(str.maketrans(_ESCAPED_BLANKS))


def print_to_stderr(line: str) -> None:
    """Write a line to stderr; safe in a signal handler, and where the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: {line}\n".encode(errors="replace"))


def drop_closed_outputs() -> None:
    """Redirect stdout and stderr to nowhere if they are closed: a terminal that is gone, a `tee` that ended."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop_output(stream)


def drop_output(stream: IO[str]) -> None:
    """Redirect `stream`, and what it has buffered, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
