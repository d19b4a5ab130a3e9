"""
Stop strings, and the text of generated tokens.

In: token ids of an answer. Out: after how many of them a stop string is complete, how many can be shown before that is
known, and the text before it. Called by the generators of utils/inference and by tools/chat_model.py. transformers'
StopStringCriteria works inside `generate` alone.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # decoded from the first bytes of a character whose other tokens have not come yet


class StopStrings:
    """Finds the first stop string in an answer, which ends before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, texts

    def find(self, answer_ids: Sequence[int]) -> int | None:
        """Return the number of tokens up to the end of a stop string, or None."""
        if not self.texts or not self._has_stop_string(answer_ids):
            return None
        low, high = 1, len(answer_ids)  # binary search: once there, a stop string stays
        while low < high:
            middle = (low + high) // 2
            if self._has_stop_string(answer_ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def count_safe(self, answer_ids: Sequence[int]) -> int:
        """Return the number of tokens before a stop string, and before an end that further tokens may make one."""
        answer = decode(self.tokenizer, answer_ids)
        complete = answer.rstrip(UNFINISHED)
        safe = len(self.cut(complete))
        for text in self.texts:
            sizes = range(min(len(text) - 1, len(complete)), 0, -1)
            safe = min(safe, len(complete) - next((size for size in sizes if complete.endswith(text[:size])), 0))
        count = len(answer_ids)
        while len(answer) > safe:
            count -= 1
            answer = decode(self.tokenizer, answer_ids[:count])
        return count

    def _has_stop_string(self, answer_ids: Sequence[int]) -> bool:
        answer = decode(self.tokenizer, answer_ids)
        return any(text in answer for text in self.texts)

    def cut(self, answer: str) -> str:
        """Return the answer up to its first stop string."""
        ends = [answer.find(text) for text in self.texts if text in answer]
        return answer[: min(ends)] if ends else answer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of generated tokens, without special and unknown ones."""
    # The embedding has more rows than the tokenizer has tokens: a model can generate an id without a text.
    return tokenizer.decode([i for i in ids if i < len(tokenizer)], skip_special_tokens=True)
