"""
A conversation: what data rows and prompts become before a template makes tokens of them.

`utils/data/conversations.py` makes them of rows, `utils/inference/prompt_reader.py` of prompts; the templates of
`utils/models/chat_formats.py` take them.
"""

from typing import NamedTuple


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class Conversation(NamedTuple):
    """
    Messages in their order.

    A training row ends with the assistant's message, a prompt with the user's.
    """

    messages: tuple[Message, ...]
    untrained: tuple[int, ...] = ()  # numbers of the assistant's messages where training takes no loss

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def target(self) -> str | None:
        """The answer; None for a prompt."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    @property
    def trained_ends(self) -> list[int]:
        """The number of messages up to and including each trained answer."""
        messages = enumerate(self.messages)
        return [i + 1 for i, message in messages if message.role == "assistant" and i not in self.untrained]

    def first_messages(self, length: int) -> "Conversation":
        """The conversation of the first `length` messages."""
        return Conversation(self.messages[:length], tuple(number for number in self.untrained if number < length))
