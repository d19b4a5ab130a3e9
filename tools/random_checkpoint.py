"""
python tools/random_checkpoint.py --shape chatglm3-6b --output_dir /tmp/chatglm3-6b-random

Writes a checkpoint of a real model's shape with random weights (float16, sharded safetensors, the released names) and
a small tokenizer, to measure speed and memory without the real weights. Its greedy answers have texts that can be
compared, for they contain only tokens of the tokenizer; ChatGLM-6B's repeat one token, because its head is its
embedding. Uses a GPU if there is one.
"""

import base64
import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Glm4Config, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from utils.checkpoint.model import Checkpoint
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.files import apply_umask
from utils.common.flags import FlagParser
from utils.models import ChatGLMConfig
from utils.models.architectures import architecture_of
from utils.models.convert_checkpoint import REQUIRED, glm_config, to_released_layout
from utils.models.family import CHATGLM2, CHATGLM_6B, GLM4, GLM4_0414, Generation, record_generation
from utils.models.family import CHATGLM3 as CHATGLM3_6B
from utils.models.tokenization_glm4 import GLM4_SPECIAL_TOKENS

TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "chatglm-tiny"
CHATGLM = {
    "chatglm-6b": {},  # the defaults of ChatGLMConfig
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "inner_hidden_size": 128,
    },
}
CHATGLM3 = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "seq_length": 8192,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM = {
    "chatglm2-6b": CHATGLM3 | {"seq_length": 32768},
    "chatglm3-6b": CHATGLM3,
    "glm-4-9b": CHATGLM3
    | {
        "padded_vocab_size": 151552,
        "num_layers": 40,
        "layernorm_epsilon": 1.5625e-07,
        "seq_length": 131072,
        "rope_ratio": 500,
        # Ids in the vocabulary of `write_tokenizer`: 256 bytes, then the special tokens.
        "eos_token_id": [256, 263, 265],
        "pad_token_id": 256,
    },
    "chatglm3-1b": CHATGLM3  # not a released shape: small enough for full fine-tuning
    | {
        "padded_vocab_size": 1024,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "num_attention_heads": 16,
    },
    "tiny-glm": CHATGLM3
    | {
        "padded_vocab_size": 1024,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
    },
}
GLM4_9B_0414 = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    # Ids in the vocabulary of `write_tokenizer`, as those of glm-4-9b.
    "eos_token_id": [256, 263, 265],
    "pad_token_id": 256,
}
GLM_0414 = {
    "glm-4-9b-0414": GLM4_9B_0414,
    "glm-4-32b-0414": GLM4_9B_0414
    | {
        "hidden_size": 6144,
        "intermediate_size": 23040,
        "num_hidden_layers": 61,
        "num_attention_heads": 48,
        "attention_bias": False,
    },
    "tiny-glm4": GLM4_9B_0414
    | {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    },
}
SHAPES = (*CHATGLM, *GLM, *GLM_0414)
RELEASED = {
    "chatglm-6b": CHATGLM_6B,
    "chatglm2-6b": CHATGLM2,
    "chatglm3-6b": CHATGLM3_6B,
    "glm-4-9b": GLM4,
    "glm-4-9b-0414": GLM4_0414,
    "glm-4-32b-0414": GLM4_0414,
}


def generation_of_shape(shape: str) -> Generation:
    """Return a generation whose model class and layers one of SHAPES has."""
    if shape in CHATGLM:
        return CHATGLM_6B
    return GLM4_0414 if shape in GLM_0414 else CHATGLM3_6B


def make_config(shape: str) -> PretrainedConfig:
    """Return the configuration of one of SHAPES, without a tokenizer's special tokens."""
    if shape in CHATGLM:
        return ChatGLMConfig(**CHATGLM[shape])
    if shape in GLM_0414:
        return Glm4Config(**GLM_0414[shape])
    return glm_config(GLM[shape], positions_interpolated=shape == "chatglm2-6b")


def released_checkpoint(shape: str) -> Checkpoint:
    """Return a checkpoint of one of the shapes in RELEASED, without files: what memory and speed depend on."""
    return Checkpoint(Path(shape), RELEASED[shape], make_config(shape))


def random_model(shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """
    Return a randomly initialised model of one of SHAPES on `device`, in train mode.

    Its special token ids are those of the tokenizer that `write_tokenizer` writes.
    """
    if shape in CHATGLM:
        tokenizer = load_tokenizer(str(TOKENIZER))
        names = {field.name for field in dataclasses.fields(ChatGLMConfig) if field.name.endswith("_token_id")}
        special = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
        config = ChatGLMConfig(**CHATGLM[shape], **special)
    else:
        config = make_config(shape)
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return architecture_of(generation_of_shape(shape)).model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)


def write_tokenizer(shape: str, directory: Path) -> None:
    """Write the embedded SentencePiece model, or for GLM-4 a vocabulary of 256 bytes and the special tokens."""
    if shape in CHATGLM:
        for name in ("ice_text.model", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, directory / name)
        return
    if shape in GLM_0414:
        fast = Tokenizer(
            models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = GLM4_SPECIAL_TOKENS.split()
        fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=fast, eos_token=special[0], pad_token=special[0], padding_side="left"
        )
        record_generation(tokenizer, GLM4_0414)
        tokenizer.save_pretrained(directory)
        return
    name = shape if "glm-4" in shape or "chatglm" in shape else f"chatglm3-{shape}"  # identifies the generation
    (directory / "tokenizer_config.json").write_text(json.dumps({"name_or_path": name}) + "\n", encoding="utf-8")
    if shape == "glm-4-9b":
        ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
        (directory / "tokenizer.model").write_text("".join(ranks), encoding="ascii")
    else:
        shutil.copyfile(TOKENIZER / "ice_text.model", directory / "tokenizer.model")


def silence_unused_ids(shape: str, model: PreTrainedModel) -> None:
    """Give ids without a token the logit 0, which greedy decoding never chooses."""
    size = 256 if shape == "glm-4-9b" or shape in GLM_0414 else len(load_tokenizer(str(TOKENIZER)))
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = 0


def save_checkpoint(shape: str, model: PreTrainedModel, directory: Path) -> None:
    """Write a model of one of SHAPES under the released names, and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    if shape not in GLM:
        model.save_pretrained(directory, max_shard_size="2GB")
    else:
        save_torch_state_dict(to_released_layout(model.state_dict()), directory, max_shard_size="2GB")
        released = {"model_type": "chatglm", **GLM[shape], **REQUIRED}
        (directory / "config.json").write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(shape, directory)
    apply_umask(directory)


def write_checkpoint(shape: str, directory: Path, device: str, seed: int = 0) -> int:
    """Write a random checkpoint of one of SHAPES; return its number of parameters."""
    model = random_model(shape, device, torch.float16, seed)
    silence_unused_ids(shape, model)
    save_checkpoint(shape, model, directory)
    return model.num_parameters()


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm-6b", help="(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = write_checkpoint(args.shape, args.output_dir, device, args.seed)
    print(json.dumps({"output_dir": str(args.output_dir), "parameters": parameters}))


if __name__ == "__main__":
    run(main)
