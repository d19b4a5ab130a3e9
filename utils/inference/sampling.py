"""How the next token is chosen, on the device and for a whole batch at once."""

from dataclasses import dataclass

import torch

MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """
    Args:
        temperature: 0 is greedy.
        top_k: sample among so many tokens; 0 is all.
        top_p: sample among the fewest tokens that have this probability together.
        repetition_penalty: divides positive logits of tokens that stand in prompt or answer, multiplies negative ones
            (CTRL, arXiv:1909.05858, as transformers applies it); 1 changes nothing.
        seed: with the row's own number it decides the answer, whatever the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def choose(
        self, logits: torch.Tensor, seen: torch.Tensor | None, rows: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            logits: (B, V).
            seen: (B, V) bool, the tokens of prompt and answer; None without a repetition penalty.
            rows: (B,) int64, the numbers of the rows.
            counts: (B,) int64, how many tokens of the answer came before.

        Returns:
            (B,) int64 tokens.
        """
        if seen is not None:
            logits = logits.float()
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = self._without_tail(logits.float() / self.temperature)
        return (logits + gumbel_noise(self.seed, rows, counts, logits.shape[-1])).argmax(-1)

    def _without_tail(self, logits: torch.Tensor) -> torch.Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered = logits.sort(descending=True).values
            probabilities = ordered.softmax(-1)
            kept = probabilities.cumsum(-1) - probabilities < self.top_p  # the first always
            least = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits


def gumbel_noise(seed: int, rows: torch.Tensor, counts: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """
    (B, V) float32 whose sum with logits is largest at a sample of their softmax. A hash of seed, row, step and token
    makes it, so that it depends on nothing else: not on the batch, nor on a generator's state.
    """
    tokens = torch.arange(vocabulary, device=rows.device)
    stream = _mix(_mix(rows + (seed + 1) * 1_000_003) + counts)
    bits = _mix(stream[:, None] + tokens * MIX) & LOW_32
    uniform = (bits.double() + 0.5) / (LOW_32 + 1)
    return -(-uniform.log()).log().float()


def _mix(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64, its shifts logical."""
    values = values + MIX
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return values ^ ((values >> 31) & ((1 << 33) - 1))


GREEDY = Sampling()
