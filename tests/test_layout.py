"""The rule of dependency between the rooms of `utils`: imports point down, without a circle."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ALLOWED = {
    "common": set(),
    "kernels": set(),
    "models": set(),
    "layers": {"kernels", "models", "common"},
    "distributed": {"common"},
    "data": {"models", "common"},
    "checkpoint": {"layers", "models", "common"},
    "lora": {"checkpoint", "layers", "models", "common"},
    "training": {"lora", "checkpoint", "layers", "data", "distributed", "models", "common"},
    "inference": {"lora", "checkpoint", "layers", "kernels", "data", "distributed", "models", "common"},
}


def imported_modules(source: str) -> set[str]:
    """Return the names of all modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "utils":
            names |= {f"utils.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def forbidden_imports(root: Path) -> tuple[list[str], int]:
    """Return each import that ALLOWED forbids as "file: module", and the number of imports between rooms."""
    forbidden, checked = [], 0
    for path in sorted((root / "utils").rglob("*.py")):
        room = path.relative_to(root / "utils").parts[0]
        if room == "__init__.py":
            continue
        for name in imported_modules(path.read_text(encoding="utf-8")):
            first, _, rest = name.partition(".")
            if first in ("tools", "tests", "benchmarks") or (root / f"{first}.py").is_file():
                forbidden.append(f"{path.relative_to(root)}: {name}")
            elif first == "utils" and rest != "__version__" and (owner := rest.partition(".")[0]) != room:
                checked += 1
                if owner not in ALLOWED[room]:
                    forbidden.append(f"{path.relative_to(root)}: {name}")
    return forbidden, checked


def test_rooms_import_downwards():
    forbidden, checked = forbidden_imports(ROOT)
    assert not forbidden
    assert checked > 100  # the walk found the code
    assert {path.name for path in (ROOT / "utils").iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        ALLOWED
    )


@pytest.mark.parametrize(
    "room, line, shown",
    [
        ("common", "import utils.data.rejections", "utils/common/new.py: utils.data.rejections"),
        ("training", "from utils.inference.job import answer", "utils/training/new.py: utils.inference.job"),
        ("models", "from utils import common", "utils/models/new.py: utils.common"),
        ("data", "def f():\n    from process_belle_1M_data import main", "utils/data/new.py: process_belle_1M_data"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, room, line, shown):
    (tmp_path / "utils" / room).mkdir(parents=True)
    (tmp_path / "process_belle_1M_data.py").touch()
    (tmp_path / "utils" / room / "new.py").write_text(line)
    assert forbidden_imports(tmp_path)[0] == [shown]


def test_no_circle_of_imports():
    """Between modules, by the imports at the top of each file; those inside functions may close a circle."""
    imports = {}
    for path in (ROOT / "utils").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        statements = [
            node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)
        ]
        imports[name] = {node.module for node in statements} | {
            f"{node.module}.{a.name}" for node in statements for a in node.names
        }
    imports = {name: (targets & imports.keys()) - {name} for name, targets in imports.items()}
    while leaves := {name for name, targets in imports.items() if not targets & imports.keys()}:
        imports = {name: targets for name, targets in imports.items() if name not in leaves}
    assert not imports
