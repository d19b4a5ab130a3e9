"""Copies of the tiny golden checkpoints with changed JSON files."""

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import GOLDEN

V1, V2, V3, V4 = (GOLDEN / f"{name}-tiny" for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"))


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON object; None removes one."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values = {name: value for name, value in (values | changes).items() if value is not None}
    file.write_text(json.dumps(values), encoding="utf-8")


def copy_of(source: Path, target: Path, config: dict | None = None, tokenizer_config: dict | None = None) -> Path:
    """A copy of a checkpoint in `target`, with changes to its config.json and tokenizer_config.json."""
    shutil.copytree(source, target)
    edit(target / "config.json", **(config or {}))
    edit(target / "tokenizer_config.json", **(tokenizer_config or {}))
    return target
