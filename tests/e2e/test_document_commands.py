"""
Every shell command and Python snippet of the documents runs, or stands in NOT_RUN with why and when it last was run.

The README's bash blocks run as printed, in one shell and by their launchers. What other blocks and documents have
beyond them runs document by document, in this process or in forked ones, which saves importing the libraries again.
"""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Result, accelerate_variables
from documents import Code, blocks, commands, documents, on_a_free_port, readme_commands

DATA_FILES = {  # the two downloads, with one row each
    "Belle.train.json": [{"input": "你好", "target": "你好!"}],
    "belle_open_source_1M.train.json": [{"instruction": "先说时间:", "input": "老王昨天在家里喝茶", "output": "昨天"}],
}
ROWS = (ROOT / "data" / "sample.train.json").read_text(encoding="utf-8")
OWN_FILES = {  # files of a reader's own, by the names that documents give them
    "my_rows.jsonl": ROWS,
    "my_prompts.txt": "先说时间:老王昨天在家里喝茶\n你好\n",
    "data/belle_0.5M/Belle_open_source_0.5M.json": ROWS,
}
SUITE = "this suite"
# A part of a command or snippet -> why no test runs it, and when a person last ran it or what else does.
NOT_RUN = {
    "make demo": ("takes minutes", "tests/e2e/test_demo.py"),
    "make test": ("would run itself", SUITE),
    "make lint": ("makes an environment", SUITE),
    "pytest ": ("would run itself", SUITE),
    "pip install -r": ("makes the environment that this suite runs in", SUITE),
    "pip install modelscope": ("needs a package index", "never"),
    "pip wheel -r": ("needs a package index", "never"),
    "pip install --no-index": ("needs the wheels of the command before", "never"),
    "modelscope download": ("needs a hub", "never"),
    "from modelscope import": ("needs a hub", "never"),
    "hf download": ("needs a hub", "never"),
    "rsync -a": ("needs two machines", "never"),
    "ip -br addr": ("needs iproute2", "2026-11-30"),
    "source .venv/bin/activate": ("changes the shell alone", SUITE),
    "--adapter_path output --web": ("serves until it is stopped", "tests/tools/test_chat.py"),
    "--quantize fp8": ("needs a Hopper GPU", "2026-11-30"),
    "benchmarks/inference_throughput.py --shape chatglm3-6b --job 2000": ("needs a GPU", "2026-11-30"),
    "benchmarks/data_throughput.py": ("takes an hour", "2026-11-27"),
    "--master_addr 10.0.0.1": ("needs two machines", "2026-11-30, by tests/faults/two_nodes.py"),
    "--rdzv_endpoint 10.0.0.1": ("needs two machines", "2026-11-30, by tests/faults/two_nodes.py"),
    "--main_process_ip 10.0.0.1": ("needs two machines", "2026-11-30, by tests/faults/two_nodes.py"),
    "vllm serve": ("needs vLLM and a GPU", "never"),
    "sglang.launch_server": ("needs SGLang and a GPU", "never"),
    "curl http://localhost:8000": ("needs a server of the two above", "never"),
    "GLM4_HF = Generation(": ("is a row of utils/models/family.py", "tests/models/test_generation_table.py"),
}
# Programs that a document may run beside the scripts: nothing here installs, downloads or leaves the workspace.
SHELL_PROGRAMS = ("cd", "cat", "cp", "echo", "export", "head", "iconv", "ls", "mkdir", "printf", "tail", "wc", "wget")
# Script -> flags added, which win over the same flags before them: as few steps, rows and tokens as show that the
# command runs, and other settings than those of the answers that a command before it left.
ADDED = {
    "multi_gpu_fintune_belle.py": "--max_steps 3",
    "chatglm_deepspeed_inference.py": "--max_new_tokens 8 --overwrite",
    "chatglm_milti_gpu_inference.py": "--max_new_tokens 8 --overwrite",
    "tools/evaluate.py": "--max_new_tokens 8 --max_rows 4",
    "tools/chat.py": "--max_new_tokens 8",
}
# In place of the default, which the hub has, or of a model of one's own.
MODEL = "--model_name_or_path data/chatglm-tiny"
TAKE_MODEL = (*ADDED, "tokenize_dataset_rows_belle.py", "tools/doctor.py")
TRAINING = "multi_gpu_fintune_belle.py"  # --save_strategy no: a directory with a run of other rows is refused
TYPED = "你好\n/quit\n"  # into a script that asks
SCRIPT = re.compile(r"(?:^|\s)((?:tools/|benchmarks/|tests/faults/)?\w+\.py)(?=\s|$)")


def why_not_run(text: str) -> str | None:
    """Return the key of NOT_RUN that a command or snippet has."""
    return next((part for part in NOT_RUN if part in text), None)


def with_added_flags(command: str) -> str:
    """Return the command with the embedded checkpoint, if it has another or none, and with the flags of ADDED."""
    if not (script := SCRIPT.search(command)):
        return command
    added = [MODEL] if script[1] in TAKE_MODEL and MODEL not in command else []
    return " ".join([command, *added, *filter(None, [ADDED.get(script[1])])])


def make_workspace(directory: Path) -> Path:
    """Return a clone as a user has it, beside a `wget` that copies a row instead of downloading from the hub."""
    clone = directory / "clone"
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".json", ".yaml"):
            shutil.copy(path, clone)
    for name in ("utils", "tools", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copytree(ROOT / "data", clone / "data", ignore=shutil.ignore_patterns("demo", "alpaca", "Belle*"))
    for name, text in OWN_FILES.items():
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(text, encoding="utf-8")
    downloads, programs = directory / "downloads", directory / "bin"
    downloads.mkdir()
    programs.mkdir()
    for name, rows in DATA_FILES.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (downloads / name).write_text(lines, encoding="utf-8")
    wget = programs / "wget"
    wget.write_text(f'#!/bin/sh\ncp "{downloads}/$(basename "$1")" .\n')
    wget.chmod(0o755)
    return clone


def run_in_shell(run_command, clone: Path, lines: list[str]) -> Result:
    """Run the lines in one bash, which the first failure ends."""
    script = clone.parent / "commands.sh"
    script.write_text("\n".join(["set -e", *lines]), encoding="utf-8")
    return run_command(f"sh -c 'PATH={clone.parent}/bin:$PATH exec bash {script}'", cwd=clone, timeout=1200)


def test_the_commands_of_the_readme_run_in_order(run_command, tmp_path):
    clone = make_workspace(tmp_path)
    run = [on_a_free_port(with_added_flags(command)) for command in readme_commands() if not why_not_run(command)]
    result = run_in_shell(run_command, clone, run).check()
    trained = [command for command in run if "multi_gpu_fintune" in command]
    assert result.out.count('"steps": 3') == len(trained) >= 3
    answering = [command for command in run if "_inference.py" in command and "--merge_and_save" not in command]
    assert result.out.count('"rows": 8') == len(answering) >= 3
    assert (clone / "output" / "merged" / "ice_text.model").is_file()
    assert (clone / "output" / "evaluation" / "report.html").is_file()
    joined = (clone / "data" / "Belle_0_1.train.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["target"] for line in joined] == ["你好!", "昨天"]
    assert (clone / "output" / "adapter_model.safetensors").is_file()
    record = json.loads((clone / "output" / "run.json").read_text(encoding="utf-8"))  # of the last training
    words = {Path(word).name for word in shlex.split(record["launcher_command"])}
    assert record["launcher"] == "DDP" and {"torchrun", "--nproc_per_node=2"} <= words


BEFORE = (
    "cp ../downloads/Belle.train.json ../downloads/belle_open_source_1M.train.json data",
    "python process_belle_1M_data.py",
    "cat data/Belle.train.json data/Belle_1M.train.json > data/Belle_0_1.train.json",
    "python tokenize_dataset_rows_belle.py --jsonl_path data/alpaca_data.jsonl --save_path data/alpaca",
    "python tokenize_dataset_rows_belle.py --jsonl_path my_rows.jsonl --save_path data/mine",
    "python multi_gpu_fintune_belle.py --dataset_path data/alpaca --output_dir output",
)


class Runner:
    """Runs commands in a clone as their launchers would, in processes that have imported the libraries."""

    def __init__(self, clone: Path, run_script, run_ranks, run_command):
        self.clone, self.run_script, self.run_ranks, self.run_command = clone, run_script, run_ranks, run_command

    def run(self, command: str) -> Result:
        """Run a command with what ADDED and MODEL say; fail where it is neither a script's nor a shell's."""
        command = with_added_flags(command)
        launcher = command.split()[0]
        if launcher in SHELL_PROGRAMS or command.startswith("python -c"):
            return run_in_shell(self.run_command, self.clone, [command])
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py")), None)
        assert script and not re.search(r"\s(\||>|<|&&|;)", command), f"neither run nor listed in NOT_RUN: {command}"
        before, flags = words[1 : words.index(script)], words[words.index(script) :]
        flags += ["--save_strategy", "no"] if script == TRAINING else []
        if launcher == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stdin", io.StringIO(TYPED))
                return self.run_script(shlex.join(flags), cwd=self.clone)
        assert launcher in ("torchrun", "accelerate", "deepspeed"), f"neither run nor listed in NOT_RUN: {command}"
        files = before[before.index("--config_file") + 1] if "--config_file" in before else None
        variables = accelerate_variables(str(ROOT / files)) if files else {}
        return self.run_ranks(2, shlex.join(flags), cwd=self.clone, **variables)


NAMES = [str(document.relative_to(ROOT)) for document in documents()]


def without_model(command: str) -> str:
    """Return the command without its model, in which the documents of two languages differ."""
    return re.sub(r" --model_name_or_path \S+", "", command)


def remaining(name: str) -> list[Code]:
    """Return the commands of a document that no document before it has."""
    seen = set(map(without_model, readme_commands()))
    for document in documents():
        own = {without_model(command.text): command for command in commands(document)}
        new = [command for text, command in own.items() if text not in seen]
        if document == ROOT / name:
            return [command for command in new if not why_not_run(command.text)]
        seen |= own.keys()
    raise ValueError(name)


@pytest.fixture(scope="module")
def runner_in(tmp_path_factory, run_script, run_ranks, run_command):
    """Return runner_in(directory): a Runner where the README's commands were run: data is there, and an adapter."""
    prepared = make_workspace(tmp_path_factory.mktemp("prepared"))
    first = Runner(prepared, run_script, run_ranks, run_command)
    for command in BEFORE:
        first.run(command).check()

    def runner(directory: Path) -> Runner:
        shutil.copytree(prepared.parent, directory, dirs_exist_ok=True)
        return Runner(directory / prepared.name, run_script, run_ranks, run_command)

    return runner


@pytest.mark.parametrize("name", [name for name in NAMES if remaining(name)])
def test_the_commands_of_each_document_run(name, tmp_path, runner_in):
    runner = runner_in(tmp_path)
    for command in remaining(name):
        result = runner.run(command.text)
        assert result.code == 0, f"{command.where}\n{result.out[-4000:]}\n{result.err[-4000:]}"


def test_the_snippets_run(run_ranks, tmp_path):
    clone = make_workspace(tmp_path)
    for document in documents():
        for snippet in blocks(document, "python"):
            if not why_not_run(snippet.text):
                (clone / "snippet.py").write_text(snippet.text, encoding="utf-8")
                result = run_ranks(1, "snippet.py", cwd=clone)
                assert result.code == 0, f"{snippet.where}\n{result.out[-4000:]}\n{result.err[-4000:]}"


def test_what_is_not_run_says_when_it_last_was():
    texts = [code.text for document in documents() for code in (*commands(document), *blocks(document, "python"))]
    unused = [part for part in NOT_RUN if not any(part in text for text in texts)]
    assert not unused, f"no document has these commands any more: {unused}"
    for part, (reason, last) in NOT_RUN.items():
        named = re.search(r"tests/\S+\.py", last)
        assert reason and (last in (SUITE, "never") or named or re.fullmatch(r"2026-\d\d-\d\d", last)), part
        assert not named or (ROOT / named[0]).is_file(), part
