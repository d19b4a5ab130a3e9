"""The revisions of a release: what their tokenizers make of text, and which files go together."""

import base64
import itertools
import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from checkpoint_copies import V1, V2, V3, V4, copy_of, edit
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.common.errors import UsageError
from utils.data.encode import fingerprint
from utils.lora.adapter import AdapterOrigin, warn_of_old_ids
from utils.models.conversation import Message
from utils.models.convert_tokenizer import fast_tokenizer
from utils.models.family import CHATGLM2
from utils.models.templates import encode_prompt, template_for
from utils.models.tokenization_chatglm import CONTROL_PIECES, FIRST_IMAGE_TOKENS
from utils.models.tokenization_glm4 import ChatGLM4Tokenizer, merges_of

# GLM-4's vocabulary


def bytes_and(*tokens: str) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *map(str.encode, tokens)])}


def write_ranks(ranks: dict[bytes, int], directory):
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (directory / "tokenizer.model").write_text("".join(lines), encoding="ascii")
    return directory / "tokenizer.model"


def join_lowest(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's rule: join the neighbours that form the token of the lowest rank, until no two form one."""
    if word in ranks:
        return [ranks[word]]
    tokens = [bytes([byte]) for byte in word]
    while joins := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(tokens)) if a + b in ranks]:
        at = min(joins)[1]
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
    return [ranks[token] for token in tokens]


def test_a_token_of_lower_rank_than_its_halves(tmp_path):
    """Training never makes such a token; GLM-4-9B's vocabulary, joined from two, has a thousand."""
    ranks = bytes_and("abcd", "ab", "cd", "bc", "abc", "bcd")
    splits = [(left, right) for left, right in merges_of(ranks) if left + right == b"abcd"]
    assert splits == [(b"a", b"bcd"), (b"ab", b"cd"), (b"abc", b"d")]
    tokenizer = ChatGLM4Tokenizer(str(write_ranks(ranks, tmp_path)))
    for word in ("xabcd", "abcdx", "abcabcd", "bcdab"):
        assert tokenizer.encode_ordinary(word) == join_lowest(ranks, word.encode()), word
    assert tokenizer.encode_ordinary("xabcd") == [ord("x"), ranks[b"abcd"]]


def test_merges_are_tiktokens_whatever_the_vocabulary(tmp_path):
    draw, compared = random.Random(0), 0
    for trial in range(60):
        letters = "ab" if trial % 2 else "abc描"
        tokens = {"".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(draw.randint(3, 15))}
        ranks = bytes_and(*draw.sample(sorted(tokens), len(tokens)))
        tokenizer = ChatGLM4Tokenizer(str(write_ranks(ranks, tmp_path)))
        for _ in range(30):
            word = "".join(draw.choices(letters, k=draw.randint(1, 14)))
            assert tokenizer.encode_ordinary(word) == join_lowest(ranks, word.encode()), (word, tokens)
            compared += 1
    assert compared == 1800


def test_ids_of_a_tokenizer_with_too_few_merges_are_refused(monkeypatch):
    tokenizer, other = load_tokenizer(str(V4)), load_tokenizer(str(V3))
    for name in ("native", "alpaca"):
        now = fingerprint(tokenizer, template_for(tokenizer, name))
        template = template_for(tokenizer, name)
        monkeypatch.setattr(template, "ids_version", 1)
        assert fingerprint(tokenizer, template) != now
    assert template_for(other).ids_version == 1  # datasets of other generations stay valid


def test_adapters_and_exports_of_older_versions_say_so(tmp_path, capsys):
    checkpoint, current = Checkpoint.open(str(V4)), tmp_path / "current"
    current.mkdir()
    origin = AdapterOrigin("native", checkpoint.fingerprint(), str(V4))
    (current / "adapter_origin.json").write_text(json.dumps(asdict(origin)))
    assert "older version" in warn_of_old_ids(current, checkpoint)
    assert warn_of_old_ids(current, Checkpoint.open(str(V3))) is None
    (current / "adapter_origin.json").write_text(json.dumps(asdict(replace(origin, tokenizer="0123"))))
    assert warn_of_old_ids(current, checkpoint) is None
    assert warn_of_old_ids(tmp_path, checkpoint) is None  # another tool's

    merged = tmp_path / "merged"
    load_model(str(V4)).save_pretrained(merged)
    fast_tokenizer(load_tokenizer(str(V4))).save_pretrained(merged)
    load_tokenizer(str(merged))
    assert "older version" not in capsys.readouterr().out
    content = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    del content["model"]["merges"][-len(content["model"]["merges"]) // 2 :]
    (merged / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    load_tokenizer(str(merged))
    assert "tokenizer.json was exported by an older version" in capsys.readouterr().out


# ChatGLM-6B's first release


@pytest.fixture(scope="module")
def first_release(tmp_path_factory):
    """`V1` as in the first release: image tokens first, a model file without the pieces that its code appends."""
    directory = tmp_path_factory.mktemp("revisions") / "chatglm-6b-first"
    ids = {"bos_token_id": 20884, "eos_token_id": 20885, "vocab_size": FIRST_IMAGE_TOKENS + 992}
    absent = dict.fromkeys(("mask_token_id", "gmask_token_id", "pad_token_id"))
    names = {"num_image_tokens": None, "end_token": None, "eos_token": "</s>", "eop_token": "<eop>"}
    copy_of(V1, directory, ids | absent, names)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((V1 / "ice_text.model").read_bytes())
    appended = len(CONTROL_PIECES) + 80  # the fixture has its bytes in front
    pieces = [piece.piece for piece in proto.pieces]
    assert pieces[-appended:][: len(CONTROL_PIECES)] == list(CONTROL_PIECES)
    del proto.pieces[-appended:]
    (directory / "ice_text.model").write_bytes(proto.SerializeToString())
    for file in directory.glob("pytorch_model*"):
        file.unlink()
    state = {name: value.clone() for name, value in load_model(str(V1)).state_dict().items()}
    images = torch.randn(FIRST_IMAGE_TOKENS, state["lm_head.weight"].shape[1])
    for name in ("lm_head.weight", "transformer.word_embeddings.weight"):
        state[name] = torch.cat([images, state[name]])
    save_file(state, directory / "model.safetensors")
    return directory


def test_the_first_release_makes_the_same_tokens_behind_its_images(first_release):
    first, later = load_tokenizer(str(first_release)), load_tokenizer(str(V1))
    assert len(first) == len(later) + FIRST_IMAGE_TOKENS
    for text in ("你好", "def f(x):\n\treturn   x\n", "é 𥸔 <eop> <sop>", "[gMASK]", ""):
        assert [i - FIRST_IMAGE_TOKENS for i in first.encode(text)] == later.encode(text)
        plain = first.encode_texts([text])[0] - FIRST_IMAGE_TOKENS
        assert plain.tolist() == later.encode_texts([text])[0].tolist()
        assert first.decode(first.encode(text)) == later.decode(later.encode(text))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "gmask_token_id", "mask_token_id", "end_token_id")
    assert [getattr(first, n) - FIRST_IMAGE_TOKENS for n in names] == [getattr(later, n) for n in names]


def test_the_first_release_computes_the_same(first_release):
    chat = [Message("user", "今天天气怎么样？")]
    first, later = (encode_prompt(load_tokenizer(str(path)), chat) for path in (first_release, V1))
    model = load_model(str(first_release))
    logits = model(input_ids=torch.tensor([first])).logits[..., FIRST_IMAGE_TOKENS:]
    expected = load_model(str(V1))(input_ids=torch.tensor([later])).logits
    assert (logits - expected).abs().max() < 1e-5


def test_config_tells_the_number_of_image_tokens_if_the_tokenizer_does_not(tmp_path):
    slim = copy_of(V1, tmp_path / "slim", tokenizer_config={"num_image_tokens": None})
    assert load_tokenizer(str(slim)).bos_token_id == load_tokenizer(str(V1)).bos_token_id
    edit(slim / "config.json", bos_token_id=None)  # then it is the released code's default
    edit(slim / "config.json", eos_token_id=20885, gmask_token_id=20881, mask_token_id=20880, vocab_size=20992)
    assert load_tokenizer(str(slim)).num_image_tokens == FIRST_IMAGE_TOKENS


def test_only_pieces_for_blanks_become_blanks():
    tokenizer = load_tokenizer(str(V1))
    for text in ("<|blank_03|>", "<|blank_81|>", "<|blank_1|>", "<|blank_002|>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


# config.json and tokenizer


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        (V1, {"bos_token_id": 883}, "bos_token_id is 883 in config.json, and 884 in the tokenizer"),
        (V1, {"eos_token_id": 2}, "eos_token_id is 2"),
        (V1, {"gmask_token_id": 880}, "gmask_token_id is 880"),
        (V1, {"mask_token_id": 881}, "mask_token_id is 881"),
        (V1, {"vocab_size": 800}, "ids up to 967, .* speaks of 800 rows"),
        (V2, {"eos_token_id": 1}, "eos_token_id is 1"),
        (V2, {"padded_vocab_size": 900}, "speaks of 900 rows"),
        (V3, {"eos_token_id": [1, 3]}, "eos_token_id is .1, 3."),
        (V3, {"padded_vocab_size": 948}, "speaks of 948 rows"),
        (V4, {"eos_token_id": [999]}, "eos_token_id is .999."),
        (V4, {"gmask_token_id": 3}, "gmask_token_id is 3"),
        (V4, {"padded_vocab_size": 1013}, "speaks of 1013 rows"),
    ],
)
def test_config_and_tokenizer_that_disagree_are_refused(tmp_path, source, changes, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_tokenizer(str(copy_of(source, tmp_path / "mixed", changes)))
    assert "\n" not in str(caught.value) and str(tmp_path / "mixed") in str(caught.value)


def test_chatglm2s_revisions(tmp_path):
    """Its first config.json has neither model_type nor pad_token_id; later ones pad with <unk> and keep blanks."""
    first = copy_of(V2, tmp_path / "first", {"model_type": None})
    assert Checkpoint.open(str(first)).generation is CHATGLM2
    text = "is n't it 's a , b"
    later = copy_of(V2, tmp_path / "later", {"pad_token_id": 0})
    codegeex = copy_of(V2, tmp_path / "codegeex", {"_name_or_path": "THUDM/codegeex2-6b"}, {"name_or_path": None})
    for directory, pad, blanks in ((first, 2, "isn't it's a, b"), (later, 0, text), (codegeex, 0, text)):
        tokenizer = load_tokenizer(str(directory))
        assert tokenizer.pad_token_id == pad and tokenizer.unk_token == (None if pad else "<unk>")
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == blanks
        tokenizer.save_pretrained(tmp_path / f"saved-{pad}")
        again = type(tokenizer).from_pretrained(tmp_path / f"saved-{pad}")
        assert again.pad_token_id == pad


# tokens that a fine-tuned checkpoint added


@pytest.mark.parametrize("source", [V1, V2, V3, V4])
def test_added_tokens_are_read(tmp_path, source):
    plain = load_tokenizer(str(source))
    new = {"<插件>": len(plain), "ＧＰＩＯ口": len(plain) + 1}
    directory = copy_of(source, tmp_path / "added")
    if source is V4:
        tokens = {str(i): {"content": token, "special": False, "normalized": False} for token, i in new.items()}
        edit(directory / "tokenizer_config.json", added_tokens_decoder=tokens)
    else:
        edit(directory / "added_tokens.json", **new)
    tokenizer = load_tokenizer(str(directory))
    assert len(tokenizer) == len(plain) + 2
    text = "你好<插件>世界ＧＰＩＯ口"
    ids = tokenizer.encode_texts([text, "", "<插件>"])
    assert ids[0].tolist() == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
    assert [i for i in ids[0] if i >= len(plain)] == list(new.values()) == [*ids[2], len(plain) + 1]
    assert ids[0].dtype == ids[1].dtype == "int32" and len(ids[1]) == 0
    assert "<插件>" in tokenizer.decode(ids[0]) and "ＧＰＩＯ口" in tokenizer.decode(ids[0])
    assert encode_prompt(tokenizer, [Message("user", "你好")]) == encode_prompt(plain, [Message("user", "你好")])
    with_new = encode_prompt(tokenizer, [Message("user", "用<插件>")])
    assert new["<插件>"] in with_new
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(tokenizer).from_pretrained(tmp_path / "saved").encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"<|user|>": 5}, "its files give <.user.> the id 5, and the release 946"),
        ({"<新>": 20}, "<新> the id 20, which another token has"),
        ({"<新>": 5000}, "ids up to 5000, and config.json speaks of 960 rows"),
    ],
)
def test_impossible_added_tokens_are_refused(tmp_path, tokens, words):
    directory = copy_of(V3, tmp_path / "added")
    edit(directory / "added_tokens.json", **tokens)
    with pytest.raises(UsageError, match=words):
        load_tokenizer(str(directory))


def test_released_tokens_that_are_listed_as_added_stay_text(tmp_path):
    directory = copy_of(V3, tmp_path / "saved")
    edit(directory / "added_tokens.json", **{"<|user|>": 946, "sop": 943, "</s>": 2})
    assert load_tokenizer(str(directory)).encode("<|user|>sop</s>") == load_tokenizer(str(V3)).encode(
        "<|user|>sop</s>"
    )
