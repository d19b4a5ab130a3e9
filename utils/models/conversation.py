"""A conversation: what rows become before a template makes text of them."""

from typing import NamedTuple


class Message(NamedTuple):
    role: str  # "user" or "assistant", or, first of a conversation, "system"
    content: str


class Conversation(NamedTuple):
    """A conversation. A training row ends with the assistant's message, a prompt with the user's."""

    messages: tuple[Message, ...]
    untrained: tuple[int, ...] = ()  # numbers of the assistant's messages where training takes no loss

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def target(self) -> str | None:
        """The answer, or None where the row is a prompt."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    @property
    def trained_ends(self) -> list[int]:
        """How many messages there are up to each answer that is trained on, that answer included."""
        messages = enumerate(self.messages)
        return [i + 1 for i, message in messages if message.role == "assistant" and i not in self.untrained]

    def first_messages(self, length: int) -> "Conversation":
        """The first `length` messages."""
        return Conversation(self.messages[:length], tuple(number for number in self.untrained if number < length))
