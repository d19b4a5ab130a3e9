"""
Generation through transformers' `generate`, for models spread over devices or offloaded, which no engine can serve.

Sequences in, answered out, with the same tokens that the engine would choose. `BatchGenerator` calls it.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from utils.data.collators import left_pad
from utils.inference.batch_sizing import BatchPlan, is_out_of_memory
from utils.inference.engine.scheduler import StopRule, TokenSequence
from utils.inference.engine_generate import EngineStats, SequenceQueue
from utils.inference.sampling import GREEDY, Sampling
from utils.lora.multi_lora import adapter_choice_of


class HfGenerator:
    """
    Answers sequences by `model.generate`, batch after batch.

    Args:
        pad_token_id: for prompts of unequal length.
        device: where inputs go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop: StopRule,
        sampling: Sampling,
        pad_token_id: int,
        device: torch.device,
    ):
        self.model, self.stop, self.sampling = model, stop, sampling
        self.pad_token_id, self.device = pad_token_id, device
        self.stats = EngineStats()

    def run(self, sequences: Iterable[TokenSequence], plan: BatchPlan) -> Iterator[TokenSequence]:
        """
        Yield each sequence when it is answered; one that has no memory even alone comes without an answer.

        Out of memory halves the batch size from there on, and prompts for which memory is short have a smaller one.
        """
        queue = SequenceQueue(sequences)
        size = plan.batch_size
        self.stats.batch_sizes.append(size)
        while batch := list(islice(queue.up_to(), size)):
            while plan.padded_batch_size and len(batch) > max(1, plan.padded_batch_size(batch[-1])):
                queue.put_back([batch.pop()])
            try:
                self.generate_batch(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            else:
                out_of_memory = False
            if out_of_memory and size > 1:
                tried = f"out of memory with {size} rows at once"
                print(f"{tried}: continuing with {size // 2}", file=sys.stderr, flush=True)
                size //= 2
                queue.put_back(batch)
                self.stats.batch_sizes.append(size)
                torch.cuda.empty_cache()
                continue
            yield from batch

    def generate_batch(self, batch: list[TokenSequence]) -> None:
        """Fill the sequences' `answer_ids`."""
        inputs = left_pad([sequence.input_ids for sequence in batch], self.pad_token_id)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        width = inputs["input_ids"].shape[1]
        if choice := adapter_choice_of(self.model):
            choice.rows = torch.tensor([[sequence.adapter] for sequence in batch], device=self.device)
        processors, criteria = [], []
        if self.sampling != GREEDY:
            ids = torch.tensor([sequence.sequence_id for sequence in batch], device=self.device)
            processors.append(_SamplingProcessor(self.sampling, ids, inputs["attention_mask"]))
        if self.stop.find_end:
            criteria.append(_StopStringCriteria(self.stop, width))
        output = self.model.generate(
            **inputs,
            max_new_tokens=max(sequence.max_new_tokens for sequence in batch),
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self.stop.token_ids),
            pad_token_id=self.pad_token_id,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
        for sequence, ids in zip(batch, output[:, width:].tolist(), strict=True):
            sequence.answer_ids.clear()
            self.stop.apply(sequence, ids)


class _SamplingProcessor(LogitsProcessor):
    """Keeps of the logits only the one that `Sampling` chooses, so that `generate` samples as the engine does."""

    def __init__(self, sampling: Sampling, sequence_ids: torch.Tensor, attention_mask: torch.Tensor):
        self.sampling, self.sequence_ids, self.real = sampling, sequence_ids, attention_mask.bool()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer_length = input_ids.shape[1] - self.real.shape[1]
        seen = None
        if self.sampling.repetition_penalty != 1:
            real = torch.nn.functional.pad(self.real, (0, answer_length), value=True)
            first = input_ids.gather(1, self.real.long().argmax(1, keepdim=True))
            seen = torch.zeros_like(scores, dtype=torch.bool)
            seen.scatter_(1, torch.where(real, input_ids, first), True)  # a padding token counts as the first real one
        answer_lengths = torch.full_like(self.sequence_ids, answer_length)
        chosen = self.sampling.choose(scores, seen, self.sequence_ids, answer_lengths)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _StopStringCriteria(StoppingCriteria):
    """(B,) bool: the sequences whose answer contains a stop string. The prompts are `width` tokens wide."""

    def __init__(self, stop: StopRule, width: int):
        self.stop, self.width = stop, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        stopped = [self.stop.find_end(ids) is not None for ids in input_ids[:, self.width :].tolist()]
        return torch.tensor(stopped, device=input_ids.device)
