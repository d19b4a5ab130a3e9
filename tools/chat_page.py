"""
The page of tools/chat.py --web: adapter and base answer side by side.

In: a `Chat` and the settings that the page starts with. Out: a Gradio page as an ASGI application, which
tools/request_filter.py serves. What a browser sends is checked here again, whatever the page's own fields allow.
"""

import contextlib
from collections.abc import Sequence

import fastapi
import gradio

from tools.chat_model import Chat, ChatSettings
from utils.models.conversation import Message
from utils.models.templates import encode_prompt

MAX_QUESTION = 20_000  # characters
MAX_WAITING = 32  # questions of all readers of the page
BOUNDS = {  # of the settings on the page: (lowest, highest)
    "max_new_tokens": (1, 4096),
    "temperature": (0, 2),
    "top_p": (0.05, 1),
    "repetition_penalty": (0.5, 2),
}
LABELS = {"max_new_tokens": "max_new_tokens (tokens)", "temperature": "temperature (0: greedy)"}


def make_page(chat: Chat, defaults: ChatSettings) -> gradio.Blocks:
    """Return the page: a box for adapter and base each, with its own history."""
    sides = ["adapter", "base"] if chat.has_adapter else ["base"]
    max_tokens = chat.model.config.max_position_embeddings
    bounds = {name: (low, max(high, getattr(defaults, name))) for name, (low, high) in BOUNDS.items()}

    def as_dicts(history: list[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in history]

    def check(question: str, histories: list[list[Message]], values: Sequence[float]) -> ChatSettings:
        """Return the settings that a browser sent, or raise gradio.Error."""
        if len(question) > MAX_QUESTION:
            raise gradio.Error(f"a question has {MAX_QUESTION} characters at most")
        for (name, (low, high)), value in zip(bounds.items(), values, strict=True):
            if not isinstance(value, int | float) or not low <= value <= high:
                raise gradio.Error(f"{name} is a number from {low} to {high}")
        for history in histories:
            tokens = len(encode_prompt(chat.tokenizer, [*history, Message("user", question)], chat.template))
            if tokens > max_tokens:
                raise gradio.Error(f"the conversation has {tokens} tokens, the model takes {max_tokens}: clear it")
        return ChatSettings(int(values[0]), *values[1:])

    def respond(question, histories, *values):
        if not question or not question.strip():
            yield "", histories, *map(as_dicts, histories)
            return
        settings = check(question, histories, values)
        histories = [[*history, Message("user", question)] for history in histories]
        yield "", histories, *map(as_dicts, histories)
        for index, side in enumerate(sides):
            messages = histories[index]
            with contextlib.closing(chat.answer(messages, settings, side == "adapter")) as texts:
                for text in texts:
                    histories[index] = [*messages, Message("assistant", text)]
                    yield "", histories, *map(as_dicts, histories)

    with gradio.Blocks(title="ChatGLM", analytics_enabled=False) as page:
        histories = gradio.State([[] for _ in sides])
        with gradio.Row():
            boxes = [gradio.Chatbot(label=side, elem_id=side, height=480) for side in sides]
        question = gradio.Textbox(label="question", elem_id="question", autofocus=True, max_length=MAX_QUESTION)
        with gradio.Row():
            send = gradio.Button("send", variant="primary", elem_id="send")
            clear = gradio.Button("clear", elem_id="clear")
        with gradio.Accordion("settings", open=False):
            sliders = [
                gradio.Slider(
                    *bounds[name],
                    getattr(defaults, name),
                    step=1 if name == "max_new_tokens" else 0.05,
                    label=LABELS.get(name, name),
                )
                for name in bounds
            ]
        answering = [
            event(
                respond,
                [question, histories, *sliders],
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
            cancels=answering,
            api_visibility="private",
        )
    return page.queue(max_size=MAX_WAITING, api_open=False)


def make_app(chat: Chat, defaults: ChatSettings) -> fastapi.FastAPI:
    """Return the page as an ASGI application, without what it does not need."""
    theme = gradio.themes.Default(
        font=["sans-serif"], font_mono=["monospace"]
    )  # the default ones come from the network
    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        make_page(chat, defaults),
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
