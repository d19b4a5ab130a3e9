"""
python tools/chat.py --adapter_path output

A chat in the terminal, with an adapter or with the base model alone. The model sees the whole conversation, in the
chat format of its generation. /clear forgets it, /base and /adapter switch, /quit ends. With --web a page in the
browser (tools/chat_page.py), on which base and adapter answer side by side; that needs
pip install -r tools/requirements.txt.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from tools.chat_model import Chat, ChatSettings
from utils.checkpoint.model import Checkpoint
from utils.common.code_caches import user_cache
from utils.common.errors import Faults, UsageError
from utils.common.terminal import escape_controls
from utils.inference.arguments import ModelFlags, check_minimums, check_sampling, flag, parse_flags, resolve_dtype
from utils.inference.job import check_adapters, open_checkpoint, resolve_template
from utils.inference.placement import dispatch
from utils.lora.adapter import load_adapter
from utils.models.conversation import Message

LOOPBACK = "127.0.0.1"


@dataclass(kw_only=True)
class ChatModelFlags(ModelFlags):
    """ModelFlags of a chat, which has one adapter."""

    _argument_group_name = "model"

    adapter_path: list[str] = flag("adapter to talk to", [], metavar="ADAPTER")


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
        if len(self.adapter_path) > 1:
            faults.add(f"--adapter_path: {len(self.adapter_path)} adapters, but a chat has one: give one")
        return faults


def talk(chat: Chat, settings: ChatSettings) -> None:
    """Run the conversation in the terminal until /quit or the end of the input."""
    messages: list[Message] = []
    use_adapter = chat.has_adapter
    while True:
        try:
            question = input("问> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print(f"the line is not {error.encoding}: type it again", flush=True)
            continue
        if question == "/quit":
            return
        if question == "/clear":
            messages.clear()
        elif question in ("/base", "/adapter"):
            use_adapter = question == "/adapter" and chat.has_adapter
            print("the adapter answers" if use_adapter else "the base answers", flush=True)
        elif question:
            messages.append(Message("user", question))
            shown = ""
            for text in chat.answer(messages, settings, use_adapter):
                if text.startswith(shown):
                    print(escape_controls(text[len(shown) :]), end="", flush=True)
                    shown = text
            print(flush=True)
            messages.append(Message("assistant", text))


def open_chat(args: ChatArguments, checkpoint: Checkpoint) -> Chat:
    """
    Load tokenizer, model and adapter.

    Raises:
        UsageError: the checkpoint or the adapter cannot be used.
    """
    tokenizer = checkpoint.load_tokenizer()
    template = resolve_template(args, tokenizer)
    model = dispatch(checkpoint, resolve_dtype(args), quantize=args.quantize)
    for path in args.adapter_path:
        model = load_adapter(model, path, args.lora_alpha)  # never merged: it can be switched off
    return Chat(model, tokenizer, template, bool(args.adapter_path))


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
    app = make_app(open_chat(args, checkpoint), args)
    host, port = bound.getsockname()[:2]
    print(f"the page: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    serve(app, args.host, bound)


def main() -> None:
    args = parse_flags(ChatArguments, __doc__)
    args.collect_faults().report()
    checkpoint = open_checkpoint(args)
    check_adapters(args, checkpoint)
    if args.web:
        serve_page(args, checkpoint)
    else:
        talk(open_chat(args, checkpoint), args)


if __name__ == "__main__":
    run(main)
