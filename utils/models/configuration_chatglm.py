"""The configuration of ChatGLM-6B, with the keys of the `config.json` released in THUDM/chatglm-6b."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ChatGLMConfig(PreTrainedConfig):
    """
    Configuration of ChatGLM-6B (version 1).

    Args:
        vocab_size: rows of the embedding; the tokenizer may use fewer.
        hidden_size: width of the residual stream.
        num_layers: number of decoder blocks.
        num_attention_heads: number of heads; the head size is `hidden_size / num_attention_heads`.
        inner_hidden_size: width of the MLP.
        layernorm_epsilon: epsilon of every LayerNorm.
        max_sequence_length: the longest sequence in training, in tokens.
        position_encoding_2d: must be true; the released model has only that.
        bos_token_id: `<sop>`, which ends the prefix that sees itself in both directions.
        eos_token_id: `<eop>`.
        mask_token_id, gmask_token_id: `[MASK]` and `[gMASK]`; the first position of an answer's tokens is theirs.

    Raises:
        ValueError: `position_encoding_2d` is false, or the head size is not a multiple of 4.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.position_encoding_2d:
            raise ValueError("position_encoding_2d is false: ChatGLM-6B is only defined with 2-D positions")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_attention_heads "
                f"({self.num_attention_heads}): the rotary embedding cuts each head in four"
            )
