"""
The choice of the next token, on the device and for a whole batch: logits in, token ids out.

A sampled token is the largest of logits plus a hash of seed, sequence, step and token. No generator has a state, so
batch size, replica and restart change nothing, and `generate` on an offloaded model chooses the same tokens: that is
why torch.multinomial does not do. `ModelRunner` and `HfGenerator` call it.
"""

from dataclasses import dataclass

import torch

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment, as int64
LOW_32 = 0xFFFFFFFF  # the bits that become a uniform number


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are chosen. The field names are keys in journals.

    Args:
        temperature: 0 is greedy.
        top_k: sample among the `top_k` likeliest tokens; 0 is all.
        top_p: sample among the fewest tokens whose probabilities sum to this.
        repetition_penalty: divides positive logits of tokens in prompt or answer, multiplies negative ones (CTRL,
            arXiv:1909.05858, as transformers applies it); 1 changes nothing.
        seed: with the sequence's own id it decides the answer, whatever the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def choose(
        self,
        logits: torch.Tensor,
        seen: torch.Tensor | None,
        sequence_ids: torch.Tensor,
        answer_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """
        Choose one token per sequence.

        Args:
            logits: (B, V).
            seen: (B, V) bool, the tokens of prompt and answer; None without a repetition penalty.
            sequence_ids: (B,) int64.
            answer_lengths: (B,) int64, tokens of the answer so far.

        Returns:
            (B,) int64 tokens.
        """
        if seen is not None:
            logits = logits.float()
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = self._mask_tail(logits.float() / self.temperature)
        return (logits + gumbel_noise(self.seed, sequence_ids, answer_lengths, logits.shape[-1])).argmax(-1)

    def _mask_tail(self, logits: torch.Tensor) -> torch.Tensor:
        """Set logits (B, V) outside `top_k` and `top_p` to -inf."""
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered = logits.sort(descending=True).values
            probabilities = ordered.softmax(-1)
            kept = probabilities.cumsum(-1) - probabilities < self.top_p  # always the first
            least = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits


def gumbel_noise(seed: int, sequence_ids: torch.Tensor, answer_lengths: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """
    Return (B, V) float32 noise; logits plus it are largest at a sample of their softmax (the Gumbel-max trick).

    It is a hash of seed, sequence, step and token, so it depends neither on the batch nor on a generator's state.
    """
    tokens = torch.arange(vocabulary, device=sequence_ids.device)
    stream = _mix(_mix(sequence_ids + (seed + 1) * 1_000_003) + answer_lengths)
    bits = _mix(stream[:, None] + tokens * GOLDEN_GAMMA) & LOW_32
    uniform = (bits.double() + 0.5) / (LOW_32 + 1)
    return -(-uniform.log()).log().float()


def _mix(values: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, with logical shifts."""
    values = values + GOLDEN_GAMMA
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return values ^ ((values >> 31) & ((1 << 33) - 1))


GREEDY = Sampling()
