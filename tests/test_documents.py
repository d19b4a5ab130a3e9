"""Links, files, flags, versions and figures in documents are right, and `utils`' public names have docstrings."""

import ast
import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT
from documents import SHELL, blocks, code_and_text, documents, headings, links, readme_commands, split_commands, tables

PATHS = re.compile(
    r"\b((?:utils|tests|benchmarks|tools|configs|docs|data)/[\w./*-]*\w\.(?:py|md|jsonl|json|yaml|txt|svg|png))\b"
)
PLACEHOLDERS = ("utils/common/new.py", "utils/training/new.py", "utils/models/new.py", "utils/data/new.py")
NEIGHBOURS = ("docs/source_en/", "tests/e2e/patched/", "tests/train/")  # folders of other projects
NOT_IN_THE_REPOSITORY = (
    *("data/Belle", "data/belle", "data/rows.", "utils/models/tokenization_NAME.py"),
    *(*PLACEHOLDERS, *NEIGHBOURS),
)
WITHOUT_FLAGS = ("integer_weights.py", "tiny_corpus.py")
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
EVERY_SCRIPT = {"traceback", "version"}  # utils/common/script.py takes it before the script's parser
# Flags of programs that are no part of the repository or its libraries, from their manuals.
OTHERS = {
    "pip": {"--no-index", "--find-links"},
    "modelscope": {"--model", "--dataset", "--local_dir"},
    "hf": {"--local-dir"},
    "docker": {"--gpus", "--ipc", "--rm", "--shm-size"},
    "pytest": {"--durations"},
    "vllm": {"--served-model-name", "--dtype", "--max-model-len", "--trust-remote-code"},
    "sglang": {"--model-path", "--served-model-name", "--dtype", "--model-impl", "--port", "--context-length"},
}
NUMBER = re.compile(r"(?<![A-Za-z0-9_.-])\d+(?:,\d{3})*(?:\.\d+)?")  # not the digits of a name


def test_files_that_documents_and_comments_name_exist():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.py")]
    files += [path for room in ("utils", "tests", "tools", "benchmarks") for path in ROOT.glob(f"{room}/**/*.py")]
    named = {(path.name, name) for path in files for name in PATHS.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 100
    missing = [
        f"{source}: {name}"
        for source, name in sorted(named)
        if not name.startswith(NOT_IN_THE_REPOSITORY) and not [*ROOT.glob(name)]
    ]
    assert not missing, "\n".join(missing)


def test_links_lead_to_files_and_headings():
    checked, broken = 0, []
    for document in [*documents(), *ROOT.glob("docs/log/*.md")]:
        for link in links(document):
            if "://" in link:
                continue
            checked += 1
            name, _, anchor = unquote(link).partition("#")
            target = document.parent / name if name else document
            if not target.exists() or (anchor and anchor not in headings(target)):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert checked > 30
    assert not broken, "\n".join(broken)


@pytest.fixture(scope="module")
def flags_of(run_script):
    """Return flags_of(program): the flags of a script, by its path, or of a launcher."""
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    parsed = {"torchrun": get_args_parser().parse_args(["script.py"]), "deepspeed": parse_args(["script.py"])}
    parsed["accelerate"] = launch_command_parser().parse_args(["script.py"])
    known = {launcher: set(vars(values)) for launcher, values in parsed.items()}

    def flags(program: str) -> set[str]:
        if program not in known:
            printed = run_script(f"{program} --help").check().out
            # argparse begins an option's line with two spaces; two more end what the option is called.
            names = [line[2:].split("  ")[0] for line in printed.splitlines() if re.match("  -", line)]
            known[program] = {name for line in names for name in flag_names(line)}
        return known[program]

    return flags


def flag_names(text: str) -> list[str]:
    """Return the flags in a text, with underscores: argparse's users here take both spellings."""
    return [name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)]


def scripts() -> dict[str, str]:
    """Return the path of each script that takes flags, by its name."""
    patterns = ("*.py", "tools/*.py", "benchmarks/*.py", "tests/faults/*.py")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if "__main__" in path.read_text("utf-8")]
    return {path.name: str(path.relative_to(ROOT)) for path in paths if path.name not in WITHOUT_FLAGS}


def flags_by_program(text: str) -> list[tuple[str | None, str]]:
    """Return each flag with the script or launcher before it; None where words are left out or none is named."""
    program, named, paths = None, [], scripts()
    for position, word in enumerate(text.split()):
        if word.endswith(".py") and Path(word).name in paths:
            program = paths[Path(word).name]
        elif position == 0 and (word in LAUNCHERS or word in OTHERS):
            program = word
        elif word in ("...", "--", "FILE", "|", "&&", ";") or word.startswith(tuple(OTHERS)):
            program = None
        named += [(program, flag) for flag in flag_names(word)]
    return named


def test_flags_exist_in_what_they_are_named_for(flags_of):
    everywhere = {flag for program in (*LAUNCHERS, *scripts().values()) for flag in flags_of(program)}
    others = {name: set(flag_names(" ".join(flags))) for name, flags in OTHERS.items()}
    everywhere |= {flag for flags in others.values() for flag in flags} | EVERY_SCRIPT
    checked, unknown = 0, []
    for document in documents():
        for code in code_and_text(document):
            for program, flag in flags_by_program(code.text):
                checked += 1
                allowed = everywhere if program is None else others.get(program) or flags_of(program) | EVERY_SCRIPT
                if flag not in allowed:
                    unknown.append(f"{code.where}: --{flag} of {program or 'any program'}")
    assert checked > 300
    assert not unknown, "\n".join(unknown)


def test_shell_blocks_have_a_language_and_data_parses():
    programs = ("python ", "pip ", "make ", "$ ", *(f"{launcher} " for launcher in LAUNCHERS))
    for document in documents():
        for block in blocks(document):
            if block.language == "json":
                _ = [json.loads(line) for line in block.text.splitlines()]
            elif block.language == "yaml":
                yaml.safe_load(block.text)
            elif block.language == "python":
                ast.parse(block.text)
            elif block.language not in SHELL:
                assert not block.text.startswith(programs), f"{block.where}: a command without a language"


def test_a_block_is_split_into_commands():
    assert split_commands("a \\\n    --b 'c  # d'  # it's\n\n# e\ncat > f <<'END'\n{\"g\": 1}\nEND\nh") == [
        "a --b 'c  # d'",
        "cat > f <<'END'\n{\"g\": 1}\nEND",
        "h",
    ]
    assert split_commands("$ a b\noutput: it is\n$ c") == ["a b", "c"]


def test_both_readmes_have_the_same_commands_and_figures():
    assert len(readme_commands()) >= 10
    assert readme_commands() == readme_commands("README_zh.md")
    english, chinese = ([NUMBER.findall(row) for row in tables(ROOT / name)] for name in ("README.md", "README_zh.md"))
    assert sum(map(len, english)) > 30
    assert english == chinese


@pytest.mark.parametrize("name, lines", [("README.md", 200), ("README_zh.md", 210)])
def test_readmes_are_short(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines


def test_the_pinned_versions_are_installed():
    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) >= 10
    for name, pinned in pins:
        assert version(name).split("+")[0] == pinned, name
    assert importlib.util.find_spec("pkg_resources")  # cpm_kernels imports it, hence setuptools<81


def test_public_functions_and_classes_have_docstrings():
    """Methods too, except in classes with a base, where a library's or our base class documents them."""
    checked, bare = 0, []
    for path in sorted((ROOT / "utils").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for scope in (tree, *(node for node in classes if not node.bases)):
            for node in scope.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    checked += 1
                    if not ast.get_docstring(node):
                        bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert checked > 300
    assert not bare, "\n".join(bare)
