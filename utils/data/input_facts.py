"""
Describe raw files for the header of a script: their sizes, encodings, and the columns of their first row.

process_belle_1M_data.py, tokenize_dataset_rows_belle.py and batch inference call it. Only the first block of a file is
read, so a header costs milliseconds however large the files are.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.common.errors import RowError
from utils.common.numbers import counted
from utils.data.raw_reader import Block, read_blocks
from utils.data.row_schema import NO_RENAMES, ColumnMap, Schema, find_schema

SHOWN_FILES = 4  # of many, so that a header stays short
MIB = 1 << 20


def describe_size(size: int) -> str:
    """
    Return a number of bytes in the unit that a person reads.

    >>> describe_size(999), describe_size(46_080), describe_size(3 << 30)
    ('999 bytes', '45.0 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size} bytes"
    for unit, bound in (("KiB", 1 << 20), ("MiB", 1 << 30)):
        if size < bound:
            return f"{size / (bound >> 10):.1f} {unit}"
    return f"{size / (1 << 30):.1f} GiB"


def size_of(path: str | os.PathLike) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    path = Path(path)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def whole_mib(size: int) -> int:
    """Return bytes as whole MiB, rounded up: the unit in which progress through files is shown."""
    return -(-size // MIB)


def describe_inputs(paths: Sequence[str], columns: ColumnMap = NO_RENAMES) -> str:
    """Return a line for each of the first files, and one for all the others together."""
    lines = [describe_input(path, columns) for path in paths[:SHOWN_FILES]]
    if others := paths[SHOWN_FILES:]:
        lines.append(f"and {counted(len(others), 'more file')} ({describe_size(sum(map(size_of, others)))})")
    return "\n".join(lines)


def describe_input(path: str, columns: ColumnMap = NO_RENAMES) -> str:
    """Return a file's name, size and encoding, and which columns of its first row are used."""
    size = describe_size(size_of(path))
    block = next(read_blocks(path), None)
    if block is None:
        return f"{path} ({size}: it has no rows)"
    compressed = ", gzip" if _is_gzip(path) else ""
    return f"{path} ({size}{compressed}, {block.encoding.upper()}, {_first_columns(block, columns)})"


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def first_schema(path: str, columns: ColumnMap = NO_RENAMES) -> Schema | None:
    """Return the schema of a file's first row; None if it has none that is known."""
    block = next(read_blocks(path), None)
    try:
        return find_schema(tuple(columns.rename(_first_row(block)))) if block and _first_row(block) else None
    except RowError:
        return None


def _first_row(block: Block) -> dict[str, Any] | None:
    """Return the block's first row that can be read."""
    return next((value for _, value in block.values() if isinstance(value, dict)), None)


def _first_columns(block: Block, columns: ColumnMap) -> str:
    """Return the used columns of the block's first row, such as "instruction + input -> output"."""
    row = _first_row(block)
    if row is None:
        return "no row that can be read"
    if "instances" in row:
        return "seed tasks"
    try:
        schema = find_schema(tuple(columns.rename(row)))
    except RowError:
        return f"no known column among {', '.join(map(str, row))}"[:80]
    own_name = dict(columns.pairs).get  # of a column that has the name of its role now
    prompts, answers = ([own_name(name, name) for name in names] for names in (schema.prompts, schema.answers))
    used = own_name(schema.chat, schema.chat) or " + ".join(prompts) + "".join(f" -> {answer}" for answer in answers)
    return " + ".join([*(name for name in schema.context if name in ("system", "history", "tools")), used])
