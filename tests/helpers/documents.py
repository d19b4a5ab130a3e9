"""
Reads README.md, README_zh.md, CONTRIBUTING.md and docs/: their shell commands, Python snippets, inline code and links.

For test_documents.py, test_document_commands.py and the tests that run README's commands on other models.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from markdown_it import MarkdownIt  # rich, which the libraries bring, requires it
from markdown_it.token import Token

from utils.distributed.process_group import free_port

SHELL = ("bash", "console", "sh", "shell")
QUOTED = r"'[^']*'|\"(?:\\.|[^\"\\])*\""
COMMENT = re.compile(rf"({QUOTED})|(?:(?<=\s)|^)#[^\n]*", flags=re.MULTILINE)
LOGICAL_LINE = re.compile(rf"(?:{QUOTED}|\\\n|[^\n'\"])+")
HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)")

PORT_FLAGS = {"torchrun": "--master_port", "accelerate launch": "--main_process_port", "deepspeed": "--master_port"}


@dataclass(frozen=True)
class Code:
    """A block or an inline piece of code, or one command of a block: `where` is "README.md:12"."""

    where: str
    language: str  # of the fence; "" for inline code
    text: str


def documents() -> list[Path]:
    """Return the Markdown files that users read, README.md first; the logs tell what was, so they are left out."""
    paths = [ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
    return [path for path in dict.fromkeys(paths) if "log" not in path.relative_to(ROOT).parts]


@functools.cache
def tokens_of(document: Path) -> tuple[Token, ...]:
    """Return the tokens of a document, those of paragraphs and table cells among them."""
    parser = MarkdownIt("commonmark").enable("table")
    tokens, line = [], 0
    for token in parser.parse(document.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line  # cells have no line: that of their row
        for part in (token, *(token.children or ())):
            part.meta["line"] = line
            tokens.append(part)
    return tuple(tokens)


def blocks(document: Path, *languages: str) -> list[Code]:
    """Return the fenced blocks of these languages, or all."""
    fences = [token for token in tokens_of(document) if token.type == "fence"]
    named = [(token, token.info.split()[0] if token.info else "") for token in fences]
    return [_code(document, token, name) for token, name in named if not languages or name in languages]


def code_and_text(document: Path) -> list[Code]:
    """Return the commands, the other blocks but programs and data, inline code, and the text between."""
    parts = [block for block in blocks(document) if block.language not in (*SHELL, "python", "json", "yaml")]
    parts += [_code(document, token, "") for token in tokens_of(document) if token.type in ("code_inline", "text")]
    return [*commands(document), *parts]


def headings(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    tokens = tokens_of(document)
    titles = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tables(document: Path) -> list[str]:
    """Return each row of the tables as one text, its cells separated by " | "."""
    rows = []
    for token, after in zip(tokens_of(document), tokens_of(document)[1:], strict=False):
        if token.type == "tr_open":
            rows.append("")
        elif token.type in ("td_open", "th_open"):
            rows[-1] += f" | {after.content}"
    return rows


def links(document: Path) -> list[str]:
    """Return the targets of links and pictures."""
    targets = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(document)]
    return [str(target) for target in targets if target]


def commands(document: Path, *languages: str) -> list[Code]:
    """Return the commands of the shell blocks, each as one line without comments and prompts."""
    return [
        Code(block.where, block.language, command)
        for block in blocks(document, *(languages or SHELL))
        for command in split_commands(block.text)
    ]


def split_commands(text: str) -> list[str]:
    """
    Return the commands of a shell block.

    A continued command becomes one line; a here-document or a quoted line break stays. Where a line has the prompt
    "$ ", lines without it are output.
    """
    lines = LOGICAL_LINE.findall(COMMENT.sub(lambda match: match[1] or "", text))
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found, rest = [], iter(lines)
    for line in rest:
        command = re.sub(r"\s*\\\n\s*", " ", line).strip()
        if heredoc := HEREDOC.search(command):
            for body in rest:
                command += f"\n{body}"
                if body.strip() == heredoc[1]:
                    break
        if command:
            found.append(command if "\n" in command else re.sub(rf"({QUOTED})|\s+", lambda m: m[1] or " ", command))
    return found


def readme_commands(name: str = "README.md") -> list[str]:
    """Return the commands of a README's bash blocks."""
    return [command.text for command in commands(ROOT / name, "bash")]


def on_a_free_port(command: str) -> str:
    """Return the command with a free port for its launcher, so that several can run side by side."""
    for launcher, flag in PORT_FLAGS.items():
        if command.startswith(f"{launcher} ") and flag not in command:
            return command.replace(launcher, f"{launcher} {flag} {free_port()}", 1)
    return command


def _code(document: Path, token: Token, language: str) -> Code:
    return Code(f"{document.relative_to(ROOT)}:{token.meta['line']}", language, token.content)
