"""
python tools/chat.py --adapter_path output

A chat in the terminal, with an adapter or with the base model alone. The model sees the whole conversation, in the
chat format of its generation. /help lists the commands, Ctrl-C stops an answer, /quit ends. With --web a page in the
browser (tools/chat_page.py), on which base and adapter answer side by side; that needs
pip install -r tools/requirements.txt.
"""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from tools.chat_model import Chat, ChatSettings
from utils.checkpoint.model import Checkpoint
from utils.common.code_caches import user_cache
from utils.common.console import DIM, print_facts, print_line, style
from utils.common.errors import Faults, UsageError
from utils.common.signals import on_signals
from utils.common.terminal import escape_controls
from utils.inference.arguments import ModelFlags, check_minimums, check_sampling, choose_dtype, flag, parse_flags
from utils.inference.job import check_adapters, choose_template, open_checkpoint
from utils.inference.placement import dispatch, input_device, prepare_for_decoding
from utils.lora.multi_lora import add_adapters
from utils.models.conversation import Message

LOOPBACK = "127.0.0.1"
CONTINUES = "\\"  # at the end of a line
ADAPTER_COMMANDS = ("/adapter", "/base")
COMMANDS = {
    "/help": "list the commands",
    "/clear": "forget the conversation",
    "/adapter": "let the adapter answer",
    "/base": "let the base model answer",
    "/quit": "end (so does Ctrl-D)",
    CONTINUES: "at the end of a line: the question continues on the next",
}
HINT = f"/help lists them, a line that ends in {CONTINUES} continues, Ctrl-C stops an answer, /quit or Ctrl-D ends"


@dataclass(kw_only=True)
class ChatModelFlags(ModelFlags):
    """ModelFlags of a chat, which has one adapter: parsed as one value, kept as the list that the checks take."""

    _argument_group_name = "model"

    adapter_path: str | None = flag("adapter to talk to", metavar="ADAPTER")

    def __post_init__(self) -> None:
        self.adapter_path = [self.adapter_path] if self.adapter_path else []


@dataclass(kw_only=True)
class PageFlags:
    """Where the page is served."""

    _argument_group_name = "page"

    web: bool = flag("a page in the browser instead of the terminal", False)
    host: str = flag("address to listen on; 0.0.0.0: the whole network", LOOPBACK)
    port: int = flag("port to listen on", 7860)


@dataclass(kw_only=True)
class ChatArguments(ChatModelFlags, ChatSettings, PageFlags):
    """All flags of this tool."""

    def collect_faults(self) -> Faults:
        """Return every mistake in the flags."""
        faults = Faults()
        check_minimums(self, faults, max_new_tokens=1)
        check_sampling(self.temperature, self.top_p, self.repetition_penalty, faults)
        return faults


def print_banner(title: str, chat: Chat, facts: dict[str, str]) -> None:
    """Print who answers and where it runs, and then `facts`."""
    dtype = str(chat.model.dtype).removeprefix("torch.")
    described = {
        "model": chat.model_name,
        "adapter": chat.adapter_name or "none",
        "template": chat.template.name,
        "weights": f"{dtype} on {input_device(chat.model)}",
    }
    print_facts(title, described | facts)


def talk(chat: Chat, settings: ChatSettings) -> None:
    """Run the conversation in the terminal until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  `input` then has arrow keys and a history, also over Chinese characters
    messages: list[Message] = []
    use_adapter = chat.has_adapter
    while True:
        try:
            question = read_question()
        except EOFError:
            print_line()  # the shell's prompt gets a line of its own
            return
        if question == "/quit":
            return
        if question == "/help":
            has_adapter = chat.has_adapter
            shown = {name: use for name, use in COMMANDS.items() if has_adapter or name not in ADAPTER_COMMANDS}
            print_facts("commands", shown)
        elif question == "/clear":
            messages.clear()
            print_line("the conversation is forgotten", DIM)
        elif question in ADAPTER_COMMANDS:
            use_adapter = question == "/adapter" and chat.has_adapter
            missing = " (there is no adapter)" if question == "/adapter" and not use_adapter else ""
            print_line(f"the {'adapter' if use_adapter else 'base'} answers{missing}", DIM)
        elif question.startswith("/") and question[1:].isascii() and question[1:].isalpha():
            print_line(f"there is no command {question}: /help lists them", DIM)
        elif question:
            messages.append(Message("user", question))
            text = print_answer(chat, messages, settings, use_adapter)
            messages[-1:] = [messages[-1], Message("assistant", text)] if text else []  # stopped before it began


def read_question() -> str:
    """
    Return what the user types: a line, and those after it as long as they continue; Ctrl-C drops it.

    Raises:
        EOFError: the input ends.
    """
    while True:
        try:
            lines = [read_line("> ")]
            while lines[-1].endswith(CONTINUES):
                lines[-1] = lines[-1].removesuffix(CONTINUES)
                lines.append(read_line("  "))
            return "\n".join(lines).strip()
        except UnicodeDecodeError as error:
            print_line(f"the line is not {error.encoding}: type it again")
        except KeyboardInterrupt as stop:
            if "SIGINT" not in str(stop):
                raise
            print_line("\n/quit or Ctrl-D ends", DIM)


def read_line(prompt: str) -> str:
    """Return a line of the input, without blanks around it; a terminal shows `prompt`."""
    return input(prompt if sys.stdin.isatty() else "").strip()


def print_answer(chat: Chat, messages: list[Message], settings: ChatSettings, use_adapter: bool) -> str:
    """Print the answer as it grows and return it; Ctrl-C stops it, and what there is remains."""
    stopped: list[int] = []
    shown = text = ""
    with (
        on_signals(stopped.append, (signal.SIGINT,)),
        contextlib.closing(chat.answer(messages, settings, use_adapter)) as texts,
    ):
        for text in texts:
            if text.startswith(shown):
                print(escape_controls(text[len(shown) :]), end="", flush=True)
                shown = text
            if stopped:
                break
    print(style(" (stopped)", DIM) if stopped else "", flush=True)
    return text


def open_chat(args: ChatArguments, checkpoint: Checkpoint) -> Chat:
    """
    Load tokenizer, model and adapter.

    Raises:
        UsageError: the checkpoint or the adapter cannot be used.
    """
    tokenizer = checkpoint.load_tokenizer()
    template, _ = choose_template(args, tokenizer)
    model = dispatch(checkpoint, choose_dtype(args)[0], quantize=args.quantize)
    if args.adapter_path:  # never merged: each question may take it or not
        add_adapters(model, {path: path for path in args.adapter_path}, args.lora_alpha)
    prepare_for_decoding(model)
    model_name = f"{args.model_name_or_path} ({checkpoint.generation.name})"
    return Chat(model, tokenizer, template, model_name, next(iter(args.adapter_path), None))


def serve_page(args: ChatArguments, checkpoint: Checkpoint) -> None:
    """
    Serve the page until a signal ends the process.

    Raises:
        UsageError: gradio is not installed, the port is taken, or see `open_chat`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", str(user_cache("gradio")))  # the default, /tmp/gradio, is everybody's
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError("--web: gradio is not installed: pip install -r tools/requirements.txt") from None
    from tools.chat_page import make_app
    from tools.request_filter import bind, serve

    bound = bind(args.host, args.port)  # before the model takes its time to load
    with contextlib.closing(open_chat(args, checkpoint)) as chat:
        app = make_app(chat, args)
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print_banner("chat.py --web", chat, {"page": address, "end it with": "Ctrl-C"})
        serve(app, args.host, bound)


def main() -> None:
    args = parse_flags(ChatArguments, __doc__)
    args.collect_faults().report()
    checkpoint = open_checkpoint(args)
    check_adapters(args, checkpoint)
    if args.web:
        serve_page(args, checkpoint)
    else:
        with contextlib.closing(open_chat(args, checkpoint)) as chat:
            print_banner("chat.py", chat, {"commands": HINT})
            talk(chat, args)


if __name__ == "__main__":
    run(main, "the conversation is not kept")
