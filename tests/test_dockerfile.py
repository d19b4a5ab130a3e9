"""The Dockerfile copies files that exist, .dockerignore follows git's, and the command in its comment is right."""

import re
import shlex

from conftest import ROOT

from utils.training.arguments import make_parser


def test_it_copies_what_exists():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY --chown=\S+ (\S+) (\S+)$", text, flags=re.MULTILINE)
    assert len(copied) == 3 == text.count("\nCOPY ") and copied[-1] == (".", ".")
    assert all(source == target and (ROOT / source).exists() for source, target in copied)
    installed = re.search(r"pip install .*", text).group()
    assert all(f"-r {source}" in installed for source, _ in copied[:-1])


def test_it_leaves_out_what_git_ignores():
    """And nothing else, but for git's own directory: an image has the files of a clone."""
    lines = [line for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if line]
    anywhere = [line for line in lines if line.startswith(("*", "__pycache__"))]
    expected = {".git"} | {f"**/{line.strip('/')}" for line in anywhere}
    expected |= {line.replace("!/", "!").strip("/") for line in lines if line not in anywhere}
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line for line in left_out if not line.startswith("#")} == expected


def test_its_command_trains():
    """Its flags are those of the training script, and what it mounts is where the image has it."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)+", text).group().replace("# ", "").replace("\\\n", " ")
    words, training = (
        shlex.split(next(line for line in comment.splitlines() if line.startswith(start)))
        for start in ("docker run", "torchrun")
    )
    flags = training[training.index("multi_gpu_fintune_belle.py") + 1 :]
    assert make_parser("").parse_args(flags).output_dir == "output/mine"
    mounted = [word.rpartition(":")[2] for word in words if word.startswith(("$PWD", "~"))]
    assert mounted == ["/workspace/data", "/workspace/output", "/home/trainer/.cache/huggingface"]
    assert "WORKDIR /workspace\n" in text and " --create-home " in text and "USER trainer\n" in text
