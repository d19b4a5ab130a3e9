"""Files that documents and comments name exist, and the public names of `utils` have docstrings."""

import ast
import re

from conftest import ROOT

PATHS = re.compile(
    r"\b((?:utils|tests|benchmarks|tools|configs|docs|data)/[\w./*-]*\w\.(?:py|md|jsonl|json|yaml|txt))\b"
)
PLACEHOLDERS = ("utils/common/new.py", "utils/training/new.py", "utils/models/new.py", "utils/data/new.py")
NOT_IN_THE_REPOSITORY = ("data/Belle", "data/belle", "data/rows.", "utils/models/tokenization_NAME.py", *PLACEHOLDERS)


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
