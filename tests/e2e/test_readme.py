"""The README's commands run as printed, with only a model and a number of steps added; its links exist."""

import importlib.util
import json
import re
import shutil
from importlib.metadata import version

import pytest
from conftest import ROOT, TINY, readme_commands

DATA_FILES = {  # the two downloads, with one row each
    "Belle.train.json": [{"input": "你好", "target": "你好!"}],
    "belle_open_source_1M.train.json": [{"instruction": "先说时间:", "input": "老王昨天在家里喝茶", "output": "昨天"}],
}
TAKES_MODEL = ("tokenize_dataset_rows_belle.py", "multi_gpu_fintune_belle.py", "_inference.py", "evaluate.py")
NOT_RUN_HERE = {
    "make demo": "test_demo.py runs it",
    "make test": "runs this suite",
    "pip install -r requirements.txt": "installs what this suite runs with",
    "pip install -r tools/requirements.txt": "the same",
}


def test_both_languages_have_the_same_commands():
    assert len(readme_commands()) >= 15
    assert readme_commands() == readme_commands("README_zh.md")


@pytest.fixture
def workspace(tmp_path):
    """A clone as a user has it, and a `wget` that copies a row instead of downloading from the hub."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".json", ".yaml"):
            shutil.copy(path, clone)
    for name in ("utils", "tools", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copytree(ROOT / "data", clone / "data", ignore=shutil.ignore_patterns("demo", "alpaca", "Belle*"))
    downloads, programs = tmp_path / "downloads", tmp_path / "bin"
    downloads.mkdir()
    programs.mkdir()
    for name, rows in DATA_FILES.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (downloads / name).write_text(lines, encoding="utf-8")
    wget = programs / "wget"
    wget.write_text(f'#!/bin/sh\ncp "{downloads}/$(basename "$1")" .\n')
    wget.chmod(0o755)
    return tmp_path


def test_the_commands_run_in_order(run_command, workspace):
    clone, commands = workspace / "clone", []
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
        commands.append(command)
    (workspace / "commands.sh").write_text("\n".join(script))
    result = run_command(
        f"sh -c 'PATH={workspace}/bin:$PATH exec bash {workspace}/commands.sh'", cwd=clone, timeout=600
    ).check()
    assert len(commands) == len(readme_commands()) - len(NOT_RUN_HERE)
    assert result.out.count('"steps": 3') == sum("multi_gpu_fintune" in command for command in commands) == 3
    answering = [command for command in commands if "_inference.py" in command and "--merge_and_save" not in command]
    assert result.out.count('"rows": 8') == len(answering) == 4
    assert (clone / "output" / "merged" / "ice_text.model").is_file()
    assert (clone / "output" / "evaluation" / "report.html").is_file()
    joined = (clone / "data" / "Belle_0_1.train.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["target"] for line in joined] == ["你好!", "昨天"]
    assert (clone / "output" / "adapter_model.safetensors").is_file()


def test_readmes_are_under_400_lines():
    assert all(
        len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 400 for name in ("README.md", "README_zh.md")
    )


def test_the_pinned_versions_are_installed():
    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) == 10
    for name, pinned in pins:
        assert version(name).split("+")[0] == pinned, name
    assert importlib.util.find_spec("pkg_resources")  # cpm_kernels imports it, hence setuptools<81


def test_links_between_documents_exist():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    links = [
        (document, link)
        for document in documents
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(documents) > 10 and len(links) > 30
    broken = [
        f"{document.name}: {link}" for document, link in links if not (document.parent / link.split("#")[0]).exists()
    ]
    assert not broken
