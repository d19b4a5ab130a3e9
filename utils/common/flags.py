"""
Parses the flags of every script and tool; all faults of a command line are found at once, each with its fix.

`FlagParser` is argparse's parser. `parse_args` raises one UsageError with a line for each unknown flag, bad value and
missing flag; `parse_with_faults` returns the faults, so that a script can report them with those that it finds itself.
An unknown flag is looked up by its old name, by another script's, and by likeness, in utils/common/flag_hints.py.
utils/checkpoint/flag_parser.py adds dataclasses. No large library is imported, because some scripts run for less time
than that takes.
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from utils.common.errors import Faults, UsageError
from utils.common.flag_hints import ADVICE, FLAGS_OF_SCRIPTS, RENAMED
from utils.common.processes import is_main_process

SIMILARITY = 0.75  # of two names, by difflib: "lora_rnak" and "lora_rank" have 0.89
CHOICES_LISTED = 8  # more values would not fit in a line
NUMBER = re.compile(r"-\.?\d")  # a word that begins so is a value, not a flag
STRAY = ",;，；、"  # ends of values that were copied from a sentence or a list


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag once, and its default unless that is empty or in the text already."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]  # not HfArgumentParser's --with-dashes
        if not names:
            return super()._format_action_invocation(action)
        takes_none = action.nargs == 0 or action.const is True
        values = self._format_args(action, action.dest.upper())
        if action.choices and len(action.choices) > CHOICES_LISTED:  # in the text, where they are wrapped
            values = action.dest.upper()
        return f"{', '.join(names)} {'' if takes_none else values}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_empty = action.default is None or action.default is False or action.default == []
        text = action.help if is_empty or "(default" in action.help else super()._get_help_string(action)
        if action.choices and len(action.choices) > CHOICES_LISTED:
            text += f"; one of {_alternatives([str(choice) for choice in action.choices])}"
        return text


class FlagParser(argparse.ArgumentParser):
    """argparse's parser that reports every fault with its fix; --help is printed by rank 0."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})
        self._faults = Faults()
        self._faulty: set[str] = set()  # destinations whose value could not be read

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """
        Parse the flags.

        Raises:
            UsageError: with a line for each fault.
        """
        values, faults = self.parse_with_faults(args)
        faults.report()
        return values

    def parse_with_faults(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace, Faults]:
        """
        Parse the flags, and collect what is wrong with them.

        Returns:
            Values and faults. Where there are faults, the values only serve to look for more: a flag whose value could
            not be read has its default, a required one that is missing None, and a misspelt one counts for the flag
            that was probably meant.
        """
        self._faults, self._faulty = Faults(), set()
        words = self._without_unknown(list(sys.argv[1:] if args is None else args))
        values, rest = argparse.Namespace(), []
        with self._faults.collect():
            rest = self.parse_known_args(words, values)[1]
        for word in rest:
            self._faults.add(f"{word} belongs to no flag: leave it out, or quote a value that has spaces")
        for action in self._actions:
            if action.dest in self._faulty:
                setattr(values, action.dest, action.default)
        return values, self._faults

    def error(self, message: str) -> None:
        """Raise a UsageError in place of argparse's usage text and exit."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            flags = [next(name for name in names.split("/") if name) for names in missing.split(", ")]
            raise UsageError(*(f"{flag} is required: --help describes it" for flag in flags))
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("expected"):
            problem = "has no value: give " + problem.removeprefix("expected ").replace("argument", "value")
        raise UsageError(f"{flag.split('/')[0]} {problem}" if problem else message)

    def print_help(self, file=None) -> None:
        """Print the help, on rank 0."""
        if is_main_process():
            super().print_help(file)

    def _names(self) -> list[str]:
        """Return the flags as --help shows them, without dashes."""
        names = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        return [name for name in names if "-" not in name]

    def _without_unknown(self, words: list[str]) -> list[str]:
        """Return `words` with unknown flags corrected, or left out with their values; add a fault for each."""
        known: list[str] = []
        is_left_out = False
        for position, word in enumerate(words):
            if word == "--":
                return known + words[position:]
            if not self._is_flag(word):
                if not is_left_out:
                    known.append(word)
                continue
            typed, equals, value = word.partition("=")
            matches = [typed] if typed in self._option_string_actions else self._matches(typed)
            meant = None
            if len(matches) == 1:
                meant = typed
            elif matches and typed[2:] not in RENAMED:
                self._faults.add(f"{typed} is ambiguous: did you mean {_alternatives(matches[:4])}?")
            else:
                following = next(iter(words[position + 1 :]), "")
                own = self._explain(typed, value or ("" if self._is_flag(following) else following))
                meant = f"--{own}" if own else None
            is_left_out = meant is None
            if meant:
                known.append(f"{meant}{equals}{value}")
        return known

    def _is_flag(self, word: str) -> bool:
        """Whether a word is a flag, or was meant to be one: its dashes may have become – or —."""
        if word[:1] in ("–", "—"):
            return word.lstrip("–—-").partition("=")[0] in self._names()
        return word[:1] == "-" and len(word) > 1 and " " not in word and not NUMBER.match(word)

    def _matches(self, typed: str) -> list[str]:
        """Return the flags that `typed` abbreviates, one spelling each."""
        if not typed.startswith("--"):
            return []
        found = {id(match[0]): match[1] for match in reversed(super()._get_option_tuples(typed))}
        return sorted(found.values())

    def _get_option_tuples(self, option_string: str) -> list:
        # HfArgumentParser gives every flag a second spelling with dashes, and Python 3.11 calls `--model` ambiguous.
        matches = super()._get_option_tuples(option_string)
        return matches[:1] if all(match[0] is matches[0][0] for match in matches) else matches

    def _explain(self, typed: str, value: str) -> str | None:
        """Add the fault of an unknown flag; return the flag that was probably meant, if its value can stay."""
        name = typed.strip("-–—").replace("-", "_").lower()
        names = self._names()
        new_names = (name, *RENAMED.get(name, ()))
        own = next((new for new in new_names if new in names), None)
        other = next((new for new in new_names if _script_of(new)), None)
        if own == name:
            fault = f"is unknown: write --{own}"
        elif own:
            fault = f"is unknown: here it is --{own}"
        elif name in ADVICE:
            fault = f"is unknown: {ADVICE[name].format(value=value or 'SHARE')}"
        elif other:
            fault = f"is unknown here: {_script_of(other)} has --{other}"
        elif alike := _alike(name, names):
            fault = f"is unknown: did you mean {_alternatives([f'--{each}' for each in alike])}?"
            own = alike[0] if len(alike) == 1 else None
        else:
            fault = "is unknown: --help lists all flags"
        self._faults.add(f"{typed} {fault}")
        return own

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except UsageError as error:
            self._faults.messages += error.args
        except argparse.ArgumentError as error:
            self._faults.add(f"{_name_of(action)} {arg_string} {self._reason(action, arg_string, error.message)}")
        self._faulty.add(action.dest)
        return action.default

    def _reason(self, action: argparse.Action, text: str, message: str) -> str:
        """Return why a value cannot be read, and which could be meant."""
        kind = {int: "is not a whole number", float: "is not a number"}.get(action.type)
        if getattr(action.type, "__name__", "") == "string_to_bool":  # transformers'
            kind = "is neither true nor false"
            nearest = difflib.get_close_matches(text.lower(), ("true", "false"), n=1)
            return f"{kind}: did you mean {nearest[0]}?" if nearest else kind
        if kind is None:
            return f"cannot be used: {message}"
        with contextlib.suppress(ValueError):
            if action.type is int and (number := float(text)).is_integer():
                return f"{kind}: did you mean {number:.0f}?"
        with contextlib.suppress(ValueError):
            action.type(text.strip(STRAY))
            return f"{kind}: did you mean {text.strip(STRAY)}?"
        return kind

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices or action.dest in self._faulty:
            return
        self._faulty.add(action.dest)
        choices = [str(choice) for choice in action.choices]
        alike = _alike(str(value), choices)
        fault = f"{_name_of(action)} {value} is unknown: "
        if len(choices) <= CHOICES_LISTED:
            self._faults.add(f"{fault}give {_alternatives(choices)}")
        elif alike:
            self._faults.add(f"{fault}did you mean {_alternatives(alike)}?")
        else:
            self._faults.add(f"{fault}--help lists the {len(choices)} values")


def _name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def _alternatives(words: Sequence[str]) -> str:
    """Return "a, b or c"."""
    *firsts, last = words
    return f"{', '.join(firsts)} or {last}" if firsts else last


def _alike(name: str, names: Sequence[str]) -> list[str]:
    """
    Return up to three of `names` that `name` may stand for, the likeliest first; one if it is much likelier.

    >>> _alike("lora_rnak", ["lora_rank", "lora_alpha"]), _alike("cosin", ["cosine", "cosine_with_restarts"])
    (['lora_rank'], ['cosine'])
    >>> _alike("adamw", ["adamw_torch", "adamw_torch_fused", "sgd"])
    ['adamw_torch', 'adamw_torch_fused']
    """
    lowered = name.lower()
    ratios = {other: difflib.SequenceMatcher(None, lowered, other.lower()).ratio() for other in dict.fromkeys(names)}
    close = sorted((other for other in ratios if ratios[other] >= SIMILARITY), key=ratios.get, reverse=True)
    if close:
        return [other for other in close if ratios[other] > ratios[close[0]] - 0.05][:3]
    return [other for other in ratios if len(name) > 2 and other.lower().startswith(lowered)][:3]


def _script_of(name: str) -> str | None:
    """Return the script that has a flag, if it is not the running one."""
    running = os.path.basename(sys.argv[0])
    scripts = (script for script, flags in FLAGS_OF_SCRIPTS.items() if name in flags)
    return next((script for script in scripts if os.path.basename(script) != running), None)
