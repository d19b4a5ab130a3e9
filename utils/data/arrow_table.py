"""
Maps the Arrow files of a dataset into memory as one table, and refuses files whose numbers are wrong.

utils/data/arrow_reader.py calls it for datasets of any origin. `datasets.load_from_disk` believes what a file says of
itself: an offset outside its buffer, or more rows than the file has bytes, ends the process or reads memory that is
not the file's. So numbers are checked against bytes first, and no side file decides anything.
"""

import struct
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa

from utils.common.errors import UsageError

STREAM_END = bytes.fromhex("ffffffff00000000")  # Arrow takes a file that was cut between two batches for a whole one


def read_table(files: Sequence[Path], columns: Collection[str]) -> tuple[pa.Table, list[str]]:
    """
    Map Arrow stream files of one schema into memory.

    Args:
        columns: the columns to take; the files may lack some of them. The others are not checked.

    Returns:
        The table, and the names of the other columns.

    Raises:
        UsageError: a file is absent, no Arrow stream, cut, compressed, or has other columns than the first; or a
            column's numbers contradict each other or the file's size.
    """
    tables = []
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is not a file" if file.exists() else f"{file} does not exist")
        try:
            table, others = _read_file(file, columns)
        except (pa.ArrowException, OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
            raise UsageError(f"{file} is damaged ({' '.join(str(error).split())[:200]})") from None
        tables.append(table)
        if not table.schema.equals(tables[0].schema):
            raise UsageError(f"{file} has other columns than {files[0]}")
    return pa.concat_tables(tables), others


def _read_file(file: Path, columns: Collection[str]) -> tuple[pa.Table, list[str]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(size - len(STREAM_END), 0))
        if stream.read() != STREAM_END:
            raise ValueError("it is cut, or not an Arrow stream")
    with pa.memory_map(str(file)) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type != "schema" and _is_compressed(message):
                raise ValueError("it is compressed, which no dataset is")
    source = pa.memory_map(str(file))
    with pa.ipc.open_stream(source) as reader:
        table = reader.read_all().replace_schema_metadata(None)
    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"it has two columns {sorted(twice)[0]}")
    table = table.select([name for name in names if name in columns])
    table.validate(full=True)
    # A type without buffers, such as null or lists of 0 items, could claim any number of rows.
    if table.num_rows > size or table.nbytes > size:
        raise ValueError(f"it claims {table.num_rows:,} rows in {size:,} bytes")
    return table, [name for name in names if name not in columns]


def _is_compressed(message: pa.Message) -> bool:
    """
    Whether a batch's buffers are compressed, so that a small file could fill all memory.

    Format: Apache Arrow's format/Message.fbs, tables Message, DictionaryBatch and RecordBatch, as FlatBuffers.
    """
    content = memoryview(message.metadata)

    def follow(position: int) -> int:
        return position + struct.unpack_from("<I", content, position)[0]

    def field(table: int, number: int) -> int | None:
        vtable = table - struct.unpack_from("<i", content, table)[0]
        size = struct.unpack_from("<H", content, vtable)[0]
        entry = 4 + 2 * number
        offset = struct.unpack_from("<H", content, vtable + entry)[0] if entry < size else 0
        return table + offset if offset else None

    header = field(follow(0), 2)
    if header is None:
        return False
    batch = follow(header)
    if message.type == "dictionary":
        data = field(batch, 1)
        if data is None:
            return False
        batch = follow(data)
    return field(batch, 3) is not None
