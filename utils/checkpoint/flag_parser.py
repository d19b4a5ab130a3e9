"""
Parses a script's flags from dataclasses: transformers' HfArgumentParser with the messages of utils/common/flags.py.

The training, tokenising and inference scripts use it. A dataclass with an `_argument_group_name` is a group of --help;
one with `_argument_groups`, {title: names of fields}, has several.
"""

from argparse import ArgumentParser
from dataclasses import Field

from transformers import HfArgumentParser

from utils.common.flags import FlagParser


class DataclassFlagParser(FlagParser, HfArgumentParser):
    """HfArgumentParser that reports every fault with its fix, and knows groups of fields."""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        groups = getattr(dtype, "_argument_groups", {})
        added = {title: self.add_argument_group(title) for title in groups}
        self._group_of = {name: added[title] for title, names in groups.items() for name in names}
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: ArgumentParser, field: Field) -> None:
        super()._parse_dataclass_field(self._group_of.get(field.name, parser), field)
