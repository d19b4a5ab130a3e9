"""
Parses a script's flags from dataclasses: transformers' HfArgumentParser with the messages of utils/common/flags.py.

The training, tokenising and inference scripts use it. A dataclass with an `_argument_group_name` is a group of --help;
so are the fields of one dataclass that have the same "group" in their metadata.
"""

import copy
from argparse import ArgumentParser
from dataclasses import Field

from transformers import HfArgumentParser

from utils.common.flags import FlagParser


class DataclassFlagParser(FlagParser, HfArgumentParser):
    """HfArgumentParser that reports every fault with its fix, and knows groups of fields."""

    def _parse_dataclass_field(self, parser: ArgumentParser, field: Field) -> None:
        title = field.metadata.get("group")
        if title:
            groups = {group.title: group for group in self._action_groups}
            parser = groups.get(title) or self.add_argument_group(title)
            field = copy.copy(field)
            field.metadata = {name: value for name, value in field.metadata.items() if name != "group"}
        super()._parse_dataclass_field(parser, field)
