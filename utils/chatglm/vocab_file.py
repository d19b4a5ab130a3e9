"""What the family's tokenizers do alike: each has one vocabulary file and saves itself by copying it."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizer


class VocabFileTokenizer(PreTrainedTokenizer, ABC):
    """A tokenizer whose only file is `self.vocab_file`; padding is on the left."""

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """
        Of each text the ids, int32, that `encode(text, add_special_tokens=False, split_special_tokens=True)` gives,
        many texts in one call of the library that encodes them.
        """
