"""
How the kernels are launched on a card: what tools/tune_kernels.py measured there, else their own rules.

In: tuned.json, {card: {kernel: {work: settings}}}. The kernels say what a work is called.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

TABLE_FILE = Path(__file__).with_name("tuned.json")

Settings = TypeVar("Settings")  # a dataclass


def card_name(device: torch.device) -> str:
    """Return what the table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def read_table(file: Path = TABLE_FILE) -> dict[str, dict]:
    """Return the table; empty where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def tuned(settings: Settings, kernel: str, work: str, device: torch.device) -> Settings:
    """Return `settings` with what was measured for this work on this card in its place."""
    measured = read_table().get(card_name(device), {}).get(kernel, {}).get(work)
    return replace(settings, **measured) if measured else settings
