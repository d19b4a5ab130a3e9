"""
Keeps tokens, keys and passwords out of a run's files.

A secret is the value of a flag or of an environment variable with a telling name. `utils.training.run_log` replaces it
by `<hidden>` wherever it occurs in what it writes.
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
SECRET_FLAGS = ("hub_token", "push_to_hub_token")  # of TrainingArguments; argparse accepts their beginnings too
MIN_SECRET_LENGTH = 6  # characters; a shorter word occurs elsewhere by chance, so only its own flag hides it


def is_secret(flag: str) -> bool:
    """
    Whether the value of `flag` is a secret, by the flag's name.

    >>> [is_secret(flag) for flag in ("--hub_token", "--hub-tok", "--pack_tokens", "--push_to_hub", "--wandb_api_key")]
    [True, True, False, False, True]
    """
    name = flag.lstrip("-").replace("-", "_")
    abbreviates = (
        len(name) > len("hub_") and name != "push_to_hub" and any(full.startswith(name) for full in SECRET_FLAGS)
    )
    return bool(SECRET_NAME.search(name)) or abbreviates


def hide_in_command(words: Sequence[str]) -> list[str]:
    """
    Return the words of a command line with secret values hidden.

    >>> hide_in_command(["train.py", "--hub_token", "hf_abc", "--api-key=1234", "--seed", "1"])
    ['train.py', '--hub_token', '<hidden>', '--api-key=<hidden>', '--seed', '1']
    """
    return [shown for shown, _ in _words_and_secrets(words)]


def hide_secrets(value: Any) -> Any:
    """Return `value`, text or JSON data, without the secrets of this process's command line and environment."""
    secrets = {secret for _, secret in _words_and_secrets(sys.argv) if secret}
    secrets |= {text for name, text in os.environ.items() if SECRET_NAME.search(name)}
    long_enough = [secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH]
    return _hide(value, sorted(long_enough, key=len, reverse=True))


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


def _words_and_secrets(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each word as it may be shown, with the secret in it or None."""
    pairs: list[tuple[str, str | None]] = []
    previous = ""
    for word in words:
        flag, equals, text = word.partition("=")
        if word.startswith("--") and equals and is_secret(flag):
            pairs.append((f"{flag}={HIDDEN}", text))
        elif previous.startswith("--") and "=" not in previous and is_secret(previous) and not word.startswith("--"):
            pairs.append((HIDDEN, word))
        else:
            pairs.append((word, None))
        previous = word
    return pairs
