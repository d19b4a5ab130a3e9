"""The engine's greedy answers equal those of plain `generate`, whatever else is in the batch."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXTS, TINY, varlen_attn_reference

from tools.random_checkpoint import random_model
from utils.checkpoint.model import load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.engine import Engine, attention
from utils.inference.engine.attention import decode_attention, masked_decode_attention
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.engine.prefill import MAX_PREFILL_TOKENS, pack_prompts, padded_prefill_length
from utils.inference.engine.scheduler import PrefillPlan, StopRule, TokenSequence
from utils.inference.placement import prepare_for_decoding
from utils.layers import varlen_attention

NEVER = StopRule(frozenset({-1}))


def trained_chatglm() -> tuple:
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    # The last continues after `<sop>`, from where on tokens attend only to those before them.
    return model, [
        *(tokenizer.encode(text) for text in TEXTS),
        tokenizer.encode("谢谢") + tokenizer.encode("你好")[:-2],
    ]


def random_glm(shape: str = "tiny-glm") -> tuple:
    """With weights so large that answers differ."""
    model = random_model(shape, "cpu", torch.float32, seed=3).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, [torch.randint(10, 900, (length,)).tolist() for length in (5, 9, 14, 30, 1, 22, 2)]


def random_glm4() -> tuple:
    """GLM-4-0414."""
    return random_glm("tiny-glm4")


def sequences_of(prompts: list[list[int]], max_new_tokens: int) -> list[TokenSequence]:
    return [TokenSequence(number, prompt, max_new_tokens) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
def test_answers_are_those_of_generate(build):
    model, prompts = build()
    expected = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)
        expected.append(output[0, len(prompt) :].tolist())
    stops = {expected[0][4], expected[3][9]}
    expected = [next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids) for ids in expected]
    assert len({len(ids) for ids in expected}) > 1  # some stop early, and other sequences take their slots
    # `min_new_tokens` forbade the model's own end to `generate`.
    with torch.no_grad():
        eos = model.config.eos_token_id
        model.lm_head.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor(eos), -torch.inf))
    prepare_for_decoding(model)
    for max_batch_size, decode_steps, compiles in (
        *((1, 1, False), (3, 1, False), (7, 1, False), (1, 3, False), (7, 2, False)),
        (3, 4, build is random_glm4),
    ):
        config = EngineConfig(
            max_batch_size, 64, StopRule(frozenset(stops)), compile_layers=compiles, decode_steps=decode_steps
        )
        done = Engine(model, config).answer(sequences_of(prompts, 20))
        by_id = sorted(done, key=lambda sequence: sequence.sequence_id)
        assert [sequence.answer_ids for sequence in by_id] == expected


@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
@torch.no_grad()
def test_a_prepared_model_computes_as_before(build):
    """Forward passes with padding, and `generate`; preparing twice changes nothing more."""
    model, prompts = build()
    prompts = [prompt for prompt in prompts if len(prompt) > 4]
    settings = {"max_new_tokens": 6, "do_sample": False}
    width = max(map(len, prompts))
    input_ids = torch.tensor([[3] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=input_ids, attention_mask=mask).logits[mask.bool()]
        return logits, model.generate(input_ids, attention_mask=mask, **settings)

    expected_logits, expected_ids = outputs()
    for _ in range(2):
        prepare_for_decoding(model)
        kinds = [type(module) for module in model.modules()]
        logits, ids = outputs()
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
        assert ids.equal(expected_ids)
    assert kinds == [type(module) for module in model.modules()]


def test_a_model_that_is_not_prepared_is_refused():
    model, _ = random_glm()
    with pytest.raises(RuntimeError, match="call utils.inference.placement.prepare_for_decoding first"):
        Engine(model, EngineConfig(2, 64, NEVER))


def test_an_engine_is_freed_with_its_last_reference():
    """And its CUDA graphs with it, because nothing refers to it in a cycle: see `shut_down`."""
    model, prompts = random_glm()
    prepare_for_decoding(model)
    gc.disable()
    try:
        engine = Engine(model, EngineConfig(2, 64, NEVER, compile_layers=False))
        assert len(list(engine.answer(sequences_of(prompts, 3)))) == 7
        runner = engine.runner
        references = [weakref.ref(thing) for thing in (engine, runner, runner.graphs, runner.state, engine.scheduler)]
        del engine, runner
        assert [reference() for reference in references] == [None] * 5
    finally:
        gc.enable()


def test_prefills_are_padded_to_few_lengths():
    lengths = {padded_prefill_length(tokens) for tokens in range(1, MAX_PREFILL_TOKENS + 1)}
    assert len(lengths) == 11 and max(lengths) == MAX_PREFILL_TOKENS
    assert all(tokens <= padded_prefill_length(tokens) < max(1.5 * tokens + 1, 129) for tokens in range(1, 10000))


def test_the_tensors_of_a_prefill_batch():
    sequences = [
        TokenSequence(7, [11, 12, 13], 20, adapter=2),
        TokenSequence(9, [21, 22], 30),
        TokenSequence(3, [5], 4),
    ]
    batch = pack_prompts(sequences, [4, 0, 2], lambda ids: [list(range(len(ids)))], bidirectional_prefix=False)
    expected = {
        "slot": [4, 0, 2],
        "next_token": [13, 22, 5],
        "cache_length": [2, 1, 0],
        "max_new_tokens": [20, 30, 4],
        "sequence_id": [7, 9, 3],
        "adapter": [2, 0, 0],
        "next_position": [[2, 1, 0]],
        "token_ids": [11, 12, 21],
        "token_slot": [4, 4, 0],
        "token_index": [0, 1, 0],
        "token_adapter": [2, 2, 0],
        "position_ids": [[0, 1, 0]],
        "cu_seqlens": [0, 2, 3, 3],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert not batch.needs_mask
    assert batch.mask()[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    padded = batch.padded(5, token_index=63)
    assert padded.slot.tolist() == [4, 0, 2, 4, 4] and padded.cu_seqlens.tolist() == [0, 2, 3, 3, 3, 3]
    assert padded.tokens == 128 and padded.token_ids[:3].equal(batch.token_ids)
    assert set(padded.token_index[3:].tolist()) == {63} and set(padded.token_slot[3:].tolist()) == {4}


def test_a_bidirectional_prefix_in_a_prefill_batch():
    """ChatGLM-6B's second coordinate counts from `<sop>` on; before it tokens attend in both directions."""
    sequences = [TokenSequence(0, [1, 2, 3], 9), TokenSequence(1, [4, 5, 6, 7], 9)]
    positions = {3: [[0, 1, 1], [0, 0, 1]], 4: [[0, 1, 1, 1], [0, 0, 1, 2]]}

    def position_ids_of(ids):
        return [list(coordinate) for coordinate in positions[len(ids)]]

    batch = pack_prompts(sequences, [0, 1], position_ids_of, bidirectional_prefix=True)
    assert batch.needs_mask and batch.next_position.tolist() == [[1, 1], [1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert batch.mask()[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert not pack_prompts(sequences[:1], [0], position_ids_of, bidirectional_prefix=True).needs_mask


def test_decode_attention_is_two_operators():
    """One by lengths, one by a mask; this machine's is checked against plain attention."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 1, 8), torch.randn(3, 2, 16, 8), torch.randn(3, 2, 16, 8)
    lengths = torch.tensor([0, 5])
    visible = (torch.arange(8) <= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
    mask = torch.zeros(2, 1, 1, 8).masked_fill(~visible, -torch.inf)
    output = masked_decode_attention(query, keys, values, mask, 0.5)
    repeated = [tensor[:2, :, :8].repeat_interleave(2, dim=1) for tensor in (keys, values)]
    scores = (query @ repeated[0].transpose(2, 3) * 0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ repeated[1]).transpose(1, 2))
    torch.library.opcheck(masked_decode_attention, (query, keys, values, mask, 0.5), test_utils="test_faketensor")
    fake = decode_attention._opoverload
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert fake(query, keys, values, lengths, 0.5).shape == output.shape


class EagerGraphs(dict):
    """`CudaGraphs` without a GPU: keeps the calls and makes them again."""

    def capture(self, key, call) -> float:
        self[key] = call
        return 0.0

    def replay(self, key) -> None:
        self[key]()


class KernelRunner(ModelRunner):
    """Takes the path of a GPU with kernels: padded prefills from static inputs, attention by lengths, no masks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.has_kernels, self.graphs = True, EagerGraphs()


def attend_by_lengths(query, keys, values, lengths, scaling):
    """What the Triton kernel computes, from a cache whose unfilled tokens are never read."""
    output = torch.empty_like(query).transpose(1, 2)
    for row, last in enumerate(lengths.tolist()):
        filled = [tensor[row : row + 1, :, : last + 1] for tensor in (keys, values)]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1], *filled, scale=scaling, enable_gqa=True
        )
        output[row] = attended[0].transpose(0, 1)
    return output


@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
def test_the_path_of_a_gpu_with_kernels_answers_the_same(build, monkeypatch):
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn_reference)
    monkeypatch.setattr(
        attention, "load_decode_attention", lambda: SimpleNamespace(decode_attention=attend_by_lengths)
    )
    model, prompts = build()
    prompts = prompts[:5]  # all causal or all bidirectional
    prepare_for_decoding(model)
    answers, runners = [], []
    for runner_type, config in (
        (ModelRunner, EngineConfig(5, 64, NEVER)),
        (KernelRunner, EngineConfig(2, 64, NEVER, decode_steps=3)),  # slots and static inputs are used again
    ):
        engine = Engine(model, config, runner_type)
        done = sorted(engine.answer(sequences_of(prompts, 12)), key=lambda sequence: sequence.sequence_id)
        answers.append([sequence.answer_ids for sequence in done])
        runners.append(engine.runner)
    assert answers[0] == answers[1]
    assert list(runners[1].graphs) == [("prefill", 128)]


@pytest.mark.parametrize("build", [trained_chatglm, random_glm, random_glm4])
@torch.inference_mode()
def test_prefill_without_a_mask(build, monkeypatch):
    """A padded batch for the varlen kernel, as on a GPU, leaves the same in cache and state as one with a mask."""
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn_reference)
    model, prompts = build()
    prepare_for_decoding(model)
    sequences, slots = sequences_of(prompts[:5], 20), [4, 0, 5, 2, 1]
    masked, varlen = (ModelRunner(model, EngineConfig(6, 64, NEVER)) for _ in range(2))
    masked.prefill(PrefillPlan(sequences, slots))
    batch = pack_prompts(sequences, slots, varlen.position_ids_of, varlen.has_prefix)
    assert not batch.needs_mask
    batch = batch.padded(6, varlen.max_seq_len - 1)
    assert batch.tokens == 128 and len(batch.slot) == 6
    varlen.compute_prefill(batch)
    for ours, expected in zip(varlen.state.per_slot(), masked.state.per_slot(), strict=True):
        assert ours.equal(expected)
    for slot, sequence in zip(slots, sequences, strict=True):
        filled = len(sequence.input_ids) - 1
        for ours, theirs in zip(varlen.caches, masked.caches, strict=True):
            for kind in ("keys", "values"):
                cached, expected = (getattr(cache, kind)[slot, :, :filled] for cache in (ours, theirs))
                torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)
