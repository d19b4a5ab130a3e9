"""
Parses a script's flags from dataclasses, abbreviated ones too. The tokenising and inference scripts use it.

HfArgumentParser gives every flag a second spelling with dashes, and Python 3.11 then calls `--model` ambiguous.
"""

from transformers import HfArgumentParser


class FlagParser(HfArgumentParser):
    """HfArgumentParser that accepts `--model` for --model_name_or_path."""

    def _get_option_tuples(self, option_string: str) -> list:
        matches = super()._get_option_tuples(option_string)
        return matches[:1] if all(match[0] is matches[0][0] for match in matches) else matches
