"""The text of generated tokens, and where it ends."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds the first of some texts in an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, texts

    def find(self, answer_ids: Sequence[int]) -> int | None:
        """How many tokens there are up to and with the one that completes a text; None where none has come."""
        if not self.texts or not self._holds(answer_ids):
            return None
        low, high = 1, len(answer_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(answer_ids[:middle]) else (middle + 1, high)
        return low

    def _holds(self, answer_ids: Sequence[int]) -> bool:
        answer = decode(self.tokenizer, answer_ids)
        return any(text in answer for text in self.texts)

    def cut(self, answer: str) -> str:
        ends = [answer.find(text) for text in self.texts if text in answer]
        return answer[: min(ends)] if ends else answer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of generated tokens. The embedding has rows that the tokenizer does not use; they have no text."""
    return tokenizer.decode([i for i in ids if i < len(tokenizer)], skip_special_tokens=True)
