"""
The page of tools/chat.py --web: adapter and base answer side by side.

In: a `Chat` and the settings that the page starts with. Out: a Gradio page as an ASGI application, which
tools/request_filter.py serves. What a browser sends is checked here again, whatever the page's own fields allow.
Texts are Chinese or English by the browser's language.
"""

import contextlib
import html
from collections.abc import Sequence

import fastapi
import gradio

from tools.chat_model import Chat, ChatSettings
from utils.common.terminal import escape_controls
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
TEXTS = {  # key -> (English, Chinese); the texts of errors have values in braces
    "hint": (
        "Each side has its own history; the bin clears it, for the model too.",
        "两边各有自己的对话历史；点垃圾桶图标即清空，模型也不再记得。",
    ),
    "adapter": ("with the adapter", "使用 adapter"),
    "base": ("base model", "基座模型"),
    "question": ("question", "问题"),
    "placeholder": ("Ask something; Enter sends it, Shift+Enter begins a line", "输入问题，回车发送，Shift+回车换行"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "clear": ("Clear both", "清空对话"),
    "settings": ("Settings", "生成设置"),
    "max_new_tokens": ("max_new_tokens: most tokens of an answer", "max_new_tokens：回答最多的 token 数"),
    "temperature": ("temperature, 0: greedy", "temperature：采样温度，0 为贪心"),
    "top_p": ("top_p: share of the likely tokens", "top_p：核采样的概率"),
    "repetition_penalty": ("repetition_penalty", "repetition_penalty：重复惩罚"),
    "too_long": ("a question has {most} characters at most", "问题最多 {most} 个字符"),
    "not_a_number": ("{name} is a number from {low} to {high}", "{name} 应为 {low} 到 {high} 之间的数"),
    "too_many_tokens": (
        "the conversation has {tokens} tokens, the model takes {most}: clear it",
        "对话有 {tokens} 个 token，模型最多 {most} 个：请清空对话",
    ),
}
STYLE = """
#heading, #heading * { padding: 0 !important }
#heading h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
#heading p { margin: 0; opacity: .75; overflow-wrap: anywhere }
@media (max-width: 700px) {
  #adapter, #base { height: 28vh !important }
  .gradio-container > main { padding: 10px !important }
}
"""


def in_language_of(request: gradio.Request, key: str, **values: object) -> str:
    """Return a text of TEXTS in the language that the browser prefers."""
    is_chinese = request is not None and request.headers.get("accept-language", "").lower().startswith("zh")
    return TEXTS[key][is_chinese].format(**values)


def translations() -> gradio.I18n:
    """Return TEXTS for Gradio, whose page chooses by the browser's language."""
    english, chinese = ({key: pair[i] for key, pair in TEXTS.items()} for i in (0, 1))
    return gradio.I18n(**{"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese})


def heading(chat: Chat) -> str:
    """Return the HTML of the page's heading: model and adapter."""
    model, adapter = (html.escape(escape_controls(name or "-")) for name in (chat.model_name, chat.adapter_name))
    return f"<h1>{model}</h1><p>LoRA adapter: {adapter}</p>"


def answered(history: list[Message]) -> list[Message]:
    """Return the history without a last question that was stopped before its answer began."""
    return history[:-1] if history and history[-1].role == "user" else history


def make_page(chat: Chat, defaults: ChatSettings) -> gradio.Blocks:
    """Return the page: a box for adapter and base each, with its own history."""
    sides = ["adapter", "base"] if chat.has_adapter else ["base"]
    max_tokens = chat.model.config.max_position_embeddings
    bounds = {name: (low, max(high, getattr(defaults, name))) for name, (low, high) in BOUNDS.items()}
    text = translations()

    def as_dicts(history: list[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in history]

    def buttons(is_answering: bool) -> tuple[gradio.Button, gradio.Button]:
        """Send, or stop while an answer grows."""
        return gradio.Button(visible=not is_answering), gradio.Button(visible=is_answering)

    def check(question, histories, values: Sequence[float], request: gradio.Request) -> ChatSettings:
        """Return the settings that a browser sent, or raise gradio.Error."""
        if len(question) > MAX_QUESTION:
            raise gradio.Error(in_language_of(request, "too_long", most=MAX_QUESTION))
        for (name, (low, high)), value in zip(bounds.items(), values, strict=True):
            if not isinstance(value, int | float) or not low <= value <= high:
                raise gradio.Error(in_language_of(request, "not_a_number", name=name, low=low, high=high))
        for history in histories:
            tokens = len(encode_prompt(chat.tokenizer, [*history, Message("user", question)], chat.template))
            if tokens > max_tokens:
                raise gradio.Error(in_language_of(request, "too_many_tokens", tokens=tokens, most=max_tokens))
        return ChatSettings(int(values[0]), *map(float, values[1:]))

    def respond(request: gradio.Request, question, histories, *values):
        if not question or not question.strip():
            yield "", histories, *map(as_dicts, histories), *buttons(False)
            return
        histories = [answered(history) for history in histories]
        before = histories
        settings = check(question, histories, values, request)
        histories = [[*history, Message("user", question)] for history in histories]
        yield "", histories, *map(as_dicts, histories), *buttons(True)
        try:
            for index, side in enumerate(sides):
                messages = histories[index]
                with contextlib.closing(chat.answer(messages, settings, side == "adapter")) as texts:
                    for answer in texts:
                        histories[index] = [*messages, Message("assistant", answer)]
                        yield "", histories, *map(as_dicts, histories), gradio.skip(), gradio.skip()
        except Exception:
            yield question, before, *map(as_dicts, before), *buttons(False)
            raise
        yield "", histories, *map(as_dicts, histories), *buttons(False)

    def clear_side(index: int):
        """Return a handler that empties one side's history, or both for -1."""

        def clear(histories):
            histories = [[] if index in (-1, i) else history for i, history in enumerate(histories)]
            return histories, *map(as_dicts, histories), *buttons(False)

        return clear

    with gradio.Blocks(title=f"{chat.model_name}: chat", analytics_enabled=False) as page:
        histories = gradio.State([[] for _ in sides])
        gradio.HTML(heading(chat), elem_id="heading", padding=False)
        gradio.Markdown(text("hint"))
        with gradio.Row():
            boxes = [
                gradio.Chatbot(label=text(side), elem_id=side, height=440, min_width=320, buttons=["copy"])
                for side in sides
            ]
        question = gradio.Textbox(
            label=text("question"),
            placeholder=text("placeholder"),
            elem_id="question",
            autofocus=True,
            max_length=MAX_QUESTION,
        )
        with gradio.Row():
            send = gradio.Button(text("send"), variant="primary", elem_id="send", min_width=100)
            stop = gradio.Button(text("stop"), variant="stop", elem_id="stop", min_width=100, visible=False)
            clear = gradio.Button(text("clear"), elem_id="clear", min_width=100)
        with gradio.Accordion(text("settings"), open=False):
            sliders = [
                gradio.Slider(
                    *bounds[name],
                    getattr(defaults, name),
                    step=1 if name == "max_new_tokens" else 0.05,
                    label=text(name),
                )
                for name in bounds
            ]
        private = {"api_visibility": "private"}
        answering = [
            event(
                respond,
                [question, histories, *sliders],
                [question, histories, *boxes, send, stop],
                concurrency_id="model",
                **private,
            )
            for event in (question.submit, send.click)
        ]
        stop.click(lambda: buttons(False), None, [send, stop], cancels=answering, **private)
        for event, index in ((clear.click, -1), *((box.clear, i) for i, box in enumerate(boxes))):
            # first cancelled, then cleared: else an answer that still grows would bring the history back
            event(None, None, None, cancels=answering, **private).then(
                clear_side(index), [histories], [histories, *boxes, send, stop], **private
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
        css=STYLE,
        i18n=translations(),
    )
