"""Output is safe on any terminal, whatever its encoding and whatever file names and texts contain."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from tools.demo import MARK, empty_directory
from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.common.files import atomic_writer
from utils.common.terminal import escape_controls, one_line
from utils.data.json_lines import dump_row
from utils.data.raw_reader import input_paths
from utils.data.rejections import Rejections
from utils.data.shards import shards_directory
from utils.inference.merge_export import MergeSource, merge_and_save
from utils.training.run_log import keep_log

UNDECODABLE = os.fsdecode(b"gb\xb0\xa1")  # a file name in GBK: Linux does not say in which encoding
SCREEN = "\x1b[2J\x1b]0;title\x07"  # clears the screen and sets its title


@pytest.mark.parametrize("encoding", ("gbk", "latin-1", "ascii", "utf-8", "ascii:surrogateescape"))
def test_stdout_takes_any_text(encoding):
    text = f"你好 é 😀 {UNDECODABLE}"
    code = "import utils, sys; [print(sys.argv[1], file=file) for file in (sys.stdout, sys.stderr)]"
    done = subprocess.run(
        [sys.executable, "-c", code, text],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    for printed in (done.stdout, done.stderr):
        name = encoding.split(":")[0]
        assert printed.decode(name).strip() == text.encode(name, "backslashreplace").decode(name)


def test_every_script_that_prints_imports_utils():
    """Importing utils makes its output safe."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    printing = [path for path in scripts if "print(" in path.read_text(encoding="utf-8")]
    assert len(printing) >= 12
    assert not [path for path in printing if "\nfrom utils" not in path.read_text(encoding="utf-8")]


def test_control_characters_are_escaped():
    assert escape_controls(f"a{SCREEN}b\r\x9b0m\u202ec\n\td") == "a\\x1b[2J\\x1b]0;title\\x07b\\r\\x9b0m\\u202ec\n\td"
    assert one_line("a\n\tb\u2028c") == "a\\n\\tb\\u2028c"
    assert escape_controls("你好,'😀' \\n") == "你好,'😀' \\n"


def test_a_name_of_several_lines_is_one_line(run_script, tmp_path, capsys):
    name = f"a\nerror: b{SCREEN}"
    result = run_script(f"process_belle_1M_data.py --input '{tmp_path}/{name}' --output {tmp_path}/o")
    assert result.code == 2 and result.err.count("\n") == 1 and "\x1b" not in result.err
    assert "a\\nerror: b\\x1b[2J" in result.err
    print_line(f"from {name}")
    rejections = Rejections(str(tmp_path / "out"))
    rejections.add(f"{tmp_path}/{name}", 1, SCREEN)
    rejections.report()
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and printed.err.count("\n") == 2


def test_undecodable_names_are_kept(tmp_path):
    """JSON and the log keep file names that are not UTF-8, and both can be read back."""
    with atomic_writer(tmp_path / "rows.jsonl") as file:
        file.write(dump_row({"file": UNDECODABLE}))
    rejections = Rejections(str(tmp_path / "out"))
    rejections.add(UNDECODABLE, 1, "no row")
    rejections.report()
    for path in (tmp_path / "rows.jsonl", rejections.path):
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row["file"] == UNDECODABLE
    with keep_log(str(tmp_path)):
        print_line(f"from {UNDECODABLE}")
    assert "gb\\udcb0\\udca1" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_data_under_undecodable_names(run_script, tmp_path):
    directory = tmp_path / UNDECODABLE
    directory.mkdir()
    (directory / "rows.jsonl").write_text('{"input": "你好", "target": "好"}\nno row\n', encoding="utf-8")
    run_script(
        f"tokenize_dataset_rows_belle.py --jsonl_path {directory}/rows.jsonl --save_path {directory}/tokens "
        f"--model_name_or_path {TINY} --preview 1"
    ).check()
    assert (directory / "tokens" / "state.json").is_file()


def test_weights_under_undecodable_names_are_refused(run_script, tmp_path, tokens):
    """safetensors and sentencepiece accept no such path; the fault is reported before a model loads."""
    shutil.copytree(TINY, tmp_path / UNDECODABLE)
    bad = "gb\\udcb0\\udca1: the name is not UTF-8"
    with pytest.raises(UsageError, match="the name is not UTF-8"):
        load_tokenizer(str(tmp_path / UNDECODABLE))
    flags = f"--dataset_path {tokens} --model_name_or_path {TINY} --output_dir {tmp_path}/{UNDECODABLE}"
    result = run_script(f"multi_gpu_fintune_belle.py {flags}")
    assert result.code == 2 and bad in result.err and result.err.count("\n") == 1, result.err
    with pytest.raises(UsageError, match="--merge_and_save .*: the name is not UTF-8"):
        source = MergeSource(Checkpoint.open(str(TINY)), load_tokenizer(str(TINY)), "adapter")
        merge_and_save(source, tmp_path / UNDECODABLE / "merged", None)


def test_an_existing_name_is_not_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows[1].jsonl", "rows1.jsonl", "data[1]/a.json", "data[1]/b[2].json", "data1/c.json", "d/e?.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert input_paths(["rows[1].jsonl"]) == ["rows[1].jsonl"]
    assert input_paths(["rows[12].jsonl"]) == ["rows1.jsonl"]
    assert input_paths(["data[1]/*.json"]) == ["data[1]/a.json", "data[1]/b[2].json"]
    assert input_paths([f"{tmp_path}/data[1]/[a].json"]) == [f"{tmp_path}/data[1]/a.json"]
    assert input_paths(["d/e?.json"]) == ["d/e?.json"] and input_paths(["d/*.json"]) == ["d/e?.json"]
    assert input_paths(["data?/*.json"]) == ["data1/c.json"]


def test_unfinished_work_of_other_datasets_stays(tmp_path):
    """A dataset named like a pattern removes its own unfinished work, not that of datasets that match it."""
    others = tmp_path / ".ab.key.parts"
    others.mkdir()
    (others / "lock").touch()
    with shards_directory(tmp_path / "a*", "key"):
        pass
    with shards_directory(tmp_path / "a*", "other key"):
        pass
    assert others.is_dir() and not (tmp_path / ".a*.key.parts").exists()


def test_the_demo_empties_only_its_own_directory(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="holds other files"):
        empty_directory(tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        empty_directory(tmp_path / "thesis.txt")
    for _ in range(2):
        empty_directory(tmp_path / "demo")
        (tmp_path / "demo" / "train.json").touch()
    assert (tmp_path / "thesis.txt").is_file() and (tmp_path / "demo" / MARK).is_file()
