"""
Writes the model card of a trained adapter: the README.md beside it, which the hub shows.

In: the run's `RunConfig` and the Trainer's state. Out: README.md, in place of the empty form that PEFT writes there.
trainer.py calls it for the final adapter and for each checkpoint. The card names no directory of this machine: of an
absolute path it has the last part.
"""

import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path, PurePath

from huggingface_hub import ModelCardData
from transformers import TrainerState

from utils import __version__
from utils.common.numbers import counted, format_loss
from utils.common.redaction import hide_secrets
from utils.training.run_config import RunConfig, global_batch

CARD_FILE = "README.md"
PACKAGES = ("peft", "transformers", "torch")
HERE = "path/to/this/directory"
PLAIN_ARCHITECTURES = ("glm", "glm4")  # which transformers opens by itself


def write_model_card(directory: str | Path, config: RunConfig, state: TrainerState, step: int) -> None:
    """Write the card of the adapter in `directory`, which is that of `step`."""
    text = hide_secrets(describe_adapter(config, state, step))
    (Path(directory) / CARD_FILE).write_text(text, encoding="utf-8")


def describe_adapter(config: RunConfig, state: TrainerState, step: int) -> str:
    """Return the card as Markdown, with the metadata that the hub reads in front."""
    generation, given = config.inputs.checkpoint.generation, config.flags.model_name_or_path
    is_hub_id = given == _name(given) and not Path(given).is_dir()
    metadata = ModelCardData(
        base_model=given if is_hub_id else None,  # the hub takes only names that it has
        library_name="peft",
        pipeline_tag="text-generation",
        language="zh",
        tags=["lora", generation.flag],
    )
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""---
{metadata.to_yaml()}
---

# LoRA adapter for {generation.name}

Trained with Chatglm_lora_multi-gpu {__version__} on {date.today()}. The adapter is that of step {step:,}.

{_table(_settings(config, state))}

## Losses

Nats a target token.

{_table(_losses(state))}

## Scores

None were computed in training. This compares base and adapter on held-out rows (exact match, BLEU-4, chrF, ROUGE):

```bash
python tools/evaluate.py --model_name_or_path {_name(given)} --adapter_path {HERE} --input_path held_out.json
```

## Use

```bash
python chatglm_milti_gpu_inference.py --model_name_or_path {_name(given)} --adapter_path {HERE}
```

{_peft_example(given, is_plain=generation.architecture in PLAIN_ARCHITECTURES)}

## Versions

Chatglm_lora_multi-gpu {__version__}, {versions}, Python {sys.version.split()[0]}
"""


def _settings(config: RunConfig, state: TrainerState) -> dict[str, object]:
    """Return name and value of what the adapter was trained with."""
    flags, args, inputs = config.flags, config.training_args, config.inputs
    bits = inputs.checkpoint.quantization and f"int{inputs.checkpoint.quantization.bits}"
    base = " in ".join(filter(None, [_name(flags.model_name_or_path), bits or flags.quantize]))
    noun, length = ("pack", f" of at most {config.pack_tokens:,} tokens") if config.pack_tokens else ("row", "")
    return {
        "base model": base,
        "data": f"{_name(flags.dataset_path)}, {len(inputs.dataset):,} rows",
        "evaluation data": f"{len(inputs.eval_dataset):,} rows" if inputs.eval_dataset else None,
        "template": inputs.origin.template,
        "LoRA": f"rank {flags.lora_rank}, alpha {flags.lora_alpha}, dropout {flags.lora_dropout}",
        "target modules": ", ".join(flags.lora_target_modules),
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "global batch": f"{counted(global_batch(args), noun)}{length}",
        "steps": f"{state.global_step:,}, {state.epoch or 0:.3g} epochs",
        "precision": str(config.dtype).removeprefix("torch."),
        "launcher": f"{config.launcher}, {args.world_size} processes" if args.world_size > 1 else config.launcher,
        "seed": args.seed,
    }


def _losses(state: TrainerState) -> dict[str, str]:
    """Return the last training loss that was logged, and the lowest of evaluation, with their steps."""
    losses = {}
    training = [row for row in state.log_history if "loss" in row]
    evaluation = [row for row in state.log_history if "eval_loss" in row]
    if training:
        losses["training, last logged"] = f"{format_loss(training[-1]['loss'])} (step {training[-1]['step']:,})"
    if evaluation:
        lowest = min(evaluation, key=lambda row: row["eval_loss"])
        losses["evaluation, lowest"] = f"{format_loss(lowest['eval_loss'])} (step {lowest['step']:,})"
    return losses


def _table(values: dict[str, object]) -> str:
    """Return a Markdown table of names and values; those that are None are left out."""
    rows = [(name, str(value).replace("|", "\\|")) for name, value in values.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _name(path_or_id: str) -> str:
    """Return a hub id or relative path as it is, and the last part of an absolute path."""
    path = PurePath(path_or_id)
    return path.name if path.is_absolute() or ".." in path.parts else path_or_id


def _peft_example(given: str, is_plain: bool) -> str:
    """Return how Python opens the adapter; `is_plain` if transformers opens the base by itself."""
    if is_plain:
        imports, load = "from transformers import AutoModelForCausalLM", "AutoModelForCausalLM.from_pretrained"
        opening = "With PEFT alone:"
    else:
        imports, load = "from utils.checkpoint import load_model", "load_model"
        opening = "With PEFT; the toolkit's `load_model` opens the base without remote code:"
    return f"""{opening}

```python
from peft import PeftModel
{imports}

model = PeftModel.from_pretrained({load}({_name(given)!r}), {HERE!r})
```"""
