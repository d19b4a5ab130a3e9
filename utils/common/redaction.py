"""
Tokens, keys and passwords, which no file of a run may hold: told by the names of the flags and of the environment's
variables that give them, and replaced wherever they stand.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

HIDDEN = "<hidden>"
SECRET_NAME = re.compile(
    "(^|[_-])(token|key|apikey|secret|password|passwd|passphrase|credentials?)($|[_-])", re.IGNORECASE
)
SECRET_FLAGS = ("hub_token", "push_to_hub_token")  # of TrainingArguments; argparse takes their beginnings too
SHORTEST = 6  # characters; a shorter word stands elsewhere by chance, and is hidden in its flag alone


def is_secret(flag: str) -> bool:
    """
    >>> [is_secret(flag) for flag in ("--hub_token", "--hub-tok", "--pack_tokens", "--push_to_hub", "--wandb_api_key")]
    [True, True, False, False, True]
    """
    name = flag.lstrip("-").replace("-", "_")
    begins = len(name) > len("hub_") and name != "push_to_hub" and any(full.startswith(name) for full in SECRET_FLAGS)
    return bool(SECRET_NAME.search(name)) or begins


def hide_in_command(words: Sequence[str]) -> list[str]:
    """
    >>> hide_in_command(["train.py", "--hub_token", "hf_abc", "--api-key=1234", "--seed", "1"])
    ['train.py', '--hub_token', '<hidden>', '--api-key=<hidden>', '--seed', '1']
    """
    return [shown for shown, _ in _split(words)]


def hide_secrets(value: Any) -> Any:
    """`value`, text or what JSON can hold, without the secrets of this process's command line and environment."""
    secrets = {secret for _, secret in _split(sys.argv)}
    secrets |= {text for name, text in os.environ.items() if SECRET_NAME.search(name)}
    return _hide(value, sorted((secret for secret in secrets if len(secret or "") >= SHORTEST), key=len, reverse=True))


def _hide(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(each, str) and each and is_secret(str(name)) else _hide(each, secrets)
            for name, each in value.items()
        }
    return [_hide(each, secrets) for each in value] if isinstance(value, (list, tuple)) else value


def _split(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each word as it may be shown, and the secret that it was."""
    pairs: list[tuple[str, str | None]] = []
    before = ""
    for word in words:
        flag, equals, text = word.partition("=")
        if word.startswith("--") and equals and is_secret(flag):
            pairs.append((f"{flag}={HIDDEN}", text))
        elif before.startswith("--") and "=" not in before and is_secret(before) and not word.startswith("--"):
            pairs.append((HIDDEN, word))
        else:
            pairs.append((word, None))
        before = word
    return pairs
