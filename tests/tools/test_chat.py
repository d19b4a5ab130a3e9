"""tools/chat.py: streaming, history and adapter in the terminal, and the page in a headless browser."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.request

import pytest
import torch
from conftest import ROOT, TINY
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.distributed.process_group import free_port
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.engine.model_runner import ModelRunner
from utils.inference.placement import dispatch, prepare_for_decoding
from utils.inference.prompt_reader import PromptRow
from utils.lora.adapter import LoraSettings, attach_adapter, load_adapter, save_adapter
from utils.lora.multi_lora import add_adapters
from utils.models.conversation import Message
from utils.models.templates import encode_prompt, template_for

BASE = TINY  # trained, so its answers are text
QUESTIONS = ("把下面的句子写成日记:老李今天在家里拍照", "老王昨天在家里喝茶")
IN_TWO_LINES = ("把下面的句子写成日记:\\", "老李今天在家里拍照")
PAGE, JSON = "http://127.0.0.1:7860", {"content-type": "application/json"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes the base's answers."""
    model = attach_adapter(load_model(str(BASE)), LoraSettings(4, 32, 0.0, ["query_key_value"]), seed=0)
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


def expected_answers(adapter, questions=QUESTIONS):
    """Return the engine's answers to `questions`, one after another, each with its history."""
    model, tokenizer = load_model(str(BASE)), load_tokenizer(str(BASE))
    if adapter:
        model = load_adapter(model, adapter).merge_and_unload()
    prepare_for_decoding(model)
    template, messages, answers = template_for(tokenizer, "native"), [], []
    settings, device = AnswerSettings(max_new_tokens=8), torch.device("cpu")
    generator = BatchGenerator(model, PromptCodec(tokenizer, template), settings, device)
    for question in questions:
        messages.append(Message("user", question))
        request = PromptRow(0, "", encode_prompt(tokenizer, messages, template))
        (answer,) = generator.run([request])
        answers.append(answer["answer"])
        messages.append(Message("assistant", answer["answer"]))
    return answers


@pytest.fixture(scope="module")
def expected(adapter):
    answers = {"adapter": expected_answers(adapter), "base": expected_answers(None)}
    assert all(answer.strip() for side in answers.values() for answer in side)
    assert all(a != b for a, b in zip(*answers.values(), strict=True)), answers
    return answers


def test_terminal(run_script, monkeypatch, flags, expected):
    typed = [*QUESTIONS, "/clear", "/base", *QUESTIONS, "/help", "/nothing", "/clear", *IN_TWO_LINES, "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    out = run_script(f"tools/chat.py {flags}").check().out
    for words in (f"model     {BASE} (ChatGLM-6B)", "float32 on cpu", "Ctrl-C stops an answer", "no command /nothing"):
        assert words in out
    assert "\n> " not in out
    assert set(re.findall(r"^  (/[a-z]+)  ", out, flags=re.MULTILINE)) == {
        *("/help", "/clear", "/adapter", "/base", "/quit")
    }
    in_two_lines = expected_answers(None, ["".join(IN_TWO_LINES).replace("\\", "\n")])[0]
    end = 0
    for answer in (*expected["adapter"], "the base answers", *expected["base"], "forgotten", in_two_lines):
        end = out.index(answer, end) + len(answer)


def test_ctrl_c_stops_the_answer_and_not_the_program():
    """In a terminal; at the prompt it drops the line."""
    master, slave = pty.openpty()
    command = f"tools/chat.py --model_name_or_path {BASE} --max_new_tokens 450 --repetition_penalty 0.5"
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(slave)
    shown = b""

    def wait_for(words):
        nonlocal shown
        while words.encode() not in shown:
            assert select.select([master], [], [], 60)[0], shown.decode(errors="replace")
            shown += os.read(master, 4096)
        shown = shown.split(words.encode(), 1)[1]

    try:
        wait_for("> ")
        os.write(master, "你好\r".encode())
        wait_for("我是一个很小的模型")  # without a stop it would be said for 450 tokens
        os.write(master, b"\x03")
        wait_for("(stopped)")
        wait_for("> ")
        time.sleep(1.1)  # one Ctrl-C counts once within a second
        os.write(master, b"\x03")
        wait_for("/quit or Ctrl-D ends")
        wait_for("> ")
        os.write(master, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(master)


@pytest.fixture(scope="module")
def chat(adapter):
    from tools.chat_model import Chat

    model, tokenizer = load_model(str(BASE)), load_tokenizer(str(BASE))
    add_adapters(model, {"changed": adapter})
    prepare_for_decoding(model)
    with contextlib.closing(Chat(model, tokenizer, template_for(tokenizer, "native"), "tiny", "changed")) as chat:
        yield chat


def test_control_characters_do_not_reach_the_terminal(chat, monkeypatch, capsys):
    """Neither those of an answer, nor from a line that is not in the terminal's encoding."""
    from tools.chat import talk
    from tools.chat_model import ChatSettings

    typed = iter([UnicodeDecodeError("gbk", b"x", 0, 1, ""), "你好", "/quit"])

    def type_line(_):
        line = next(typed)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(chat.template, "clean", lambda text: f"\x1b]0;own\x07{text}\x9b2J")
    talk(chat, ChatSettings(8))
    out = capsys.readouterr().out
    assert "the line is not gbk" in out and "\\x1b]0;own\\x07" in out and not set("\x1b\x07\x9b") & set(out)


def test_answers_grow(chat, expected, monkeypatch):
    from tools.chat_model import ChatSettings

    assert list(chat.answer([Message("user", QUESTIONS[0])], ChatSettings(8)))[-1] == expected["adapter"][0]
    texts = list(chat.answer([Message("user", QUESTIONS[0])], ChatSettings(200, repetition_penalty=0.5)))
    assert len(texts) > 4 and len(texts[-1]) > 20
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    sampled = [list(chat.answer([Message("user", QUESTIONS[0])], ChatSettings(8, 2.0)))[-1] for _ in range(3)]
    assert len(set(sampled)) > 1

    def broken(*args):
        raise RuntimeError("no memory")

    message = [Message("user", QUESTIONS[0])]
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "decode", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            list(chat.answer(message, ChatSettings(8)))
    assert list(chat.answer(message, ChatSettings(8)))[-1] == expected["adapter"][0]  # by a new engine


def test_one_engine_serves_the_whole_chat(chat, expected):
    """And both sides at once. Other sampling and a longer conversation take another engine."""
    from tools.chat_model import ChatSettings, Question

    def both(settings):
        questions = [Question([Message("user", QUESTIONS[0])], use_adapter) for use_adapter in (True, False)]
        return list(chat.answers(questions, settings))

    answers = both(ChatSettings(8))
    assert answers[-1] == [expected["adapter"][0], expected["base"][0]]
    assert all(first is not None and second is not None for first, second in answers[1:])  # they grow together
    engine = chat.server.engine
    assert both(ChatSettings(8, top_p=1.0))[-1] == answers[-1] and chat.server.engine is engine
    both(ChatSettings(8, repetition_penalty=1.2))
    assert chat.server.engine is not engine
    both(ChatSettings(8))
    assert chat.server.engine.runner.max_seq_len == 2048
    with contextlib.closing(chat.answer([Message("user", "你好")], ChatSettings(2500))) as texts:
        next(texts)
    assert chat.server.engine.runner.max_seq_len == 4096


@pytest.fixture(scope="module")
def offloaded_chat(adapter, tmp_path_factory):
    """A chat with a model spread over CPU and disk, which no engine can serve."""
    from tools.chat_model import Chat

    checkpoint, tokenizer = Checkpoint.open(str(BASE)), load_tokenizer(str(BASE))
    folder = str(tmp_path_factory.mktemp("offload"))
    model = dispatch(checkpoint, torch.float32, max_memory={"cpu": "6MiB"}, offload_folder=folder)
    assert "disk" in model.hf_device_map.values()
    add_adapters(model, {"changed": adapter})
    return Chat(model, tokenizer, template_for(tokenizer, "native"), "tiny", "changed")


def test_a_model_that_is_spread_over_devices(offloaded_chat, expected, monkeypatch):
    from tools.chat_model import ChatSettings, Question

    chat, message = offloaded_chat, [Message("user", QUESTIONS[0])]
    answers = list(chat.answers([Question(message, True), Question(message, False)], ChatSettings(8)))
    assert answers[-1] == [expected["adapter"][0], expected["base"][0]] and answers[0][1] is None
    assert chat.server is None
    before = threading.active_count()
    with contextlib.closing(chat.answer(message, ChatSettings(300, 1.0, repetition_penalty=0.5), False)) as texts:
        next(texts)
    assert threading.active_count() == before
    assert list(chat.answer(message, ChatSettings(8)))[-1] == expected["adapter"][0]

    def broken(**kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(chat.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(chat.answer(message, ChatSettings(8)))


def test_an_abandoned_answer_changes_no_other(chat, expected):
    """The base's answer is abandoned after its first token; the adapter's next answer is the adapter's."""
    from tools.chat_model import ChatSettings

    message = [Message("user", QUESTIONS[0])]
    list(chat.answer(message, ChatSettings(8)))
    before = threading.active_count()
    abandoned = chat.answer(message, ChatSettings(5000, repetition_penalty=1.5, temperature=1.0), use_adapter=False)
    next(abandoned)
    abandoned.close()
    assert list(chat.answer(message, ChatSettings(8)))[-1] == expected["adapter"][0]
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def reader(chat):
    """A client of the page, in this process."""
    from tools.chat_model import ChatSettings
    from tools.chat_page import make_app
    from tools.request_filter import RequestFilter, own_names

    with TestClient(RequestFilter(make_app(chat, ChatSettings(8)), own_names("127.0.0.1")), base_url=PAGE) as client:
        yield client


def ask(reader, session, *data, event=0, **headers):
    """Return the last message about an event of the page, by its number, with these values; the JSON may have NaN."""
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", reader.get("/").text)[1])
    function = [dependency["id"] for dependency in config["dependencies"] if dependency["inputs"]][event]
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session})
    reader.post("/gradio_api/queue/join", content=body, headers=JSON | headers).raise_for_status()
    stream = reader.get("/gradio_api/queue/data", params={"session_hash": session})
    messages = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    return next(message for message in reversed(messages) if message["msg"] == "process_completed")


def test_readers_have_their_own_history(reader, expected):
    for session in ("one", "two"):
        shown = ask(reader, session, QUESTIONS[0], None, None, 8, 0, 1, 1)["output"]["data"]
        assert shown[0] == "" and all(len(box) == 1 and QUESTIONS[0] in str(box) for box in shown[3:5])
        boxes = ask(reader, session, None, None, event=1)["output"]["data"][5:7]
        for box, side in zip(boxes, ("adapter", "base"), strict=True):
            assert len(box) == 2 and expected[side][0].strip() in str(box[1])


@pytest.mark.parametrize(
    "data, words",
    [
        (("x" * 20_001, None, None, 8, 0, 1, 1), "a question has 20000 characters at most"),
        (("你好" * 9_000, None, None, 8, 0, 1, 1), "tokens, the model takes 512: shorten it"),
        (("你好", None, None, 10**9, 0, 1, 1), "greater than maximum value 4096"),
        (("你好", None, None, 8, float("nan"), 1, 1), "Randomness: a number from 0 to 2"),
    ],
)
def test_what_a_browser_sends_is_checked(reader, data, words):
    """A notice beside the box says what is wrong, and what was typed stays; Gradio's own checks are errors."""
    last = ask(reader, "wrong", *data)
    assert words in str(last["output"])
    if last["success"]:
        question, *_, notice, send, stop = last["output"]["data"]
        assert question == {"__type__": "update"} and notice["visible"] and send["visible"] and not stop["visible"]


def test_a_conversation_that_is_too_long(reader):
    ask(reader, "long", "你好" * 200, None, None, 8, 0, 1, 1)
    ask(reader, "long", None, None, event=1)
    last = ask(reader, "long", "你好" * 200, None, None, 8, 0, 1, 1)
    assert "tokens with this message, the model takes 512: clear it" in str(last["output"])


def test_faults_are_in_the_browsers_language(reader):
    last = ask(reader, "wrong", "x" * 20_001, None, None, 8, 0, 1, 1, **{"accept-language": "zh-CN,zh;q=0.9"})
    assert "问题最多 20000 个字符" in str(last["output"])


OWN, EVIL = "127.0.0.1:7860", "http://evil.example"


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/", {"host": OWN}, 200),
        ("GET", "/", {"host": "localhost:9000", "origin": "http://localhost:9000"}, 200),  # through a tunnel
        ("GET", "/", {"host": "[::1]:7860"}, 200),
        ("GET", "/", {"host": OWN, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("GET", "/", {"host": OWN, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/", {"host": "127.0.0.1.evil.example:7860"}, 403),
        ("GET", "/", {"host": "127.0.0.1@evil.example"}, 403),
        ("GET", "/", {"host": "evil.example:7860", "x-forwarded-host": OWN}, 403),
        ("GET", "/", {"host": "192.168.1.7:7860"}, 403),
        ("GET", "/", {"host": ""}, 403),
        ("GET", "/", {"host": "[::1"}, 403),
        ("GET", "/gradio_api/queue/data?session_hash=a", {"origin": EVIL}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": EVIL}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": "null"}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": "http://127.0.0.1:3000"}, 403),
        ("OPTIONS", "/gradio_api/queue/join", {"origin": EVIL, "access-control-request-method": "POST"}, 403),
        ("POST", "/gradio_api/upload", {}, 404),
        ("POST", "/gradio_api/upload/", {}, 404),
        ("POST", "//gradio_api/upload", {}, 404),
        ("POST", "/gradio_api/component_server", {}, 404),
        ("POST", "/gradio_api/call/respond", {}, 404),
        ("POST", "/gradio_api/run/predict", {}, 404),
        ("POST", "/gradio_api/process_recording", {}, 404),
        ("POST", "/login", {}, 404),
        ("GET", "/gradio_api/info", {}, 404),
        ("GET", "/gradio_api/openapi.json", {}, 404),
        ("GET", "/gradio_api/mcp/sse", {}, 404),
        ("GET", "/gradio_api/file=/etc/passwd", {}, 404),
        ("GET", "/gradio_api/file=http://evil.example/", {}, 404),
        ("GET", "/gradio_api/proxy=http://evil.example/", {}, 404),
        ("GET", "/gradio_api/deep_link", {}, 404),
        ("GET", "/config", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/openapi.json", {}, 404),
        ("GET", "/monitoring", {}, 404),
        ("GET", "/static/..%2f..%2f..%2froutes.py", {}, 404),
        ("GET", "/assets/%2e%2e/%2e%2e/index.html", {}, 404),
        ("PUT", "/", {}, 404),
    ],
)
def test_only_the_pages_own_requests_pass(reader, method, path, headers, status):
    response = reader.request(method, path, headers=headers)
    assert response.status_code in ((status, 403) if path.startswith(("/static", "/assets")) else (status,))
    assert "access-control-allow-origin" not in response.headers or headers.get("origin") != EVIL


def test_bodies_are_small_and_hold_no_files(reader):
    file = {"path": "/etc/passwd", "url": "http://evil.example/x", "meta": {"_type": "gradio.FileData"}}
    for content, status in (
        (b"{" * (1 << 19), 413),
        (iter([b" " * 70_000] * 9), 413),  # without a length
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (json.dumps({"data": [file], "fn_index": 0, "session_hash": "a"}).encode(), 400),
    ):
        response = reader.post("/gradio_api/queue/join", content=content, headers=JSON)
        assert response.status_code == status, response.text


def test_no_websocket(reader):
    with pytest.raises(WebSocketDisconnect), reader.websocket_connect("/gradio_api/queue/join"):
        pass


def test_a_page_for_the_network():
    """It answers to IP addresses and to the machine's name, not to names that anybody may point at it."""
    from tools.request_filter import RequestFilter, own_names

    def is_own(listens_on, host):
        return RequestFilter(None, own_names(listens_on)).is_own(host)

    assert is_own("0.0.0.0", "192.168.1.7:7860") and is_own("::", "[fe80::1]:7860")
    assert is_own("0.0.0.0", f"{socket.gethostname()}:7860") and not is_own("0.0.0.0", "evil.example")
    assert is_own("gpu-box", "GPU-box:7860") and not is_own("gpu-box", "192.168.1.7:7860")


def test_a_port_that_is_taken(run_script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_script(f"tools/chat.py --model_name_or_path {BASE} --web --port {port}")
    assert result.code == 2 and f"--port {port}: Address already in use" in result.err and result.err.count("\n") == 1


@pytest.fixture
def page(tmp_path, flags):
    """The address of the page that `--web` serves."""
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "tools/chat.py", *f"{flags} --repetition_penalty 0.5 --web --port {port}".split()],
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
def test_page(page, tmp_path, expected, adapter):
    """
    Two questions typed; both columns answer, each with its own history. An answer is stopped; an icon clears one.

    The browser is Chinese and dark, on a phone.
    """
    from playwright.sync_api import expect, sync_playwright

    def ask(question):
        tab.wait_for_timeout(300)  # Gradio's page loses an event sent within 50 ms of the end of another
        tab.locator("#question textarea").fill(question)
        tab.locator("#send").click()

    def set_number(name, value):
        number = tab.locator(f"#{name} input[type=number]")
        tab.wait_for_timeout(300)  # a field that has just been drawn takes its first value once more
        number.fill(str(value))
        number.press("Tab")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark", locale="zh-CN")
        tab.goto(page)
        expect(tab.locator("#heading")).to_contain_text(f"{BASE} (ChatGLM-6B)")
        expect(tab.locator("#heading")).to_contain_text(str(adapter))
        expect(tab.locator("#send")).to_have_text("发送")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        tab.get_by_text("生成设置").click()
        set_number("repetition_penalty", 1)
        for number, question in enumerate(QUESTIONS):
            ask(question)
            for side in ("adapter", "base"):
                answer = " ".join(expected[side][number].split())
                expect(tab.locator(f"#{side}")).to_contain_text(answer, timeout=60_000)
                expect(tab.locator(f"#{side}")).to_contain_text(question)
            expect(tab.locator("#stop")).to_be_hidden()
            if number == 0:  # nothing has scrolled
                label, first = (tab.locator(f"#adapter {part}").bounding_box() for part in ("label", ".user .message"))
                assert label["y"] + label["height"] <= first["y"]

        tab.locator("#base button[title='清空对话']").click()
        expect(tab.locator("#base")).not_to_contain_text(QUESTIONS[1])
        ask(QUESTIONS[0])  # the base answers it as its first, the adapter as its third
        expect(tab.locator("#base")).to_contain_text(" ".join(expected["base"][0].split()), timeout=60_000)
        expect(tab.locator("#adapter .user")).to_have_count(3)
        expect(tab.locator("#base .user")).to_have_count(1)
        expect(tab.locator("#stop")).to_be_hidden()

        with socket.create_server(("127.0.0.1", 0)) as elsewhere:
            address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
            ask(f"![picture]({address}) <img src='{address}'>")
            expect(tab.locator("#base img[src$='x.png']")).to_have_count(2, timeout=60_000)
            expect(tab.locator("#stop")).to_be_hidden()
            elsewhere.settimeout(0.1)
            with pytest.raises(TimeoutError):
                elsewhere.accept()

        tab.locator("#clear").click()
        expect(tab.locator("#base")).not_to_contain_text(QUESTIONS[0])
        set_number("max_new_tokens", 4000)
        set_number("repetition_penalty", 0.5)  # an answer without end
        ask("太长" * 900)
        expect(tab.locator("#notice")).to_contain_text("模型最多 512 个：请缩短")
        expect(tab.locator("#question textarea")).to_have_value("太长" * 900)
        ask(QUESTIONS[0])
        expect(tab.locator("#stop")).to_be_visible(timeout=60_000)
        expect(tab.locator("#notice")).to_be_hidden()
        expect(tab.locator("#question textarea")).to_have_value("")
        expect(tab.locator("#adapter .bot")).to_be_visible(timeout=60_000)
        expect(tab.locator("#base .bot")).to_be_visible()
        tab.locator("#stop").click()
        expect(tab.locator("#send")).to_be_visible()
        tab.wait_for_timeout(300)
        stopped = tab.locator("#adapter .bot").inner_text()
        tab.wait_for_timeout(700)
        assert tab.locator("#adapter .bot").inner_text() == stopped and 0 < len(stopped) < 4000
        tab.screenshot(path=str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000
        browser.close()


@pytest.mark.parametrize(
    "flags, words",
    [("--temperature -1", "--temperature"), ("--top_p 0", "--top_p"), ("--max_new_tokens 0", "--max_new_tokens")],
)
def test_wrong_use(run_script, flags, words):
    result = run_script(f"tools/chat.py --model_name_or_path {BASE} {flags}")
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
