"""tools/chat.py: streaming, history and adapter in the terminal, and the page in a headless browser."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

from utils.checkpoint import load_model, load_tokenizer
from utils.distributed import free_port
from utils.generation import generate_answers
from utils.lora import attach_adapter, load_adapter, save_adapter
from utils.prompts import encode_prompt, template_for
from utils.requests import Request
from utils.rows import Message

import pytest
import torch
from conftest import ROOT, TINY

BASE = TINY  # it has been trained, so what it says can be read
QUESTIONS = ("把下面的句子写成日记:老李今天在家里拍照", "老王昨天在家里喝茶")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """One that changes what the base says."""
    model = attach_adapter(load_model(str(BASE)), 4, 32, 0.0, ["query_key_value"], seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    path = tmp_path_factory.mktemp("adapter") / "changed"
    save_adapter(model, path)
    return path


@pytest.fixture(scope="module")
def flags(adapter):
    return f"--model_name_or_path {BASE} --adapter_path {adapter} --max_new_tokens 8"


def expected_answers(adapter):
    """What the engine answers to the questions, one after the other, each with the history before it."""
    model, tokenizer = load_model(str(BASE)), load_tokenizer(str(BASE))
    if adapter:
        model = load_adapter(model, adapter).merge_and_unload()
    template, messages, found = template_for(tokenizer, "native"), [], []
    for question in QUESTIONS:
        messages.append(Message("user", question))
        request = Request(0, "", encode_prompt(tokenizer, messages, template))
        (answer,) = generate_answers(model, tokenizer, template, [request], 1, 8, torch.device("cpu"))
        found.append(answer["answer"])
        messages.append(Message("assistant", answer["answer"]))
    return found


@pytest.fixture(scope="module")
def expected(adapter):
    found = {"adapter": expected_answers(adapter), "base": expected_answers(None)}
    assert all(answer.strip() for answers in found.values() for answer in answers)
    assert all(a != b for a, b in zip(*found.values(), strict=True)), found
    return found


def test_terminal(run_script, monkeypatch, flags, expected):
    typed = [*QUESTIONS, "/clear", "/base", *QUESTIONS, "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    out = run_script(f"tools/chat.py {flags}").check().out
    place = 0
    for answer in (*expected["adapter"], "the base answers", *expected["base"]):
        place = out.index(answer, place) + len(answer)


def test_answers_grow(adapter, expected, monkeypatch):
    from tools.chat import Chat, Choices

    tokenizer = load_tokenizer(str(BASE))
    chat = Chat(load_adapter(load_model(str(BASE)), adapter), tokenizer, template_for(tokenizer, "native"), True)
    texts = list(chat.answer([Message("user", QUESTIONS[0])], Choices(8)))
    assert len(texts) > 4 and texts[-1] == expected["adapter"][0]
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    sampled = [list(chat.answer([Message("user", "你好")], Choices(8, 1.5)))[-1] for _ in range(3)]
    assert len(set(sampled)) > 1

    def broken(**kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(chat.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(chat.answer([Message("user", "你好")], Choices(8)))


@pytest.fixture
def page(tmp_path, flags):
    """The address of the page that `--web` serves."""
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "tools/chat.py", *flags.split(), "--web", "--port", str(port)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (apt-get install chromium)")
def test_page(page, tmp_path, expected):
    """Two questions typed; both columns answer, each with its own history."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(page)
        for number, question in enumerate(QUESTIONS):
            tab.locator("#question textarea").fill(question)
            tab.locator("#send").click()
            for side in ("adapter", "base"):
                answer = " ".join(expected[side][number].split())
                expect(tab.locator(f"#{side}")).to_contain_text(answer, timeout=60_000)
                expect(tab.locator(f"#{side}")).to_contain_text(question)
            tab.wait_for_timeout(500)
        tab.screenshot(path=str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000
        tab.locator("#clear").click()
        expect(tab.locator("#base")).not_to_contain_text(QUESTIONS[0])
        browser.close()


@pytest.mark.parametrize(
    "flags, words",
    [("--temperature -1", "--temperature"), ("--top_p 0", "--top_p"), ("--max_new_tokens 0", "--max_new_tokens")],
)
def test_wrong_use(run_script, flags, words):
    result = run_script(f"tools/chat.py --model_name_or_path {BASE} {flags}")
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
