"""The examples in docstrings give the results that they show."""

import doctest
import importlib

import pytest
from conftest import ROOT

FILES = [path for path in sorted(ROOT.glob("utils/**/*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring_examples(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


def test_files_with_examples_are_found():
    assert len(FILES) >= 5
