"""
Writes conversations as rows that utils/data/row_parser.py parses to the same conversations.

process_belle_1M_data.py writes its output with `dump_conversation`, and finds repeated prompts by `prompt_of`.
"""

import json
from typing import Any

from utils.data.dedup import TURN_END
from utils.data.json_lines import dump_pair, dump_row
from utils.data.tool_forms import call_fields
from utils.models.conversation import Conversation, Message


def dump_conversation(conversation: Conversation) -> str:
    """One line of the output, newline included: {"input", "target"} for a plain single turn, else {"messages"}."""
    messages, tools, options = conversation
    if len(messages) == 2 and not tools and not options:  # nearly every row
        role, content, reasoning, calls, trained = messages[1]
        if role == "assistant" and not reasoning and not calls and trained is None:
            return dump_pair(messages[0].content, content)
    row: dict[str, Any] = {"messages": [_fields(message) for message in messages]}
    if tools:
        row["tools"] = json.loads(tools)
    return dump_row(row | dict(options))


def _fields(message: Message) -> dict[str, Any]:
    """A message in OpenAI's form, with `loss` where it has its own word."""
    role, content, reasoning, calls, trained = message
    fields: dict[str, Any] = {"role": role, "content": content}
    if reasoning:
        fields["reasoning_content"] = reasoning
    if calls:
        fields["tool_calls"] = [call_fields(call) for call in calls]
    if trained is not None:
        fields["loss"] = trained
    return fields


def prompt_of(conversation: Conversation) -> str:
    """
    The prompt as `Deduplicator` takes it: all before the last answer, the last question after the last TURN_END.

    Of a prompt that ends with a tool's result that text is empty: it repeats an earlier one only if all is equal.
    """
    messages, tools, options = conversation
    if len(messages) == 2 and messages[0].role == "user" and not tools and not options:  # nearly every row
        return messages[0].content
    prompt = conversation.prompt
    is_plain = not any(message.role == "tool" or message.reasoning or message.tool_calls for message in prompt)
    if is_plain and not tools and not options:
        return TURN_END.join(message.content for message in prompt)
    question = prompt[-1].content if prompt[-1].role == "user" else ""
    before = prompt[:-1] if question else prompt
    fields = [_fields(message._replace(trained=None)) for message in before]
    return json.dumps([fields, tools, options], ensure_ascii=False) + TURN_END + question
