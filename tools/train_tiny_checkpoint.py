"""
python tools/train_tiny_checkpoint.py --output_dir data/chatglm-tiny

Trains the checkpoint in `data/chatglm-tiny`: ChatGLM-6B's architecture with a few million parameters and a
SentencePiece model of its own, on the text of `tools/tiny_corpus.py`. Runs on a GPU or on the CPU; writes the released
file layout, with float16 weights in safetensors. The one in `data/` took 8000 steps, 319 s on one H100.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

import sentencepiece
import torch

from tools.tiny_corpus import adapter_rows, base_row
from utils.common.flags import FlagParser
from utils.models import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from utils.models.tokenization_chatglm import LONGEST_BLANK, NEWLINE_PIECE, TAB_PIECE, encode_whitespace

SPECIAL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]


def train_sentencepiece(texts: list[str], vocab_size: int, directory: Path) -> ChatGLMTokenizer:
    """Train `ice_text.model`, with the released special pieces, and load it."""
    blanks = [f"<|blank_{n}|>" for n in range(2, LONGEST_BLANK + 1)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(directory / "ice_text"),
        vocab_size=vocab_size,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        character_coverage=1.0,
        pad_id=3,
        pad_piece="<pad>",
        user_defined_symbols=[NEWLINE_PIECE, TAB_PIECE, *blanks],
        control_symbols=SPECIAL_PIECES,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "ice_text.vocab").unlink()
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "ChatGLMTokenizer",
                "bos_token": "<sop>",
                "eos_token": "<eop>",
                "end_token": "</s>",
                "gmask_token": "[gMASK]",
                "mask_token": "[MASK]",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "remove_space": False,
                "do_lower_case": False,
                "num_image_tokens": 0,
            },
            indent=2,
        )
        + "\n"
    )
    return ChatGLMTokenizer.from_pretrained(directory)


def make_batch(tokenizer, rng: random.Random, batch_size: int, device: str) -> dict[str, torch.Tensor]:
    """Return right-padded input_ids, attention_mask and labels, each (B, T) int64; only answers have labels."""
    rows = []
    for _ in range(batch_size):
        prompt, answer = base_row(rng)
        prompt_ids = tokenizer.encode(prompt)
        target_ids = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id]
        rows.append((prompt_ids, target_ids))
    width = max(len(p) + len(t) for p, t in rows)
    pad = [width - len(p) - len(t) for p, t in rows]
    batch = {
        "input_ids": [p + t + [tokenizer.pad_token_id] * n for (p, t), n in zip(rows, pad, strict=True)],
        "attention_mask": [[1] * (width - n) + [0] * n for n in pad],
        "labels": [[-100] * len(p) + t + [-100] * n for (p, t), n in zip(rows, pad, strict=True)],
    }
    return {key: torch.tensor(value, device=device) for key, value in batch.items()}


@torch.no_grad()
def exact_share(model, tokenizer, count: int, device: str) -> float:
    """Return the share of `count` unseen base rows that greedy decoding answers exactly."""
    rng = random.Random(10**9)
    rows = [base_row(rng) for _ in range(count)]
    tokenizer.padding_side = "left"
    inputs = tokenizer([prompt for prompt, _ in rows], return_tensors="pt", padding=True).to(device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a == target for a, (_, target) in zip(answers, rows, strict=True)) / count


def main() -> None:
    parser = FlagParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=96, help="rows a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=900, help="SentencePiece pieces (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of text and weights (default: %(default)s)")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    texts = [encode_whitespace(text) for _ in range(20000) for text in base_row(rng)]
    texts += [encode_whitespace(text) for row in adapter_rows(300, seed=1) for text in row.values()]
    tokenizer = train_sentencepiece(texts, args.vocab_size, args.output_dir)

    config = ChatGLMConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        num_layers=4,
        num_attention_heads=8,
        inner_hidden_size=1024,
        max_sequence_length=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        gmask_token_id=tokenizer.gmask_token_id,
    )
    model = ChatGLMForConditionalGeneration(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    started = time.time()
    for step in range(args.steps):
        loss = model(**make_batch(tokenizer, rng, args.batch_size, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)

    model.eval().half().cpu().save_pretrained(args.output_dir)
    trained = ChatGLMForConditionalGeneration.from_pretrained(args.output_dir, dtype=torch.float32).to(device).eval()
    summary = {
        "parameters": sum(p.numel() for p in trained.parameters()),
        "exact_match": exact_share(trained, tokenizer, 500, device),
        "seconds": round(time.time() - started),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    run(main)
