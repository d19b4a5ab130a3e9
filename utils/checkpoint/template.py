"""`template_of_flags`: the chat template that a script's flags name, for a checkpoint's tokenizer."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.common.console import print_line
from utils.common.errors import UsageError
from utils.models.chat_options import find_unknown_option
from utils.models.checkpoint_template import note_on_template
from utils.models.family import generation_of
from utils.models.templates import ChatTemplate, template_for


def template_of_flags(tokenizer: PreTrainedTokenizerBase, name: str, options: Mapping[str, Any]) -> ChatTemplate:
    """
    The template of `--template` with the options of the other flags.

    Prints a line if the checkpoint's files bring a template that makes other prompts.

    Args:
        name: one of TEMPLATES.
        options: as `chat_options` returns them.

    Raises:
        UsageError: the checkpoint has no template of its own; or the template does not know an option.
    """
    try:
        template = template_for(tokenizer, name, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if fault := find_unknown_option(template, generation_of(tokenizer).name):
        raise UsageError(fault)
    if note := note_on_template(tokenizer, template):
        print_line(note)
    return template
