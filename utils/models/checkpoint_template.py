"""
The template in a checkpoint's own files (`--template checkpoint`), and whether it differs from the generation's.

The files' Jinja template runs in transformers' sandbox. It makes one text; where that spells the tokenizer's special
tokens, they are tokens, unless a message spelled them: NO_TOKEN, a character that no text has, tells the two apart.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.models.chat_formats import ChatTemplate, only_trained
from utils.models.chat_pieces import Piece
from utils.models.conversation import Conversation, Message, ToolCall
from utils.models.jinja_templates import NO_TOKEN, is_made_here
from utils.models.token_spans import NO_TOKENS, UnencodedText
from utils.models.turn_formats import GLM52Template, ThinkingTemplate
from utils.models.turn_template import ReleasedChat, TurnTemplate

SEARCH_TOOL = (
    '[{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]'
)
USER, ANSWER = Message("user", "你好！"), Message("assistant", "Hello.")
PROBES = (
    Conversation((USER,)),
    Conversation((Message("system", "Be brief."), USER, ANSWER, USER)),
    Conversation((USER, ANSWER)),
    Conversation((USER, Message("assistant", "", tool_calls=(ToolCall("search", '{"q": "海"}'),))), SEARCH_TOOL),
    Conversation(
        (USER, Message("assistant", "", tool_calls=(ToolCall("search", "{}"),)), Message("tool", "[]"), ANSWER, USER),
        SEARCH_TOOL,
    ),
)


class CheckpointTemplate(TurnTemplate):
    """
    The template that the tokenizer's files bring.

    Each trained message is a row of its own, since earlier ones may have another form. What ends an answer is what
    ends it in the generation's own template, unless the files' template writes it.

    Raises:
        ValueError: the files have no template.
    """

    name = "checkpoint"
    has_reasoning = True
    known_options = GLM52Template.known_options

    def __init__(self, tokenizer: PreTrainedTokenizerBase, native: ChatTemplate):
        super().__init__(native.options)
        if not tokenizer.chat_template:
            raise ValueError("--template checkpoint: the checkpoint's files have no chat_template; use native")
        self.tokenizer, self.native = tokenizer, native
        self.opening_tokens = ()
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._tokens = frozenset(tokens)
        self._pattern = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")

    def released_chat(self, conversation: Conversation) -> ReleasedChat:
        native = self.native if isinstance(self.native, TurnTemplate) else ThinkingTemplate()
        return native.released_chat(conversation)

    def render_text(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        """
        The text that the template makes, with NO_TOKEN in the tokens that messages spell.

        Raises:
            ValueError: the template errs.
        """
        messages, tools, _ = self.released_chat(conversation)
        try:
            return self.tokenizer.apply_chat_template(
                self._without_tokens(messages),
                tools=self._without_tokens(tools),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.options | dict(conversation.options),
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise ValueError(f"the checkpoint's chat_template refuses it: {error}") from None

    def pieces(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        return self._split(self.render_text(conversation, add_generation_prompt))

    def _unencoded_prompt(
        self, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], trained: Sequence[int]
    ) -> UnencodedText:
        """Nothing of a prompt can be cut: where the last question ends is not known."""
        return UnencodedText(self.spans(tokenizer, pieces, trained), "", "", NO_TOKENS)

    def target_pieces(self, row: Conversation, prompt: Sequence[Piece]) -> list[Piece]:
        whole = self.render_text(row, add_generation_prompt=False)
        before = self.render_text(row._replace(messages=row.prompt), add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError("the checkpoint's chat_template writes the answer's turn in another way than it opens it")
        last = len(row.messages) - 1
        return [piece._replace(message=last) for piece in self._split(whole[len(before) :])]

    def unencoded_row(
        self, tokenizer: PreTrainedTokenizerBase, row: Conversation
    ) -> tuple[UnencodedText, UnencodedText]:
        prompt, target = super().unencoded_row(tokenizer, row)
        if target.opening and not target.text:
            written = target.opening[-1]
            if len(getattr(written, "ids", ())) == 1 and int(written.ids[0]) in self.stop_ids(tokenizer):
                return prompt, target._replace(opening=target.opening[:-1], closing=written)
        return prompt, target

    def single_turn_texts(self, row: Conversation) -> tuple[str, str] | None:
        return None

    def training_rows(self, row: Conversation, trained: Sequence[int]) -> list[Conversation]:
        return [only_trained(row, [number]) for number in trained]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self.native.stop_ids(tokenizer)

    def separator_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        return self.native.separator_id(tokenizer)

    def parse_answer(self, texts: Sequence[str], tools: str) -> Message:
        return self.native.parse_answer(texts, tools)

    def clean(self, answer: str) -> str:
        return self.native.clean(answer)

    def _split(self, text: str) -> list[Piece]:
        parts = [part for part in self._pattern.split(text) if part]
        return [Piece(part.replace(NO_TOKEN, ""), is_token=part in self._tokens) for part in parts]

    def _without_tokens(self, value: Any) -> Any:
        """`value` with NO_TOKEN inside each special token that one of its texts spells."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: f"{match[0][0]}{NO_TOKEN}{match[0][1:]}", value)
        if isinstance(value, dict):
            return {self._without_tokens(key): self._without_tokens(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._without_tokens(item) for item in value]
        return value


def note_on_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str | None:
    """A line if the checkpoint's own template makes other prompts than the native `template`, or fails; else None."""
    own = tokenizer.chat_template
    if not isinstance(own, str) or is_made_here(own) or not isinstance(template, TurnTemplate):
        return None
    if isinstance(template, CheckpointTemplate) or not _differs(CheckpointTemplate(tokenizer, template), template):
        return None
    return (
        "the chat_template in the checkpoint's files makes other prompts than the generation's, which is used: "
        "--template checkpoint uses the files'"
    )


def _differs(own: TurnTemplate, native: TurnTemplate) -> bool:
    try:
        return any(_text(own, probe) != _text(native, probe) for probe in PROBES)
    except ValueError:
        return True


def _text(template: TurnTemplate, probe: Conversation) -> str:
    return "".join(piece.text for piece in template.pieces(probe, add_generation_prompt=probe.target is None))
