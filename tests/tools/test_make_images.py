"""tools/make_images.py: a terminal's picture, and what the script says without Chromium."""

import sys

import pytest

from tools.make_images import draw_terminal, find_browser, last_state, record
from utils.common.errors import RunError, UsageError


def test_a_terminal_as_a_picture(tmp_path):
    """A program that sees a terminal; what a progress bar overwrote is gone, and nothing is loaded."""
    script = (
        "import sys; print(f'\\x1b[1m标题\\x1b[0m {sys.stdout.isatty()}'); "
        "print('1 of 2\\x1b[2K\\r2 of 2'); print('<b>')"
    )
    output = record(f'{sys.executable} -c "{script}"', tmp_path)
    draw_terminal("python demo.py", output, tmp_path / "demo.svg", tmp_path)
    picture = (tmp_path / "demo.svg").read_text(encoding="utf-8")
    for text in ("标题", "True", "2&#160;of&#160;2", "&lt;b&gt;", "demo.py"):
        assert text in picture
    assert "1&#160;of" not in picture and "font-face" not in picture and "url(http" not in picture
    assert last_state("a\rb\x1b[2K") == "b"
    with pytest.raises(RunError, match="the command failed"):
        record(f'{sys.executable} -c "exit(3)"', tmp_path)


def test_without_chromium(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="need Chromium and playwright: apt-get install chromium"):
        find_browser()
