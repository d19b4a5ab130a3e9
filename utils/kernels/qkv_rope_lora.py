"""
A Triton kernel between the product for query, key and value and attention, in training: it adds the adapter's branch,
rotates, and lays query, key and value apart; and the same backwards, without the branch.

Shapes: T tokens, D head size, C = (H + 2 K) D columns of the product, R rank. GLM: H heads of queries, K of keys, K of
values one after the other; elements 2 p and 2 p + 1 are the p-th pair, and the first pairs turn. ChatGLM-6B: K = H,
head by head [query key value]; pairs are a quarter of a head apart within each half, and all turn.
"""

import torch
import triton
import triton.language as tl

TOKENS = 32  # of a program, which has one head
MOST_OF_B = 128 * 128  # elements of a head, 32 KiB of a program's shared memory in 16 bits


@triton.jit
def _load_pairs(states_ptr, row, inside, NEIGHBOURS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """One head of some tokens as its pairs' first and second elements, each (TOKENS, D / 2)."""
    if NEIGHBOURS:  # read side by side
        states = tl.load(states_ptr + row + tl.arange(0, D)[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(states, (TOKENS, D // 2, 2)))
    else:
        element = _first_elements(NEIGHBOURS, D)
        first = tl.load(states_ptr + row + element, mask=inside, other=0.0)
        second = tl.load(states_ptr + row + element + D // 4, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    states_ptr, row, first, second, inside, NEIGHBOURS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr
):
    dtype = states_ptr.dtype.element_ty
    first, second = first.to(dtype), second.to(dtype)
    if NEIGHBOURS:
        states = tl.reshape(tl.join(first, second), (TOKENS, D))
        tl.store(states_ptr + row + tl.arange(0, D)[None, :], states, mask=inside)
    else:
        element = _first_elements(NEIGHBOURS, D)
        tl.store(states_ptr + row + element, first, mask=inside)
        tl.store(states_ptr + row + element + D // 4, second, mask=inside)


@triton.jit
def _first_elements(NEIGHBOURS: tl.constexpr, D: tl.constexpr):
    pair = tl.arange(0, D // 2)[None, :]
    return 2 * pair if NEIGHBOURS else pair // (D // 4) * (D // 2) + pair % (D // 4)


@triton.jit
def _heads_kernel(
    heads_ptr,  # (T, C)
    query_ptr,  # (T, H, D)
    key_ptr,  # (T, K, D)
    value_ptr,
    cos_ptr,  # (T, factors)
    sin_ptr,
    hidden_ptr,  # (T, R)
    B_ptr,  # (C, R)
    T,
    H,
    K,
    factors,
    R,
    NEIGHBOURS: tl.constexpr,
    BACK: tl.constexpr,
    D: tl.constexpr,
    RANKS: tl.constexpr,  # a power of two of at least 16 and R, 0 without a branch
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.program_id(1)
    element = _first_elements(NEIGHBOURS, D)
    if NEIGHBOURS:
        is_query, is_value = slot < H, slot >= H + K
        head = tl.where(is_query, slot, tl.where(is_value, slot - H - K, slot - H))
        factor = tl.arange(0, D // 2)[None, :]
        turning = factors // 2
    else:
        is_query, is_value = slot % 3 == 0, slot % 3 == 2
        head = slot // 3
        factor = element
        turning = factors
    inside = token < T
    joint = token * (H + 2 * K) * D + slot * D
    apart = token * tl.where(is_query, H, K) * D + head * D
    if not BACK:
        first, second = _load_pairs(heads_ptr, joint, inside, NEIGHBOURS, D, TOKENS)
    elif is_query:
        first, second = _load_pairs(query_ptr, apart, inside, NEIGHBOURS, D, TOKENS)
    elif is_value:
        first, second = _load_pairs(value_ptr, apart, inside, NEIGHBOURS, D, TOKENS)
    else:
        first, second = _load_pairs(key_ptr, apart, inside, NEIGHBOURS, D, TOKENS)
    if RANKS > 0:
        rank = tl.arange(0, RANKS)
        hidden = tl.load(hidden_ptr + token * R + rank[None, :], mask=inside & (rank[None, :] < R), other=0.0)
        row = B_ptr + (slot * D + element) * R + rank[:, None]  # (RANKS, D / 2)
        GAP: tl.constexpr = 1 if NEIGHBOURS else D // 4
        first += tl.dot(hidden, tl.load(row, mask=rank[:, None] < R, other=0.0))
        second += tl.dot(hidden, tl.load(row + GAP * R, mask=rank[:, None] < R, other=0.0))
    rotates = inside & (factor < tl.where(is_value, 0, turning))
    cos = tl.load(cos_ptr + token * factors + factor, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * factors + factor, mask=rotates, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    turned = first * cos - second * sin
    partner = second * cos + first * sin
    if BACK:
        _store_pairs(heads_ptr, joint, turned, partner, inside, NEIGHBOURS, D, TOKENS)
    elif is_query:
        _store_pairs(query_ptr, apart, turned, partner, inside, NEIGHBOURS, D, TOKENS)
    elif is_value:
        _store_pairs(value_ptr, apart, turned, partner, inside, NEIGHBOURS, D, TOKENS)
    else:
        _store_pairs(key_ptr, apart, turned, partner, inside, NEIGHBOURS, D, TOKENS)


def supports_head_dim(size: int, rank: int) -> bool:
    """Whether heads of D = `size` and a branch of R = `rank` are such that a program of any GPU can hold."""
    return 32 <= size <= 256 and size == triton.next_power_of_2(size) and size * rank <= MOST_OF_B


def _launch(heads, query, key, value, cos, sin, branch, neighbours: bool) -> None:
    tokens, H, D = query.shape
    K = key.shape[1]
    hidden, B = branch or (heads, heads)  # not read
    R = B.shape[1] if branch else 0
    options = {"NEIGHBOURS": neighbours, "BACK": branch is None, "D": D, "TOKENS": TOKENS, "num_warps": 4}
    options["RANKS"] = max(16, triton.next_power_of_2(R)) if branch else 0
    grid = (triton.cdiv(tokens, TOKENS), H + 2 * K)
    tensors = (heads, query, key, value, cos, sin, hidden, B)
    _heads_kernel[grid](*tensors, tokens, H, K, cos.shape[1], R, **options)


@torch.library.custom_op("chatglm_family::qkv_rope_lora", mutates_args=())
def qkv_rope_lora(
    heads: torch.Tensor,
    hidden: torch.Tensor,
    B: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    counts: list[int],
    neighbours: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        heads: (T, C) in 16 bits; hidden (T, R) and B (C, R) in their dtype, all contiguous.
        cos, sin: of GLM (T, F), whose first halves are read; of ChatGLM-6B (T, D).
        counts: H and K.
        neighbours: whether it is GLM.

    Returns:
        Of heads + hidden B^T the query (T, H, D) and the key (T, K, D), rotated, and the value (T, K, D).
    """
    apart = _empty_apart(heads, hidden, B, cos, sin, counts, neighbours)
    _launch(heads, *apart, cos, sin, (hidden, B), neighbours)
    return apart


@qkv_rope_lora.register_fake
def _empty_apart(heads, hidden, B, cos, sin, counts, neighbours):
    H, K = counts
    tokens, columns = heads.shape
    size = columns // (H + 2 * K)
    return tuple(heads.new_empty(tokens, count, size) for count in (H, K, K))


@torch.library.custom_op("chatglm_family::qkv_rope_lora_backward", mutates_args=())
def qkv_rope_lora_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    neighbours: bool,
) -> torch.Tensor:
    """The gradients of what `qkv_rope_lora` returned, contiguous -> the gradient of its heads (T, C)."""
    heads = _empty_joint(query, key, value, cos, sin, neighbours)
    _launch(heads, query, key, value, cos, sin, None, neighbours)
    return heads


@qkv_rope_lora_backward.register_fake
def _empty_joint(query, key, value, cos, sin, neighbours):
    tokens, H, D = query.shape
    return query.new_empty(tokens, (H + 2 * key.shape[1]) * D)
