"""
python tools/chat.py --adapter_path output

A chat in the terminal, with the adapter or without one the base model; the history is told to the model in its
generation's own form. /clear forgets it, /base and /adapter switch, /quit ends. With --web a page in the browser, on
which base and adapter answer side by side; that needs pip install -r tools/requirements.txt.
"""

import argparse
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from utils.checkpoint.directory import add_model_flags, choose_generation
from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.code_caches import user_cache
from utils.common.errors import Faults, UsageError
from utils.common.terminal import escape_controls
from utils.inference.arguments import check_sampling, resolve_dtype
from utils.inference.job import check_adapters, resolve_template
from utils.inference.placement import dispatch, input_device
from utils.inference.stop_strings import decode
from utils.layers.quantization import BITS
from utils.lora.adapter import load_adapter
from utils.models.conversation import Message
from utils.models.templates import TEMPLATES, ChatTemplate, encode_prompt

UNFINISHED = "\ufffd"  # bytes of a character whose other tokens are still to come
LOOPBACK = "127.0.0.1"
MAX_QUESTION = 20_000  # characters, on the page
SETTINGS = {  # of the page: from, to
    "max_new_tokens": (1, 4096),
    "temperature": (0, 2),
    "top_p": (0.05, 1),
    "repetition_penalty": (0.5, 2),
}
MAX_WAITING = 32  # questions of all readers of the page


@dataclass(frozen=True)
class Choices:
    """How an answer is generated; a temperature of 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class _Tokens(BaseStreamer):
    """Takes over what `generate` makes: the prompt first, then a token at a time."""

    def __init__(self):
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.saw_prompt:
            self.queue.put(value.flatten().tolist())
        self.saw_prompt = True

    def end(self) -> None:
        self.queue.put(None)


class _Abandoned(StoppingCriteria):
    """Ends an answer that nobody waits for."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass
class Chat:
    """
    A model to talk to, with an adapter that can be switched off. Answers come one after the other, for the switch is
    the model's: an answer that has been abandoned has ended before the next one begins.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    has_adapter: bool
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, messages: Sequence[Message], choices: Choices, use_adapter: bool = True) -> Iterator[str]:
        """
        Yields the answer to the last message as far as it has come, again and again; the last one is the whole. Closed
        before that, it stops the model at its next token.

        Raises:
            Exception: what `generate` raised.
        """
        input_ids = torch.tensor([encode_prompt(self.tokenizer, messages, self.template)])
        tokens, failure, abandoned = _Tokens(), [], _Abandoned()
        sampling = {"temperature": choices.temperature, "top_p": choices.top_p} if choices.temperature else {}

        def work() -> None:
            off = self.has_adapter and not use_adapter
            try:
                adapter = self.model.disable_adapter() if off else contextlib.nullcontext()
                with self.lock, torch.inference_mode(), adapter:
                    if abandoned.event.is_set():
                        return
                    self.model.generate(
                        input_ids=input_ids.to(input_device(self.model)),
                        attention_mask=torch.ones_like(input_ids, device=input_device(self.model)),
                        max_new_tokens=choices.max_new_tokens,
                        do_sample=bool(choices.temperature),
                        num_beams=1,
                        repetition_penalty=choices.repetition_penalty,
                        eos_token_id=self.template.stop_ids(self.tokenizer),
                        pad_token_id=self.tokenizer.pad_token_id,
                        streamer=tokens,
                        stopping_criteria=[abandoned],
                        **sampling,
                    )
            except Exception as error:
                failure.append(error)
                tokens.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        ids, stops = [], set(self.template.stop_ids(self.tokenizer))
        try:
            while (new := tokens.queue.get()) is not None:
                ids += [token for token in new if token not in stops]
                yield self._text(ids).rstrip(UNFINISHED)
        finally:
            abandoned.event.set()
        worker.join()
        if failure:
            raise failure[0]
        yield self._text(ids)

    def _text(self, ids: Sequence[int]) -> str:
        return self.template.clean(decode(self.tokenizer, ids))


def talk(chat: Chat, choices: Choices) -> None:
    """The conversation in the terminal."""
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
            for text in chat.answer(messages, choices, use_adapter):
                if text.startswith(shown):
                    print(escape_controls(text[len(shown) :]), end="", flush=True)
                    shown = text
            print(flush=True)
            messages.append(Message("assistant", text))


def make_page(chat: Chat, choices: Choices):
    """
    The Gradio page: a column for the adapter, where there is one, and one for the base, each with its own history,
    which stays on the server.
    """
    import gradio

    sides = ["adapter", "base"] if chat.has_adapter else ["base"]
    room = chat.model.config.max_position_embeddings
    bounds = {name: (low, max(high, getattr(choices, name))) for name, (low, high) in SETTINGS.items()}

    def shown(history: list[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in history]

    def check(question: str, histories: list[list[Message]], values: Sequence[float]) -> Choices:
        """What a browser sends may be anything, whatever the page's own fields allow."""
        if len(question) > MAX_QUESTION:
            raise gradio.Error(f"a question has {MAX_QUESTION} characters at most")
        for (name, (low, high)), value in zip(bounds.items(), values, strict=True):
            if not isinstance(value, int | float) or not low <= value <= high:
                raise gradio.Error(f"{name} is a number from {low} to {high}")
        for history in histories:
            asked = encode_prompt(chat.tokenizer, [*history, Message("user", question)], chat.template)
            if len(asked) > room:
                raise gradio.Error(f"the conversation has {len(asked)} tokens, the model takes {room}: clear it")
        return Choices(int(values[0]), *values[1:])

    def respond(question, histories, *values):
        if not question or not question.strip():
            yield "", histories, *map(shown, histories)
            return
        chosen = check(question, histories, values)
        histories = [[*history, Message("user", question)] for history in histories]
        yield "", histories, *map(shown, histories)
        for place, side in enumerate(sides):
            before = histories[place]
            with contextlib.closing(chat.answer(before, chosen, side == "adapter")) as texts:
                for text in texts:
                    histories[place] = [*before, Message("assistant", text)]
                    yield "", histories, *map(shown, histories)

    with gradio.Blocks(title="ChatGLM", analytics_enabled=False) as page:
        histories = gradio.State([[] for _ in sides])
        with gradio.Row():
            boxes = [gradio.Chatbot(label=side, elem_id=side, height=480) for side in sides]
        question = gradio.Textbox(label="question", elem_id="question", autofocus=True, max_length=MAX_QUESTION)
        with gradio.Row():
            send = gradio.Button("send", variant="primary", elem_id="send")
            clear = gradio.Button("clear", elem_id="clear")
        with gradio.Accordion("settings", open=False):
            labels = ("max_new_tokens (tokens)", "temperature (0: greedy)", "top_p", "repetition_penalty")
            settings = [
                gradio.Slider(*bounds[name], getattr(choices, name), step=1 if whole else 0.05, label=label)
                for name, label, whole in zip(bounds, labels, (True, False, False, False), strict=True)
            ]
        asked = [
            event(
                respond,
                [question, histories, *settings],
                [question, histories, *boxes],
                concurrency_id="model",
                api_visibility="private",
            )
            for event in (question.submit, send.click)
        ]
        clear.click(
            lambda: ([[] for _ in sides], *([] for _ in sides)),
            None,
            [histories, *boxes],
            cancels=asked,
            api_visibility="private",
        )
    return page.queue(max_size=MAX_WAITING, api_open=False)


def make_app(chat: Chat, choices: Choices):
    """The page as an ASGI application, for tools/page_doors.py, without what of Gradio it does not need."""
    import fastapi
    import gradio

    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # others come from the network
    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        make_page(chat, choices),
        "/",
        footer_links=[],
        run_history=False,
        app_kwargs={"openapi_url": None},
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    add_model_flags(model)
    model.add_argument("--adapter_path", nargs=1, default=[], metavar="ADAPTER", help="adapter to talk to (none)")
    model.add_argument("--any_base", action="store_true", help="take an adapter that was trained on other weights")
    model.add_argument("--lora_alpha", type=int, help="of a chatglm-lora.pt, which does not record it (32)")
    model.add_argument("--quantize", choices=BITS, help="hold the weights in 8 or 4 bits")
    model.add_argument("--fp16", action="store_true", help="float16 weights: the default on a GPU")
    model.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    model.add_argument("--fp32", action="store_true", help="float32 weights: the default without a GPU")
    model.add_argument("--template", choices=TEMPLATES, help="form of the prompts (the adapter's, else native)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer, at most (%(default)s)")
    answers.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (%(default)s)")
    answers.add_argument("--top_p", type=float, default=1.0, help="sample among this much probability (%(default)s)")
    answers.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1 against repeating (%(default)s)"
    )
    web = parser.add_argument_group("page")
    web.add_argument("--web", action="store_true", help="a page in the browser instead of the terminal")
    web.add_argument("--host", default=LOOPBACK, help="address to listen on; 0.0.0.0: all the network (%(default)s)")
    web.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    args = parser.parse_args()
    choose_generation(args.model_name_or_path, args.generation)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: with every fault.
    """
    faults = Faults()
    if args.max_new_tokens < 1:
        faults.add(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    check_sampling(args, faults)
    faults.report()
    check_adapters(args)


def open_chat(args: argparse.Namespace) -> Chat:
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = resolve_template(args, tokenizer)
    checkpoint = Checkpoint.open(args.model_name_or_path, quantize=args.quantize)
    model = dispatch(checkpoint, resolve_dtype(args))
    for path in args.adapter_path:
        model = load_adapter(model, path, args.lora_alpha)
    return Chat(model, tokenizer, template, bool(args.adapter_path))


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    choices = Choices(args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty)
    if not args.web:
        talk(open_chat(args), choices)
        return
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", str(user_cache("gradio")))  # by default /tmp/gradio, which is everybody's
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError("--web: gradio is not installed: pip install -r tools/requirements.txt") from None
    from tools.page_doors import bind, serve

    bound = bind(args.host, args.port)
    app = make_app(open_chat(args), choices)
    host, port = bound.getsockname()[:2]
    print(f"the page: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    serve(app, args.host, bound)


if __name__ == "__main__":
    run(main)
