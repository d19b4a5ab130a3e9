"""Batches through transformers' own `generate`: for models that are spread over devices, which no engine can serve."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from utils.data.collators import left_pad
from utils.inference.batch_sizing import is_out_of_memory
from utils.inference.engine.prefill import TokenSequence
from utils.inference.sampling import GREEDY, Sampling
from utils.inference.stop_strings import StopStrings


def generate_plainly(
    model: PreTrainedModel,
    source: Iterable[TokenSequence],
    size: int,
    stop_ids: Sequence[int],
    pad_token_id: int,
    sampling: Sampling,
    end: StopStrings,
    device: torch.device,
    batch_sizes: list[int],
) -> Iterator[TokenSequence]:
    """
    Answers tasks batch after batch, and notes in `batch_sizes` how many rows they had. Where memory does not suffice,
    half as many from there on; a task that finds none even alone comes back without an answer.
    """
    source = iter(source)
    batch_sizes.append(size)
    while batch := list(islice(source, size)):
        try:
            _generate_batch(model, batch, stop_ids, pad_token_id, sampling, end, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lacking = True
        else:
            lacking = False
        if lacking and size > 1:
            print(f"out of memory with {size} rows at once: going on with {size // 2}", file=sys.stderr, flush=True)
            size //= 2
            source = chain(batch, source)
            batch_sizes.append(size)
            torch.cuda.empty_cache()
            continue
        yield from batch


def _generate_batch(
    model, batch: list[TokenSequence], stop_ids, pad_token_id: int, sampling, end: StopStrings, device
) -> None:
    inputs = left_pad([task.input_ids for task in batch], pad_token_id)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    width = inputs["input_ids"].shape[1]
    if choice := getattr(model, "adapter_choice", None):
        choice.rows = torch.tensor([[task.adapter] for task in batch], device=device)
    numbers = torch.tensor([task.number for task in batch], device=device)
    plain = sampling == GREEDY
    output = model.generate(
        **inputs,
        max_new_tokens=max(task.max_new_tokens for task in batch),
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_token_id,
        logits_processor=[] if plain else [_Choose(sampling, numbers, inputs["attention_mask"], width)],
        stopping_criteria=[_TextStop(end, width)] if end.texts else [],
    )
    stops = set(stop_ids)
    for task, ids in zip(batch, output[:, width:].tolist(), strict=True):
        stop = next((i for i, token in enumerate(ids, start=1) if token in stops), len(ids))
        task.answer_ids[:] = ids[:stop]
        found = end.find(task.answer_ids)
        if found is not None:
            del task.answer_ids[found:]


class _Choose(LogitsProcessor):
    """Leaves of the logits the one that `Sampling` chooses, so that `generate` samples as the engine does."""

    def __init__(self, sampling: Sampling, numbers: torch.Tensor, attention_mask: torch.Tensor, width: int):
        self.sampling, self.numbers, self.real, self.width = sampling, numbers, attention_mask.bool(), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = None
        if self.sampling.repetition_penalty != 1:
            real = torch.nn.functional.pad(self.real, (0, input_ids.shape[1] - self.width), value=True)
            first = input_ids.gather(1, self.real.long().argmax(1, keepdim=True))
            seen = torch.zeros_like(scores, dtype=torch.bool)
            seen.scatter_(1, torch.where(real, input_ids, first), True)
        counts = torch.full_like(self.numbers, input_ids.shape[1] - self.width)
        chosen = self.sampling.choose(scores, seen, self.numbers, counts)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _TextStop(StoppingCriteria):
    """(B,) bool: the rows in which a stop text stands."""

    def __init__(self, end: StopStrings, width: int):
        self.end, self.width = end, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        found = [self.end.find(ids) is not None for ids in input_ids[:, self.width :].tolist()]
        return torch.tensor(found, device=input_ids.device)
