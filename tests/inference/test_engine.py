"""The engine's greedy answers equal those of plain `generate`, whatever else is in the batch."""

import gc
import weakref

import pytest
import torch
from engine_models import (
    NEVER,
    KernelRunner,
    put_torch_for_kernels,
    random_glm,
    random_glm4,
    sequences_of,
    trained_chatglm,
)

from utils.inference.engine import Engine
from utils.inference.engine.attention import decode_attention, masked_decode_attention, packed_attention
from utils.inference.engine.model_runner import EngineConfig, ModelRunner
from utils.inference.engine.pages import pages_for
from utils.inference.engine.prefill import MAX_PREFILL_TOKENS, pack_chunks, padded_prefill_length
from utils.inference.engine.scheduler import PrefillPlan, PromptChunk, StopRule, TokenSequence
from utils.inference.placement import prepare_for_decoding


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


@pytest.mark.parametrize("take, expected", [(list, [1, 3, 0, 2]), (iter, [0, 1, 2, 3])])
def test_of_a_list_the_longest_answers_begin_first(take, expected):
    model, prompts = random_glm()
    prepare_for_decoding(model)
    lengths = (2, 7, 1, 4)
    sequences = [TokenSequence(number, prompts[number], length) for number, length in enumerate(lengths)]
    done = Engine(model, EngineConfig(1, 64, NEVER, compile_layers=False)).answer(take(sequences))
    assert [(sequence.sequence_id, len(sequence.answer_ids)) for sequence in done] == [
        (number, lengths[number]) for number in expected
    ]


def test_prefills_are_padded_to_few_lengths():
    lengths = {padded_prefill_length(tokens) for tokens in range(1, MAX_PREFILL_TOKENS + 1)}
    assert len(lengths) == 15 and max(lengths) == MAX_PREFILL_TOKENS
    assert all(tokens <= padded_prefill_length(tokens) < max(1.5 * tokens + 1, 129) for tokens in range(1, 10000))
    assert all(padded_prefill_length(tokens) < 1.25 * tokens + 1 for tokens in range(1024, 10000))


def plan_of(sequences: list[TokenSequence], slots: list[int | None]) -> PrefillPlan:
    """Whole prompts, the n-th in page n + 1 alone."""
    return PrefillPlan(
        [
            PromptChunk(
                sequence, slot, 0, (stop := len(sequence.token_ids) - 1), [number + 1] * max(1, pages_for(stop))
            )
            for number, (sequence, slot) in enumerate(zip(sequences, slots, strict=True))
        ]
    )


def count_tokens(sequence, start, stop):
    return [list(range(start, stop))]


def test_the_tensors_of_a_prefill_batch():
    sequences = [
        TokenSequence(7, [11, 12, 13], 20, adapter=2),
        TokenSequence(9, [21, 22], 30, answer_ids=[23, 24]),
        TokenSequence(3, [5], 4),
    ]
    batch = pack_chunks(plan_of(sequences, [4, 0, 2]), count_tokens, unused_slot=6, tiled=True)
    expected = {
        "slot": [4, 0, 2],
        "next_token": [13, 24, 5],
        "cache_length": [2, 3, 0],
        "tokens_left": [20, 28, 4],
        "sequence_id": [7, 9, 3],
        "answer_length": [0, 2, 0],
        "adapter": [2, 0, 0],
        "next_position": [[2, 3, 0]],
        "token_ids": [11, 12, 21, 22, 23],
        "token_page": [1, 1, 2, 2, 2],
        "token_offset": [0, 1, 0, 1, 2],
        "token_adapter": [2, 2, 0, 0, 0],
        "position_ids": [[0, 1, 0, 1, 2]],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert batch.attention.tiles.tolist() == [[0, 2, 0, 1, 0], [2, 3, 0, 2, 0]]  # the third has no token to prefill
    assert batch.attention.pages.tolist() == [0, 1, 2]
    padded = batch.padded(5, 9, unused_slot=6)
    assert padded.slot.tolist() == [4, 0, 2, 6, 6] and padded.tokens == 128 == batch.padded_length
    assert padded.token_ids[:5].equal(batch.token_ids) and set(padded.token_page[5:].tolist()) == {0}
    tiles, pages = padded.attention.tiles.tolist(), padded.attention.pages.tolist()
    assert tiles[:2] == batch.attention.tiles.tolist() and pages == [0, 1, 2, *[0] * 6]
    assert tiles[2:4] == [[5, 64, 0, 0, 0], [69, 59, 0, 0, 0]] and not any(map(any, tiles[4:]))


@pytest.mark.parametrize("sequences, tokens", [(1, 1), (1, 4096), (16, 3), (500, 1), (64, 60), (70, 29)])
def test_a_padded_batch_has_room_for_its_tiles(sequences, tokens):
    plan = plan_of([TokenSequence(0, range(tokens + 1), 9) for _ in range(sequences)], list(range(sequences)))
    padded = pack_chunks(plan, count_tokens, 500, tiled=True).padded(500, 600, 500)
    covered = sum(count for _, count, *_ in padded.attention.tiles.tolist())
    assert covered == padded.tokens == padded_prefill_length(max(sequences * tokens, 8 * sequences))


def chunks_with_a_past() -> PrefillPlan:
    """A chunk in the middle of a prompt, and the rest of another behind a shared page."""
    first, second = TokenSequence(0, range(100, 400), 9), TokenSequence(1, range(500, 567), 9)
    return PrefillPlan([PromptChunk(first, None, 70, 72, [3, 1, 4]), PromptChunk(second, 0, 64, 66, [5, 9])])


def test_the_tiles_of_a_prefill_batch_with_a_past():
    batch = pack_chunks(chunks_with_a_past(), count_tokens, unused_slot=2, tiled=True)
    assert batch.slot.tolist() == [2, 0] and batch.token_ids.tolist() == [170, 171, 564, 565]
    assert batch.token_page.tolist() == [1, 1, 9, 9] and batch.token_offset.tolist() == [6, 7, 0, 1]
    assert batch.attention.tiles.tolist() == [[0, 2, 70, 1, 0], [2, 2, 64, 3, 0]]
    assert batch.attention.pages.tolist() == [0, 3, 1, 5, 9]


def test_the_bounds_of_a_prefill_batch_with_a_past():
    bounds = pack_chunks(chunks_with_a_past(), count_tokens, unused_slot=2, tiled=False).attention
    assert bounds.starts.tolist() == [0, 2, 4] and bounds.key_starts.tolist() == [0, 72, 138]
    page, offset = bounds.gathered
    assert page.tolist() == [3] * 64 + [1] * 8 + [5] * 64 + [9] * 2
    assert offset.tolist() == [*range(64), *range(8), *range(64), 0, 1]


def test_a_bidirectional_prefix_in_a_prefill_batch():
    """ChatGLM-6B's second coordinate counts from `<sop>` on; before it tokens attend in both directions."""
    sequences = [TokenSequence(0, [1, 2, 3], 9), TokenSequence(1, [4, 5, 6, 7], 9)]
    positions = {3: [[0, 1, 1], [0, 0, 1]], 4: [[0, 1, 1, 1], [0, 0, 1, 2]]}

    def position_ids_of(sequence, start, stop):
        return [coordinate[start:stop] for coordinate in positions[len(sequence.input_ids)]]

    tiled, bounded = (
        pack_chunks(plan_of(sequences, [0, 1]), position_ids_of, 2, kind, True) for kind in (True, False)
    )
    assert tiled.next_position.tolist() == [[1, 1], [1, 2]]
    assert tiled.position_ids.tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert [prefix for *_, prefix in tiled.attention.tiles.tolist()] == [2, 2]
    assert bounded.attention.prefixes.tolist() == [2, 2] and bounded.attention.gathered is None


def test_decode_attention_is_two_operators():
    """One by lengths, one by a mask; this machine's is checked against plain attention."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 1, 8), torch.randn(5, 2, 16, 8), torch.randn(5, 2, 16, 8)
    table = torch.tensor([[3, 1, 0], [4, 2, 0]], dtype=torch.int32)
    lengths = torch.tensor([0, 21])
    visible = (torch.arange(32) <= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
    mask = torch.zeros(2, 1, 1, 32).masked_fill(~visible, -torch.inf)
    output = masked_decode_attention(query, keys, values, table, mask, 0.5)
    first, second = (
        torch.stack([torch.cat((cache[3], cache[1]), 1), torch.cat((cache[4], cache[2]), 1)])
        for cache in (keys, values)
    )
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (first, second)]
    scores = (query @ repeated[0].transpose(2, 3) * 0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ repeated[1]).transpose(1, 2))
    arguments = (query, keys, values, table, mask, 0.5)
    torch.library.opcheck(masked_decode_attention, arguments, test_utils="test_faketensor")
    fake = decode_attention._opoverload
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert fake(query, keys, values, table, lengths, 0.5).shape == output.shape


def test_packed_attention():
    """A prompt with a prefix, the rest of one whose beginning is cached, an empty one, and padding."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    starts, key_starts = torch.tensor([0, 3, 3, 5]).int(), torch.tensor([0, 3, 3, 7]).int()
    prefixes = torch.tensor([2, 0, 0])
    visible = torch.zeros(6, 7, dtype=torch.bool)
    for row, columns in enumerate(([0, 1], [0, 1], [0, 1, 2], [3, 4, 5], [3, 4, 5, 6])):
        visible[row, columns] = True
    arguments = (query, key, value, starts, key_starts, prefixes, 0.3)
    output = packed_attention(*arguments)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    assert not output[0, 5].any()
    torch.library.opcheck(packed_attention, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(
    "build, compiles", [(trained_chatglm, False), (trained_chatglm, True), (random_glm, False), (random_glm4, False)]
)
def test_the_path_of_a_gpu_with_kernels_answers_the_same(build, compiles, monkeypatch):
    put_torch_for_kernels(monkeypatch)
    model, prompts = build()
    prepare_for_decoding(model)
    answers, runners = [], []
    for runner_type, config in (
        (ModelRunner, EngineConfig(5, 64, NEVER)),
        # Slots and static inputs are used again.
        (KernelRunner, EngineConfig(2, 64, NEVER, decode_steps=3, compile_layers=compiles)),
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
    """A padded batch for the kernel, as on a GPU, leaves the same in cache and state as one with a mask."""
    put_torch_for_kernels(monkeypatch)
    model, prompts = build()
    prepare_for_decoding(model)
    sequences, slots = sequences_of(prompts[:5], 20), [4, 0, 5, 2, 1]
    masked, tiled = (kind(model, EngineConfig(6, 64, NEVER)) for kind in (ModelRunner, KernelRunner))
    plan = plan_of(sequences, slots)
    masked.prefill(plan)
    batch = tiled.pack(plan).padded(6, tiled.listed_pages, tiled.state.unused_slot)
    assert batch.tokens == 128 and len(batch.slot) == 6
    tiled.compute_prefill(batch)
    for name in ("next_token", "cache_length", "tokens_left", "sequence_id", "answer_length", "adapter", "position"):
        assert getattr(tiled.state, name)[:6].equal(getattr(masked.state, name)[:6])
    for number, sequence in enumerate(sequences):
        filled = len(sequence.input_ids) - 1
        for ours, theirs in zip(tiled.caches, masked.caches, strict=True):
            for kind in ("keys", "values"):
                cached, expected = (getattr(cache, kind)[number + 1, :, :filled] for cache in (ours, theirs))
                torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)
