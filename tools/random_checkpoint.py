"""
python tools/random_checkpoint.py --shape chatglm-6b --output_dir /tmp/chatglm-6b-random

Writes a checkpoint of a real model's shape with random weights (float16, safetensors in shards) and the embedded
tokenizer: to measure speed and memory where the real weights are not at hand. Uses a GPU where there is one.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from utils.checkpoint import load_tokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "chatglm-tiny"
SHAPES = {
    "chatglm-6b": {},  # the defaults of ChatGLMConfig
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "inner_hidden_size": 128,
    },
}


def random_model(shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> ChatGLMForConditionalGeneration:
    """A model of one of SHAPES with normal weights, whose special tokens are those of the embedded tokenizer."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    names = {field.name for field in dataclasses.fields(ChatGLMConfig) if field.name.endswith("_token_id")}
    special = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
    config = ChatGLMConfig(**SHAPES[shape], **special)
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm-6b")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(args.shape, device, torch.float16, args.seed)
    model.save_pretrained(args.output_dir, max_shard_size="2GB")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, args.output_dir / name)
    print(json.dumps({"output_dir": str(args.output_dir), "parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
