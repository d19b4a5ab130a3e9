"""FlagParser names the flag that was meant, and finds every fault at once; its tables agree with the scripts."""

import runpy
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from utils.checkpoint.flag_parser import DataclassFlagParser
from utils.common.errors import UsageError
from utils.common.flag_hints import ADVICE, FLAGS_OF_SCRIPTS, RENAMED
from utils.common.flags import FlagParser
from utils.inference.arguments import DispatchArguments, InferenceArguments
from utils.training.arguments import make_parser


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokenize_dataset_rows_belle.py"])
    parser = FlagParser()
    parser.add_argument("--jsonl_path", "--input_path", nargs="+", required=True)
    parser.add_argument("--max_seq_length", type=int, default=384, help="most tokens")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--loss_on", choices=("last", "all"), default="last", help="turns (default: the last)")
    parser.add_argument("--strict", action="store_true")
    return parser


@pytest.fixture
def faults(parser):
    return lambda flags: parser.parse_with_faults(flags.split())[1].messages


def test_unknown_flags_name_the_right_one(faults):
    expected = {
        "--max_seq_lenght 3": "--max_seq_lenght is unknown: did you mean --max_seq_length?",  # misspelt
        "--max-seq-length 3": "--max-seq-length is unknown: write --max_seq_length",
        "-max_seq_length 3": "-max_seq_length is unknown: write --max_seq_length",
        "——share 0.1": "——share is unknown: write --share",  # dashes as a text editor makes them
        "--cutoff_len=3": "--cutoff_len is unknown: here it is --max_seq_length",  # another toolkit's
        "--dataset rows": "--dataset is unknown: here it is --jsonl_path",
        "--warmup_ratio 0.1": "--warmup_ratio is unknown: give --warmup_steps 0.1: below 1 it is a share of all steps",
        "--dedup": "--dedup is unknown here: process_belle_1M_data.py has --dedup",  # another script's
        "--lora_r 8": "--lora_r is unknown here: multi_gpu_fintune_belle.py has --lora_rank",
        "--s 1": "--s is ambiguous: did you mean --share or --strict?",
        "--nonsense 1 2": "--nonsense is unknown: --help lists all flags",
    }
    assert faults("--jsonl_path rows " + " ".join(expected)) == list(expected.values())


def test_values_name_the_right_one(faults, parser):
    assert faults("--max_seq_length 3, --share half --loss_on lst --strict yes --input_path") == [
        "--max_seq_length 3, is not a whole number: did you mean 3?",
        "--share half is not a number",
        "--loss_on lst is unknown: give last or all",
        "--jsonl_path has no value: give at least one value",
    ]
    assert faults("--max_seq_length 1e3") == [
        "--max_seq_length 1e3 is not a whole number: did you mean 1000?",
        "--jsonl_path is required: --help describes it",
    ]
    assert faults("--jsonl_path rows --strict yes") == [
        "yes belongs to no flag: leave it out, or quote a value that has spaces"
    ]
    with pytest.raises(UsageError, match="--share half is not a number"):
        parser.parse_args(["--share", "half"])


def test_values_stay_usable_for_other_checks(parser):
    """A misspelt flag counts for the one that was meant, and a value that cannot be read for the default."""
    flags = "--max_seq_lenght 7 --share x --loss_on no --foo 1 2 --strict"
    values, faults = parser.parse_with_faults(flags.split())
    assert vars(values) == {"jsonl_path": None, "max_seq_length": 7, "share": 0.5, "loss_on": "last", "strict": True}
    assert len(faults.messages) == 5


def test_flags_as_argparse_takes_them(faults, parser):
    flags = "--jsonl_path a b --max 3 --max_seq_length=4 --share -0.5 --loss_on all --loss_on last --strict"
    values, faults = parser.parse_with_faults([*flags.split(), "--input", "- a value with a dash"])
    assert not faults.messages and values.jsonl_path == ["- a value with a dash"]
    assert (values.max_seq_length, values.share, values.loss_on, values.strict) == (4, -0.5, "last", True)


def test_help_is_printed_once_with_defaults(parser, monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit:
            parser.parse_args(["--help"])
        assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.count("most tokens (default: 384)") == 1 and "turns (default: the last)\n" in text


def test_training_values_name_the_nearest_of_many():
    parser = make_parser("")
    assert "--optim OPTIM\n" in parser.format_help()  # and not a line of 41 values
    flags = "--dataset_path rows --optim adamw --lr_scheduler_type cosin --bf16 Ture --compile_layers ja"
    assert parser.parse_with_faults(flags.split())[1].messages == [
        "--optim adamw is unknown: did you mean adamw_torch, adamw_torch_fused or adamw_torch_xla?",
        "--lr_scheduler_type cosin is unknown: did you mean cosine?",
        "--bf16 Ture is neither true nor false: did you mean true?",
        "--compile_layers ja is neither true nor false",
    ]


def option_names(script: str, monkeypatch) -> set[str]:
    """Return the flags of a script."""
    if script == "multi_gpu_fintune_belle.py":
        return set(make_parser("")._option_string_actions)
    kinds = {"chatglm_milti_gpu_inference.py": DispatchArguments, "chatglm_deepspeed_inference.py": InferenceArguments}
    names = {"tokenize_dataset_rows_belle.py": "TokenizeArguments"}
    names |= {"tools/chat.py": "ChatArguments", "tools/evaluate.py": "EvaluationArguments"}
    if script in kinds or script in names:
        kind = kinds.get(script) or runpy.run_path(str(ROOT / script))[names[script]]
        return {f"--{field.name}" for field in fields(kind)}
    options: set[str] = set()
    monkeypatch.setattr(FlagParser, "parse_args", lambda self: options.update(self._option_string_actions) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runpy.run_path(str(ROOT / script))["parse_arguments"]()
    return options


def test_the_tables_name_flags_that_exist(monkeypatch):
    every: set[str] = set()
    for script, flags in FLAGS_OF_SCRIPTS.items():
        options = option_names(script, monkeypatch)
        assert {f"--{flag}" for flag in flags} <= options, script
        every |= options
    assert {f"--{new}" for names in RENAMED.values() for new in names} <= every
    advised = {word for advice in ADVICE.values() for word in advice.split() if word.startswith("--")}
    assert {word.strip("(),:;") for word in advised} <= every | {"--config_file"}
    assert not set(RENAMED) & set(ADVICE)
    training = {name[2:] for name in make_parser("")._option_string_actions}
    assert not training & set(ADVICE) and len(RENAMED) > 80 and len(ADVICE) > 40


def test_fields_of_one_dataclass_in_groups(capsys):
    kind = runpy.run_path(str(ROOT / "tokenize_dataset_rows_belle.py"))["TokenizeArguments"]
    text = DataclassFlagParser(kind).format_help()
    assert [f"\n{title}:\n" in text for title in ("files", "model", "rows", "run")] == [True] * 4
    named = [name for names in kind._argument_groups.values() for name in names]
    assert sorted(named) == sorted(field.name for field in fields(kind))
    assert "--max-seq-length" not in text
