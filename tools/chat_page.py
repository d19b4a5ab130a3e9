"""
The page of tools/chat.py --web: adapter and base answer side by side.

In: a `Chat` and the settings that the page starts with. Out: a Gradio page as an ASGI application, which
tools/request_filter.py serves. What a browser sends is checked here again, whatever the page's own fields allow.
Texts are Chinese or English by the browser's language.
"""

import contextlib
import html
import time
from collections.abc import Sequence

import fastapi
import gradio

from tools.chat_model import Chat, ChatSettings, Question
from utils.common.terminal import escape_controls
from utils.models.conversation import Message
from utils.models.templates import encode_prompt

MAX_QUESTION = 20_000  # characters
UPDATE_SECONDS = 0.05  # between two updates of an answer: the host that sends one keeps the model waiting
MAX_WAITING = 32  # questions of all readers of the page
BOUNDS = {  # of the settings on the page: (lowest, highest)
    "max_new_tokens": (1, 4096),
    "temperature": (0, 2),
    "top_p": (0.05, 1),
    "repetition_penalty": (1, 2),
}
TEXTS = {  # key -> (English, Chinese); the texts of errors have values in braces
    "hint": (
        "Each side has its own history; once there is one, the bin above it clears it, for the model too.",
        "两边各有自己的对话历史；有了对话，点其上方的垃圾桶图标即清空，模型也不再记得。",
    ),
    "adapter": ("with the adapter", "使用 adapter"),
    "base": ("base model", "基座模型"),
    "question": ("question", "问题"),
    "placeholder": ("Ask something; Enter sends it, Shift+Enter begins a line", "输入问题，回车发送，Shift+回车换行"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "clear": ("Clear", "清空对话"),
    "clear_both": ("Clear both", "清空两边"),
    "settings": ("Settings", "生成设置"),
    "max_new_tokens": ("Longest answer, in tokens", "回答最多的 token 数"),
    "temperature": ("Randomness; 0: always the likeliest token", "随机程度；0：总取最可能的 token"),
    "top_p": ("Share of the likely tokens to choose from; 1: all", "候选 token 的累计概率；1：全部"),
    "repetition_penalty": (
        "Against repetition; 1: off, above: words that occurred become less likely",
        "避免重复；1：关闭，越大越少重复出现过的词",
    ),
    "too_long": ("a question has {most} characters at most", "问题最多 {most} 个字符"),
    "not_a_number": ("{name}: a number from {low} to {high}", "{name}：应为 {low} 到 {high} 之间的数"),
    "message_too_long": (
        "this message has {tokens} tokens, the model takes {most}: shorten it",
        "这条消息有 {tokens} 个 token，模型最多 {most} 个：请缩短",
    ),
    "conversation_too_long": (
        "the conversation has {tokens} tokens with this message, the model takes {most}: clear it",
        "加上这条消息，对话有 {tokens} 个 token，模型最多 {most} 个：请清空对话",
    ),
}
STYLE = """
#heading, #heading * { padding: 0 !important }
#heading h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
#heading p { margin: 0; opacity: .75; overflow-wrap: anywhere }
#adapter .bubble-wrap, #base .bubble-wrap { margin-top: 28px; height: calc(100% - 28px) }  /* below the label */
#notice * { color: #b45309 }
.dark #notice * { color: #fbbf24 }
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
    bounds = {}
    for name, (low, high) in BOUNDS.items():
        default = getattr(defaults, name)
        bounds[name] = (min(low, default), max(high, default))
    text = translations()

    def as_dicts(history: list[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in history]

    def buttons(is_answering: bool) -> tuple[gradio.Button, gradio.Button]:
        """Send, or stop while an answer grows."""
        return gradio.Button(visible=not is_answering), gradio.Button(visible=is_answering)

    def find_fault(question: str, histories, values: Sequence[float], request: gradio.Request) -> str | None:
        """Return what is wrong with what a browser sent, in its language."""
        if len(question) > MAX_QUESTION:
            return in_language_of(request, "too_long", most=MAX_QUESTION)
        for (name, (low, high)), value in zip(bounds.items(), values, strict=True):
            if not isinstance(value, int | float) or not low <= value <= high:
                label = in_language_of(request, name).partition(";")[0].partition("；")[0]
                return in_language_of(request, "not_a_number", name=label, low=low, high=high)
        for key, earlier in (("message_too_long", [[]]), ("conversation_too_long", histories)):
            for history in earlier:
                tokens = len(encode_prompt(chat.tokenizer, [*history, Message("user", question)], chat.template))
                if tokens > max_tokens:
                    return in_language_of(request, key, tokens=tokens, most=max_tokens)
        return None

    def accept(request: gradio.Request, question, histories, pending, *values):
        """Show the question without its answer, or a notice; a question while an answer grows stays in the box."""
        if pending is not None or not question or not question.strip():
            return [gradio.skip()] * (6 + len(sides))
        histories = [answered(history) for history in histories]
        fault = find_fault(question, histories, values, request)
        if fault is None:
            pending = ChatSettings(int(values[0]), *map(float, values[1:]))
            histories = [[*history, Message("user", question)] for history in histories]
        return (
            gradio.skip() if fault else "",
            histories,
            pending,
            *map(as_dicts, histories),
            gradio.Markdown(fault, visible=fault is not None),
            *buttons(fault is None),
        )

    def respond(histories, pending):
        """Answer the question that `accept` put into the histories; `pending` has the settings."""
        unchanged = [gradio.skip()] * 3  # question, send and stop
        if pending is None:
            yield *unchanged, histories, pending, *map(as_dicts, histories)
            return
        asked = histories
        try:
            questions = [Question(*pair) for pair in zip(asked, [side == "adapter" for side in sides], strict=True)]
            with contextlib.closing(chat.answers(questions, pending)) as answers:
                shown = 0.0
                for texts in answers:
                    histories = [
                        history if text is None else [*history, Message("assistant", text)]
                        for history, text in zip(asked, texts, strict=True)
                    ]
                    if time.monotonic() - shown >= UPDATE_SECONDS:
                        yield *unchanged, histories, pending, *map(as_dicts, histories)
                        shown = time.monotonic()
        except Exception:
            before = [history[:-1] for history in asked]
            yield asked[0][-1].content, *buttons(False), before, None, *map(as_dicts, before)
            raise
        yield gradio.skip(), *buttons(False), histories, None, *map(as_dicts, histories)

    def clear_side(index: int):
        """Return a handler that empties one side's history, or both for -1."""

        def clear(histories):
            histories = [[] if index in (-1, i) else history for i, history in enumerate(histories)]
            return histories, None, *map(as_dicts, histories), *buttons(False)

        return clear

    with gradio.Blocks(title=f"{chat.model_name}: chat", analytics_enabled=False) as page:
        histories = gradio.State([[] for _ in sides])
        pending = gradio.State(None)  # the ChatSettings of the answer that grows
        gradio.HTML(heading(chat), elem_id="heading", padding=False)
        if len(sides) > 1:
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
            max_lines=8,
        )
        notice = gradio.Markdown(elem_id="notice", visible=False)
        with gradio.Row():
            send = gradio.Button(text("send"), variant="primary", elem_id="send", min_width=100)
            stop = gradio.Button(text("stop"), variant="stop", elem_id="stop", min_width=100, visible=False)
            clear = gradio.Button(text("clear_both" if len(sides) > 1 else "clear"), elem_id="clear", min_width=100)
        with gradio.Accordion(text("settings"), open=False):
            sliders = [
                gradio.Slider(
                    *bounds[name],
                    getattr(defaults, name),
                    step=1 if name == "max_new_tokens" else 0.05,
                    label=text(name),
                    elem_id=name,
                )
                for name in bounds
            ]
        # hidden: else a spinner, and after an error a red mark, would cover what was typed
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        state = [histories, pending, *boxes]
        accepted = [question, *state, notice, send, stop]
        answering = [
            event(accept, [question, histories, pending, *sliders], accepted, concurrency_limit=None, **quiet).then(
                respond, [histories, pending], [question, send, stop, *state], concurrency_id="model", **quiet
            )
            for event in (question.submit, send.click)
        ]
        stop.click(lambda: (None, *buttons(False)), None, [pending, send, stop], cancels=answering, **quiet)
        for event, index in ((clear.click, -1), *((box.clear, i) for i, box in enumerate(boxes))):
            # first cancelled, then cleared: else an answer that still grows would bring the history back
            event(None, None, None, cancels=answering, **quiet).then(
                clear_side(index), [histories], [*state, send, stop], **quiet
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
