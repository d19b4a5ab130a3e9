"""
python tools/make_images.py

Makes the pictures of the README in docs/images: demo.svg and train.svg (what two real runs print), loss.png, and
report.png and chat.png (screenshots, which need Chromium and pip install playwright). Takes some minutes on two cores.
"""

import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.common.console import print_facts, print_line
from utils.common.errors import RunError, UsageError
from utils.common.flags import FlagParser
from utils.distributed.process_group import free_port

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
MODEL = "data/chatglm-tiny"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 150_000  # of a picture: a README is read over slow lines too
BAR = "━"  # of rich's progress bars
COLUMNS, LINES = 100, 46  # of a terminal's picture: the first and the last lines of a longer output
PICTURES = ("demo", "train", "loss", "report", "chat")
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def commands(demo: Path, port: int) -> dict[str, str]:
    """Return the commands by name, as typed; each uses what those before it made."""
    model = f"--model_name_or_path {MODEL}"
    return {
        "demo": f"python tools/demo.py --work_dir {demo} --master_port {port}",
        "tokens": f"python tokenize_dataset_rows_belle.py {model} --jsonl_path data/sample.train.json "
        f"--save_path output/tokens --max_seq_length 200 --skip_overlength",
        "train": f"python multi_gpu_fintune_belle.py {model} --dataset_path output/tokens --lora_rank 8 "
        f"--per_device_train_batch_size 16 --num_train_epochs 8 --learning_rate 6e-3 --logging_steps 5 "
        f"--eval_fraction 0.05 --eval_strategy steps --eval_steps 20 --save_steps 1000 --output_dir output",
        "report": f"python tools/evaluate.py {model} --input_path data/sample.heldout.json --adapter_path output "
        f"--max_new_tokens 64 --output_dir output/report",
        "chat": f"python tools/chat.py {model} --adapter_path output --web --port {port}",
    }


def link_repository(work: Path) -> None:
    """Link what is in this repository into `work`, so that commands there write to an output of their own."""
    for path in ROOT.iterdir():
        if path.name not in ("output", ".git"):
            (work / path.name).symlink_to(path)


def record(command: str, work: Path) -> bytes:
    """
    Run a command in `work`, in a terminal of its own, and return what it prints there.

    Raises:
        RunError: the command failed.
    """
    print_line(f"$ {command}")
    master, slave = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        shlex.split(command), cwd=work, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=os.environ | size
    )
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    if process.wait():
        raise RunError(f"the command failed: {command}\n{output[-2000:].decode(errors='replace')}")
    return output


def last_state(line: str) -> str:
    """
    Return what remains of a line on the screen: a progress bar returns to its start and is erased.

    >>> last_state("1 of 2\\x1b[2K\\r2 of 2")
    '2 of 2'
    """
    kept = [part for part in re.split(r"\r|\x1b\[2K", line) if re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).strip()]
    return re.sub(r"\x1b\[[0-9;?]*[A-HJKSTfhlnsu]", "", kept[-1]) if kept else ""


def draw_terminal(command: str, output: bytes, path: Path, demo: Path) -> None:
    """Write an SVG of a terminal in which `command` printed `output`; paths are those of this repository."""
    from rich.console import Console
    from rich.text import Text

    text = output.decode(errors="replace").replace(str(demo), "data/demo").replace(f"{ROOT}/", "")
    text = re.sub(r" --master_port \d+", "", text)  # a free port, so that no other run is in the way
    lines = [last_state(line) for line in text.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if BAR not in line]  # which the terminal has erased
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], f"\x1b[2m... {len(lines) - LINES} lines ...\x1b[0m", *lines[-LINES // 2 :]]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in [f"\x1b[1m$ {command}\x1b[0m", *lines]:
        console.print(Text.from_ansi(line), overflow="fold")
    picture = console.export_svg(title=command.split()[1], unique_id=path.stem)
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # fonts from the network
    # rich gives Chinese texts the length of as many Latin letters, which squeezes them.
    picture = re.sub(r' textLength="[^"]*"(?=[^>]*>[^<]*[\u2e80-\uffef])', "", picture)
    path.write_text(picture, encoding="utf-8")


def find_browser() -> str:
    """
    Return Chromium's path.

    Raises:
        UsageError: there is none, or playwright, which drives it, is not installed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        import playwright  # noqa: F401
    except ImportError:
        browser = None
    if browser is None:
        raise UsageError(
            "report.png and chat.png need Chromium and playwright: apt-get install chromium; pip install playwright; "
            "or choose others with --only"
        )
    return browser


def photograph(browser: str, address: str, path: Path, question: str | None = None) -> None:
    """Write a screenshot of a page in light colours; on the chat page a question is asked first."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=list(CHROMIUM_FLAGS))
        tab = chromium.new_page(viewport={"width": 1100, "height": 830}, color_scheme="light", locale="en-US")
        tab.goto(address)
        if question:
            tab.locator("#question textarea").fill(question)
            tab.locator("#send").click()
            tab.locator("#base .bot").wait_for(timeout=60_000)
            tab.locator("#send").wait_for(timeout=60_000)
            tab.wait_for_timeout(500)
        else:
            tab.set_viewport_size({"width": 1100, "height": 1500})
            tab.locator(".figures").evaluate("figures => figures.remove()")  # scores and rows in one picture
        tab.screenshot(path=str(path))
        chromium.close()
    with Image.open(path) as picture:  # a third of the bytes, and no difference to see
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def photograph_chat(browser: str, command: str, port: int, work: Path) -> None:
    """Write chat.png, of the page that `command` serves when it runs in `work`."""
    print_line(f"$ {command}")
    process = subprocess.Popen(shlex.split(command), cwd=work, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if f":{port}" in line:
                break
        address = f"http://127.0.0.1:{port}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(100):
            try:
                opener.open(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RunError(f"the command failed: {command}") from None
        photograph(browser, address, IMAGES / "chat.png", "把下面的句子写成日记:\n老李今天在家里拍照")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PICTURES, default=PICTURES, help="pictures to make (default: all)"
    )
    chosen = parser.parse_args().only
    browser = find_browser() if {"report", "chat"} & set(chosen) else ""
    IMAGES.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        link_repository(work)
        lines = commands(work / "demo", port)
        if "demo" in chosen:
            draw_terminal("python tools/demo.py", record(lines["demo"], work), IMAGES / "demo.svg", work / "demo")
        if set(chosen) != {"demo"}:
            record(lines["tokens"], work)
            output = record(lines["train"], work)
            if "train" in chosen:
                draw_terminal(lines["train"], output, IMAGES / "train.svg", work / "demo")
            if "loss" in chosen:
                shutil.copyfile(work / "output" / "loss.png", IMAGES / "loss.png")
        if "report" in chosen:
            record(lines["report"], work)
            photograph(browser, (work / "output" / "report" / "report.html").as_uri(), IMAGES / "report.png")
        if "chat" in chosen:
            photograph_chat(browser, lines["chat"], port, work)
    made = {path.name: f"{path.stat().st_size:,} bytes" for path in sorted(IMAGES.glob("*")) if path.stem in chosen}
    print_facts(f"done: {IMAGES.relative_to(ROOT)}", made)
    large = [name for name in made if (IMAGES / name).stat().st_size > MOST_BYTES]
    if large:
        raise RunError(f"{', '.join(large)}: more than {MOST_BYTES:,} bytes, too large for a README")


if __name__ == "__main__":
    run(main)
