"""Every command of the README, run as printed: only the model and the number of steps are added."""

import importlib.util
import json
import re
import shutil
from importlib.metadata import version

import pytest
from conftest import ROOT, TINY, readme_commands

DATA_FILES = {  # what the two downloads bring, in miniature
    "Belle.train.json": [{"input": "你好", "target": "你好!"}],
    "belle_open_source_1M.train.json": [{"instruction": "先说时间:", "input": "老王昨天在家里喝茶", "output": "昨天"}],
}
TAKES_MODEL = ("tokenize_dataset_rows_belle.py", "multi_gpu_fintune_belle.py", "_inference.py", "evaluate.py")
NOT_RUN_HERE = {
    "make demo": "test_demo runs what it runs",
    "make test": "is this suite",
    "pip install -r requirements.txt": "made the environment that this suite runs in",
    "pip install -r tools/requirements.txt": "the same",
}


def test_both_languages_have_the_same_commands():
    assert len(readme_commands()) >= 15
    assert readme_commands() == readme_commands("README_zh.md")


@pytest.fixture
def workspace(tmp_path):
    """A clone of what a user has, and a `wget` that brings a row in place of the hub, which cannot exist here."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".json", ".yaml"):
            shutil.copy(path, clone)
    for name in ("utils", "tools", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copytree(ROOT / "data", clone / "data", ignore=shutil.ignore_patterns("demo", "alpaca", "Belle*"))
    downloads, tools = tmp_path / "downloads", tmp_path / "bin"
    downloads.mkdir()
    tools.mkdir()
    for name, rows in DATA_FILES.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (downloads / name).write_text(lines, encoding="utf-8")
    wget = tools / "wget"
    wget.write_text(f'#!/bin/sh\ncp "{downloads}/$(basename "$1")" .\n')
    wget.chmod(0o755)
    return tmp_path


def test_commands_in_order(run_command, workspace):
    clone, ran = workspace / "clone", []
    script = ["set -e"]
    for command in readme_commands():
        if command in NOT_RUN_HERE:
            continue
        if any(name in command for name in TAKES_MODEL):
            command += f" --model_name_or_path {TINY}"
        if "multi_gpu_fintune_belle.py" in command:
            command += " --max_steps 3"
        if "evaluate.py" in command:
            command += " --max_new_tokens 8 --max_rows 4"
        if "_inference.py" in command:
            command += " --max_new_tokens 8 --overwrite"
        script.append(command)
        ran.append(command)
    (workspace / "commands.sh").write_text("\n".join(script))
    result = run_command(
        f"sh -c 'PATH={workspace}/bin:$PATH exec bash {workspace}/commands.sh'", cwd=clone, timeout=600
    ).check()
    assert len(ran) == len(readme_commands()) - len(NOT_RUN_HERE)
    assert result.out.count('"steps": 3') == sum("multi_gpu_fintune" in command for command in ran) == 3
    answering = [command for command in ran if "_inference.py" in command and "--merge_and_save" not in command]
    assert result.out.count('"rows": 8') == len(answering) == 4
    assert (clone / "output" / "merged" / "ice_text.model").is_file()
    assert (clone / "output" / "evaluation" / "report.html").is_file()
    joined = (clone / "data" / "Belle_0_1.train.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["target"] for line in joined] == ["你好!", "昨天"]
    assert (clone / "output" / "adapter_model.safetensors").is_file()


def test_length():
    assert all(
        len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 400 for name in ("README.md", "README_zh.md")
    )


def test_requirements_are_what_runs_here():
    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) == 10
    for name, pinned in pins:
        assert version(name).split("+")[0] == pinned, name
    assert importlib.util.find_spec("pkg_resources")  # cpm_kernels imports it, hence setuptools<81


def test_links_and_files_exist():
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        assert links
        for link in links:
            assert (ROOT / link.split("#")[0]).exists(), link
