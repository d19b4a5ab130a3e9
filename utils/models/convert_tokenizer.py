"""
A tokenizer of the family -> transformers' own fast tokenizer with a chat template, for merged checkpoints.

`utils/inference/merge_export.py` saves it as a `tokenizer.json`, which transformers and the serving engines built on
it open without code of this repository. ChatGLM-6B has no such form and keeps its released files.
"""

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from utils.models.jinja_templates import chat_template, keep_apart
from utils.models.tokenization_base import VocabFileTokenizer


def fast_tokenizer(tokenizer: VocabFileTokenizer, alpaca_instruction: str | None = None) -> PreTrainedTokenizerFast:
    """
    The same tokenizer in transformers' own class, with a chat template.

    Args:
        alpaca_instruction: see `chat_template`.

    Raises:
        ValueError: `tokenizers` cannot compute this vocabulary exactly, or the ids have gaps.
    """
    fast = tokenizer.to_tokenizers()
    for index, token in sorted(tokenizer.tokens_beside_vocabulary().items()):
        if token.special:
            fast.add_special_tokens([token])
        else:
            fast.add_tokens([token])
        if fast.token_to_id(token.content) != index:
            raise ValueError(f"{token.content} has the id {index}, which a tokenizer.json cannot give it")
    keep_apart(fast)
    opening = tokenizer.opening_tokens
    fast.post_processor = TemplateProcessing(
        single=[*opening, "$A"], special_tokens=[(token, fast.token_to_id(token)) for token in opening]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(tokenizer, special_tokens(fast), alpaca_instruction),
        model_input_names=tokenizer.model_input_names,
    )


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that `tokenizer` takes for special where a text spells them."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
