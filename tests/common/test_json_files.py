"""A side file that is not as expected gives one line that names the file."""

import os

import pytest

from utils.common.errors import UsageError
from utils.common.json_files import MAX_BYTES, read_json_object


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1]", "list, not a JSON object"),
        (b"null", "NoneType, not a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{}", "has no 'template'"),
        (b'{"template": 3}', "'template' is int, not str"),
    ],
)
def test_faults_of_a_file(tmp_path, content, fault):
    file = tmp_path / "side.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=fault) as caught:
        read_json_object(file, {"template": str})
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_plain_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opened, it would wait for a writer
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    for name, fault in (("fifo", "not a file"), ("none", "does not exist"), (".", "not a file"), ("sparse", "bytes")):
        with pytest.raises(UsageError, match=fault):
            read_json_object(tmp_path / name)


def test_reads_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "side.json"
    file.write_text('\ufeff{"template": "native", "more": 1}', encoding="utf-8")
    assert read_json_object(file, {"template": str, "more": (int, float)}) == {"template": "native", "more": 1}
