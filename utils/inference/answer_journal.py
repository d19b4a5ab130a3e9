"""
The journal of batch inference: a record a line, each with a checksum.

Damage costs only the records that it hits. A line is `{"checksum": "HASH", ` and the rest of a JSON object; HASH is
that of the bytes after it. The first record has the format's "version", the command's "settings" and, for messages,
the "paths" of its model and adapters; each other one is an answer, with the hash of the settings as "settings" and the
hash of its row as "row". Called by utils/inference/answer_writer.py. sqlite3 would save some lines, but locks badly on
NFS, cannot be read by eye, and leaves N databases to merge.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.common.files import UNENCODABLE
from utils.data.json_lines import dump_row

JOURNAL_VERSION = 2  # of journals and of the finished output's marker; the first version had no number
RECORD_PREFIX = b'{"checksum": "'  # begins each record; inside a JSON string its quotes would be escaped
HASH_DIGITS = 16  # hexadecimal: 64 bits tell damaged records from whole ones


def hash_of(*chunks: bytes) -> str:
    """Return HASH_DIGITS hexadecimal digits of the chunks' BLAKE2b."""
    return hashlib.blake2b(b"".join(chunks), digest_size=HASH_DIGITS // 2).hexdigest()


@dataclass
class JournalContent:
    """What a journal holds. `records` are answers with "settings" and "row", their hashes."""

    settings: dict[str, Any] | None = None  # None if the record with the settings is damaged
    paths: dict[str, Any] = field(default_factory=dict)  # of model and adapters, for messages
    records: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    usable: bool = True  # False for another kind of file, or a journal of another version


def encode_record(row: dict[str, Any]) -> bytes:
    """Return `row` as a line of a journal."""
    body = dump_row(row)[1:-1].encode("utf-8", UNENCODABLE)
    return RECORD_PREFIX + f'{hash_of(body)}", '.encode() + body + b"\n"


def read_journal(path: Path) -> JournalContent:
    """Read the whole records of a journal, and count the damaged ones."""
    content, data = JournalContent(), path.read_bytes()
    body_start = len(RECORD_PREFIX) + HASH_DIGITS + len(b'", ')
    for line in split_objects(data, RECORD_PREFIX):
        body, checksum = line[body_start:], line[len(RECORD_PREFIX) :][:HASH_DIGITS]
        row = None
        if line.startswith(RECORD_PREFIX) and checksum == hash_of(body).encode():
            row = parse_json(b"{" + body)
        if not isinstance(row, dict):
            content.damaged += 1
        elif isinstance(row.get("settings"), dict):
            content.settings, content.paths = row["settings"], row.get("paths") or {}
        elif isinstance(row.get("settings"), str) and type(row.get("index")) is int:
            content.records.append(row)
        else:
            content.damaged += 1
    # A journal that was cut in its first record is usable too: it begins as one.
    content.usable = bool(content.records) or data[: len(RECORD_PREFIX)] == RECORD_PREFIX[: len(data)]
    return content


def split_objects(data: bytes, prefix: bytes) -> Iterator[bytes]:
    """
    Yield the JSON objects of a file of one object a line.

    Each object begins with `prefix`: so two are told apart although the newline between them is damaged.
    """
    for line in data.split(b"\n"):
        first, *others = line.split(prefix)
        if first.strip():
            yield first
        for other in others:
            yield prefix + other[: other.rfind(b"}") + 1]


def parse_json(data: bytes) -> Any:
    """Return the JSON value in `data`; None if there is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
