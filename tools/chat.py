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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.answer_text import decode
from utils.checkpoint import load_tokenizer
from utils.errors import Faults, UsageError, run
from utils.inference_options import check_adapters, check_sampling, resolve_dtype, resolve_template
from utils.lora import load_adapter
from utils.placement import dispatch, input_device
from utils.prompts import TEMPLATES, ChatGLMTemplate, encode_prompt
from utils.quantization import BITS
from utils.rows import Message
from utils.tokenizer_files import add_model_flags, choose_generation

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"  # bytes of a character whose other tokens are still to come
LOOPBACK = "127.0.0.1"


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


@dataclass
class Chat:
    """A model to talk to, with an adapter that can be switched off."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatGLMTemplate
    has_adapter: bool

    def answer(self, messages: Sequence[Message], choices: Choices, use_adapter: bool = True) -> Iterator[str]:
        """
        Yields the answer to the last message as far as it has come, again and again; the last one is the whole.

        Raises:
            Exception: what `generate` raised.
        """
        input_ids = torch.tensor([encode_prompt(self.tokenizer, messages, self.template)])
        tokens, failure = _Tokens(), []
        sampling = {"temperature": choices.temperature, "top_p": choices.top_p} if choices.temperature else {}

        def work() -> None:
            off = self.has_adapter and not use_adapter
            try:
                with torch.inference_mode(), self.model.disable_adapter() if off else contextlib.nullcontext():
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
                        **sampling,
                    )
            except Exception as error:
                failure.append(error)
                tokens.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        ids, stops = [], set(self.template.stop_ids(self.tokenizer))
        while (new := tokens.queue.get()) is not None:
            ids += [token for token in new if token not in stops]
            yield self._text(ids).rstrip(UNFINISHED)
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
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            print(flush=True)
            messages.append(Message("assistant", text))


def make_page(chat: Chat, choices: Choices):
    """
    The Gradio page: a column for the adapter, where there is one, and one for the base, each with its own history.

    Raises:
        UsageError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UsageError("--web: gradio is not installed: pip install -r tools/requirements.txt") from None
    sides = ["adapter", "base"] if chat.has_adapter else ["base"]

    def shown(history: list[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in history]

    def respond(question, histories, max_new_tokens, temperature, top_p, repetition_penalty):
        if not question.strip():
            yield "", histories, *map(shown, histories)
            return
        chosen = Choices(int(max_new_tokens), temperature, top_p, repetition_penalty)
        histories = [[*history, Message("user", question)] for history in histories]
        yield "", histories, *map(shown, histories)
        for place, side in enumerate(sides):
            before = histories[place]
            for text in chat.answer(before, chosen, side == "adapter"):
                histories[place] = [*before, Message("assistant", text)]
                yield "", histories, *map(shown, histories)

    with gradio.Blocks(title="ChatGLM") as page:
        histories = gradio.State([[] for _ in sides])
        with gradio.Row():
            boxes = [gradio.Chatbot(label=side, elem_id=side, height=480) for side in sides]
        question = gradio.Textbox(label="question", elem_id="question", autofocus=True)
        with gradio.Row():
            send = gradio.Button("send", variant="primary", elem_id="send")
            clear = gradio.Button("clear", elem_id="clear")
        with gradio.Accordion("settings", open=False):
            settings = [
                gradio.Slider(1, 4096, choices.max_new_tokens, step=1, label="max_new_tokens (tokens)"),
                gradio.Slider(0, 2, choices.temperature, step=0.05, label="temperature (0: greedy)"),
                gradio.Slider(0.05, 1, choices.top_p, step=0.05, label="top_p"),
                gradio.Slider(0.5, 2, choices.repetition_penalty, step=0.05, label="repetition_penalty"),
            ]
        for event in (question.submit, send.click):
            event(respond, [question, histories, *settings], [question, histories, *boxes], concurrency_id="model")
        clear.click(lambda: ([[] for _ in sides], *([] for _ in sides)), None, [histories, *boxes])
    return page


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
    model = dispatch(args.model_name_or_path, resolve_dtype(args), None, None, args.quantize)
    for path in args.adapter_path:
        model = load_adapter(model, path, args.lora_alpha)
    return Chat(model, tokenizer, template, bool(args.adapter_path))


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    chat = open_chat(args)
    choices = Choices(args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty)
    if not args.web:
        talk(chat, choices)
        return
    page = make_page(chat, choices)
    import gradio

    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # others come from the network
    page.launch(server_name=args.host, server_port=args.port, theme=theme)


if __name__ == "__main__":
    run(main)
