"""
The flags that set variables of a chat template: --thinking, --clear_thinking, --reasoning_effort.

tokenize_dataset_rows_belle.py and the inference scripts have them; a row's own options come before a flag's.
"""

from typing import Any, Literal, Protocol

from utils.models.chat_formats import ChatTemplate

Switch = Literal["on", "off"]
FLAG_OF = {"enable_thinking": "thinking", "clear_thinking": "clear_thinking", "reasoning_effort": "reasoning_effort"}
HELP = {
    "thinking": "whether the model reasons before it answers, from GLM-4.5 on; a row's enable_thinking comes first "
    "(default: on; in training rows, where the answer has reasoning)",
    "clear_thinking": "whether earlier answers lose their reasoning, from GLM-4.7 on (default: on)",
    "reasoning_effort": "how long a GLM-5.2 reasons: high or max (default: max)",
}


class ChatOptionFlags(Protocol):
    """The flags, None where they are not given."""

    thinking: Switch | None
    clear_thinking: Switch | None
    reasoning_effort: str | None


def chat_options(flags: ChatOptionFlags) -> dict[str, Any]:
    """The variables of the chat template that the flags set."""
    switches = {"enable_thinking": flags.thinking, "clear_thinking": flags.clear_thinking}
    options: dict[str, Any] = {name: value == "on" for name, value in switches.items() if value is not None}
    if flags.reasoning_effort is not None:
        options["reasoning_effort"] = flags.reasoning_effort
    return options


def find_unknown_option(template: ChatTemplate, generation: str) -> str | None:
    """An error message if a flag sets an option that the template does not know, else None."""
    for name, value in template.options.items():
        if name not in template.known_options:
            shown = {True: "on", False: "off"}.get(value, value)
            return f"--{FLAG_OF[name]} {shown}: the chats of {generation} have no such option"
    return None
