"""
Finds values of training flags that work but surprise, such as --save_steps above the number of steps.

In: the resolved arguments and the rows. Out: a line for each, below the header of the run. Values that cannot work are
errors instead, in argument_checks.py.
"""

from dataclasses import fields

from transformers import TrainingArguments

from utils.common.numbers import ceil_div, counted
from utils.data.arrow_reader import row_lengths
from utils.training.argument_checks import count_steps
from utils.training.arguments import LOGGING_STEPS
from utils.training.preflight import TrainingInputs

LEARNING_RATES = (1e-7, 1e-2)  # adapters train between about 1e-5 and 1e-3
FEW_STEPS = 20  # an adapter hardly changes in fewer
# A run shorter than a default is no surprise.
DEFAULTS = {each.name: each.default for each in fields(TrainingArguments)} | {"logging_steps": LOGGING_STEPS}


def describe_surprises(args: TrainingArguments, inputs: TrainingInputs, pack_tokens: int | None) -> list[str]:
    """
    Return a line for each flag whose value does not do what one may expect of it.

    Args:
        pack_tokens: None if rows are padded. The number of packs is estimated, because packing takes seconds.
    """
    items, unit = len(inputs.dataset), "row"
    if pack_tokens:
        items, unit = ceil_div(sum(row_lengths(inputs.dataset)), pack_tokens), "pack"
    steps = count_steps(items, args)
    micro_batch = args.per_device_train_batch_size * args.world_size
    micro_batches = ceil_div(items, micro_batch)
    is_rarer = {  # than once in the run, by the user's wish
        name: getattr(args, f"{name}_strategy") == "steps"
        and (every := getattr(args, f"{name}_steps")) not in (None, DEFAULTS[f"{name}_steps"], DEFAULTS["save_steps"])
        and every > steps
        for name in ("logging", "save", "eval")
    }
    least, most = LEARNING_RATES
    of_steps = f"of {steps:,} step{'s' * (steps > 1)}"
    batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rate, epochs = f"--learning_rate {args.learning_rate:g}", args.num_train_epochs
    is_surprising = {
        f"--logging_steps {args.logging_steps:g} {of_steps}: only the first and the last step are logged": (
            is_rarer["logging"]
        ),
        f"--save_steps {args.save_steps:g} {of_steps}: a checkpoint is written only at the end": is_rarer["save"],
        f"--eval_steps {args.eval_steps or 0:g} {of_steps}: the only evaluation is at the end": is_rarer["eval"],
        f"--warmup_steps {args.warmup_steps:g} {of_steps}: --learning_rate is never reached": (
            args.warmup_steps > steps
        ),
        f"--per_device_train_batch_size {batch}: a step has only the {counted(items, unit)} that there are": (
            micro_batch > items
        ),
        f"--gradient_accumulation_steps {accumulated}: an epoch has only {micro_batches:,} to accumulate": (
            accumulated > micro_batches
        ),
        f"--num_train_epochs {epochs:g} is not used: --max_steps {args.max_steps} decides": (
            args.max_steps > 0 and epochs != DEFAULTS["num_train_epochs"]
        ),
        f"{rate} is high: the loss may diverge (usual: 1e-5 to 1e-3)": args.learning_rate > most,
        f"{rate} is low: the adapter hardly changes (usual: 1e-5 to 1e-3)": args.learning_rate < least,
    }
    if args.max_steps <= 0:
        packs = f"{counted(items, 'pack')} an epoch; a smaller --pack_tokens makes more, " if pack_tokens else ""
        is_surprising[
            f"{counted(steps, 'step')} in all, in which an adapter hardly changes: {packs}--num_train_epochs repeats"
        ] = steps < FEW_STEPS
    return [note for note, applies in is_surprising.items() if applies]
