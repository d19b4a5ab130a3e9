"""Texts of others, names and answers among them, as a terminal may show them: none of them moves its cursor."""

import re

# C0 and C1, which begin escape sequences; what reorders or ends a line, beside \n; bytes of names that are not UTF-8
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BLANKS = {"\n": "\\n", "\t": "\\t"}


def escape_controls(text: str) -> str:
    """`text` with its control characters written out, as `\\x1b`; line feeds and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """`escape_controls` without line feeds and tabs."""
    return escape_controls(text).translate(str.maketrans(_BLANKS))
