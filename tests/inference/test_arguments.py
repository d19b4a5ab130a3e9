"""The flags of batch inference: how they are parsed, their aliases, and what is wrong with them, reported at once."""

import sys

import pytest
from conftest import TINY

from utils.common.errors import UsageError
from utils.inference.arguments import DispatchArguments, InferenceArguments, parse_flags, parse_max_memory

SCRIPT = "chatglm_milti_gpu_inference.py"


@pytest.fixture
def parse(monkeypatch):
    """parse("--flag value", kind) -> the flags as a script would read them, for the tiny checkpoint."""

    def run(flags, kind=DispatchArguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--model_name_or_path", str(TINY), *flags.split()])
        return parse_flags(kind, "description")

    return run


def test_defaults(parse):
    args = parse("")
    assert (args.max_new_tokens, args.temperature, args.batch_size, args.top_p) == (512, 0.0, 0, 1.0)
    assert args.adapter_path == args.stop_strings == [] and args.max_memory is None and not args.overwrite
    assert args.output_path == "output/answers.jsonl" and args.input_path is None
    args.collect_faults().report()  # there are none


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--stop a b", "stop_strings", ["a", "b"]),
        ("--stop_strings a b", "stop_strings", ["a", "b"]),
        ("--any_base", "allow_base_mismatch", True),
        ("--allow_base_mismatch", "allow_base_mismatch", True),
        ("--adapter_path a b", "adapter_path", ["a", "b"]),
        ("--max_memory 0=1GiB cpu=2GiB", "max_memory", ["0=1GiB", "cpu=2GiB"]),
        ("--local_rank=1", "local_rank", 1),  # as DeepSpeed's launcher writes it
        ("--max_new 7", "max_new_tokens", 7),  # abbreviated: HfArgumentParser knows --max-new-tokens too
    ],
)
def test_lists_aliases_and_abbreviations(parse, flags, name, value):
    assert getattr(parse(flags), name) == value


def test_an_unknown_or_ambiguous_flag_is_refused(parse):
    with pytest.raises(UsageError) as error:  # with the faults of other flags
        parse("--no_such_flag --max 1 --quantize int3 --top_k 5")
    starts = ("--no_such_flag is unknown", "--max is ambiguous", "--quantize int3 is unknown", "--top_k 5 samples")
    assert len(error.value.args) == 4 and all(map(str.startswith, error.value.args, starts))


def test_every_fault_is_reported_at_once(parse):
    args = parse(
        "--fp16 --bf16 --prompt_column a --prompt_template {a} --columns prompt=q --max_memory 1 --top_k 5 "
        "--tp_size 3 --lora_alpha 8 --batch_size -1"
    )
    with pytest.raises(UsageError) as error:
        args.collect_faults().report()
    expected = (
        "--batch_size -1 must be at least 0",
        "--top_k 5 samples",
        "--lora_alpha 8 is an adapter's",
        "--fp16 and --bf16 exclude each other: give one",
        "--prompt_column and --prompt_template exclude each other",
        "--columns names a prompt",
        "--tp_size 3 does not divide",
        "--max_memory 1: write DEVICE=SIZE",
    )
    assert len(error.value.args) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(error.value.args, expected, strict=True))


def test_max_memory():
    assert parse_max_memory(["0=10GiB", "cpu=30GiB"]) == {0: "10GiB", "cpu": "30GiB"}
    assert parse_max_memory(None) is None


def test_help_is_readable(parse, capsys):
    """Each flag once, in its group, with its default; DeepSpeed's --local_rank is hidden."""
    with pytest.raises(SystemExit):
        parse("--help", InferenceArguments)
    text = " ".join(capsys.readouterr().out.split())
    assert "--max_new_tokens MAX_NEW_TOKENS most tokens of an answer (default: 512)" in text
    assert "--stop_strings, --stop TEXT [TEXT ...]" in text and "--overwrite answer" in text
    assert all(f" {group}: --" in text for group in ("model", "rows", "answers"))
    assert "local" not in text and "--max-new-tokens" not in text and "max_memory" not in text
