"""
A conversation: what data rows and prompts become before a template makes tokens of them.

`utils/data/conversations.py` makes them of rows, `utils/inference/prompt_reader.py` of prompts; the templates of
`utils/models/chat_formats.py` and `turn_formats.py` take them.
"""

from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A call of a tool that the assistant writes."""

    name: str
    arguments: str  # JSON text of an object


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # "system", "user", "assistant" or "tool", whose content is a call's result
    content: str
    reasoning: str = ""  # of the assistant, before its answer
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool | None = (
        None  # of the assistant: the row's own word on whether it is trained on; None: --loss_on says
    )

    @property
    def is_plain(self) -> bool:
        """Whether role and content are all that the message holds."""
        return not (self.reasoning or self.tool_calls or self.trained is not None)


class Conversation(NamedTuple):
    """
    Messages in their order.

    A training row ends with the assistant's message, a prompt with the user's or a tool's.
    """

    messages: tuple[Message, ...]
    tools: str = ""  # JSON text of the list of tools that may be called, as the row has them; "" for none
    options: tuple[tuple[str, Any], ...] = ()  # the row's own options of the chat template, such as enable_thinking

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def target(self) -> str | None:
        """The text of the answer; None for a prompt."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    @property
    def callable_tools(self) -> str:
        """JSON text of the tools that an answer may call: "[]" where earlier calls show that there are some."""
        return self.tools or ("[]" if any(message.tool_calls for message in self.messages) else "")

    def trained_messages(self, loss_on: str) -> list[int]:
        """
        Numbers of the messages that are trained on.

        Args:
            loss_on: "last" for what the assistant writes after the last question, "every" for all it writes. A
                message's own `trained` wins.
        """
        users = [number for number, message in enumerate(self.messages) if message.role == "user"]
        first = users[-1] if users and loss_on == "last" else 0
        return [
            number
            for number, message in enumerate(self.messages)
            if message.role == "assistant" and (number >= first if message.trained is None else message.trained)
        ]

    def first_messages(self, length: int) -> "Conversation":
        """The conversation of the first `length` messages."""
        return self._replace(messages=self.messages[:length])
