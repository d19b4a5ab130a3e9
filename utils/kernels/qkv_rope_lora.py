"""
Query, key and value heads of training from one fused projection, as a Triton kernel, and the gradient.

Called by utils/layers/fused_qkv.py through torch.ops.chatglm_family. In one pass it adds the LoRA term to the
projection, rotates query and key (RoPE, arXiv:2104.09864) and writes query, key and value apart; backwards it undoes
rotation and split. torch's compiler makes several kernels of this. Liger's RoPE rotates half against half of a whole
head; GLM rotates neighbours, and only part of a head, ChatGLM-6B quarter against quarter.

Shapes: T tokens, H query heads, K key/value heads, D head size, C = (H + 2 K) D, R LoRA rank. qkv (T, C) has
- GLM, `interleaved`: H query heads, K key heads, K value heads; elements 2 p and 2 p + 1 of a head are pair p, and
  only the first pairs rotate;
- ChatGLM-6B: K = H, and head by head [query key value]; pairs are D / 4 apart within each half of a head, all rotate.
"""

import torch
import triton
import triton.language as tl

BLOCK_T = 32  # tokens of a program, which has one head
MAX_LORA_B_ELEMENTS = 128 * 128  # of one head's B, 32 KiB of a program's shared memory in 16 bits


@triton.jit
def _load_pairs(states_ptr, offset, inside, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """One head of BLOCK_T tokens as the first and the second element of each pair, both (BLOCK_T, D / 2) float32."""
    if INTERLEAVED:  # load the neighbours together
        states = tl.load(states_ptr + offset + tl.arange(0, D)[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(states, (BLOCK_T, D // 2, 2)))
    else:
        element = _first_elements(INTERLEAVED, D)
        first = tl.load(states_ptr + offset + element, mask=inside, other=0.0)
        second = tl.load(states_ptr + offset + element + D // 4, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    states_ptr, offset, first, second, inside, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The inverse of `_load_pairs`."""
    dtype = states_ptr.dtype.element_ty
    first, second = first.to(dtype), second.to(dtype)
    if INTERLEAVED:
        states = tl.reshape(tl.join(first, second), (BLOCK_T, D))
        tl.store(states_ptr + offset + tl.arange(0, D)[None, :], states, mask=inside)
    else:
        element = _first_elements(INTERLEAVED, D)
        tl.store(states_ptr + offset + element, first, mask=inside)
        tl.store(states_ptr + offset + element + D // 4, second, mask=inside)


@triton.jit
def _first_elements(INTERLEAVED: tl.constexpr, D: tl.constexpr):
    """Where in a head the first element of each pair is, (1, D / 2)."""
    pair = tl.arange(0, D // 2)[None, :]
    return 2 * pair if INTERLEAVED else pair // (D // 4) * (D // 2) + pair % (D // 4)


@triton.jit
def _qkv_rope_lora_kernel(
    qkv_ptr,  # (T, C)
    query_ptr,  # (T, H, D)
    key_ptr,  # (T, K, D)
    value_ptr,  # (T, K, D)
    cos_ptr,  # (T, F)
    sin_ptr,  # (T, F)
    hidden_ptr,  # (T, R)
    B_ptr,  # (C, R)
    T,
    H,
    K,
    F,
    R,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # a power of two, at least 16 and R; 0 without a LoRA term
    BLOCK_T: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    fused_head = tl.program_id(1)  # of the H + 2 K heads of qkv
    element = _first_elements(INTERLEAVED, D)
    if INTERLEAVED:
        is_query, is_value = fused_head < H, fused_head >= H + K
        head = tl.where(is_query, fused_head, tl.where(is_value, fused_head - H - K, fused_head - H))
        angle = tl.arange(0, D // 2)[None, :]
        angles = F // 2
    else:
        is_query, is_value = fused_head % 3 == 0, fused_head % 3 == 2
        head = fused_head // 3
        angle = element
        angles = F
    inside = token < T
    fused = token * (H + 2 * K) * D + fused_head * D
    split = token * tl.where(is_query, H, K) * D + head * D
    if not BACKWARD:
        first, second = _load_pairs(qkv_ptr, fused, inside, INTERLEAVED, D, BLOCK_T)
    elif is_query:
        first, second = _load_pairs(query_ptr, split, inside, INTERLEAVED, D, BLOCK_T)
    elif is_value:
        first, second = _load_pairs(value_ptr, split, inside, INTERLEAVED, D, BLOCK_T)
    else:
        first, second = _load_pairs(key_ptr, split, inside, INTERLEAVED, D, BLOCK_T)
    if BLOCK_R > 0:
        r = tl.arange(0, BLOCK_R)
        hidden = tl.load(hidden_ptr + token * R + r[None, :], mask=inside & (r[None, :] < R), other=0.0)
        B = B_ptr + (fused_head * D + element) * R + r[:, None]  # (BLOCK_R, D / 2)
        GAP: tl.constexpr = 1 if INTERLEAVED else D // 4
        first += tl.dot(hidden, tl.load(B, mask=r[:, None] < R, other=0.0))
        second += tl.dot(hidden, tl.load(B + GAP * R, mask=r[:, None] < R, other=0.0))
    # Values have no angle. (A mask of `is_value`, a scalar, is one that Triton 3.9's interpreter refuses.)
    rotates = inside & (angle < tl.where(is_value, 0, angles))
    cos = tl.load(cos_ptr + token * F + angle, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * F + angle, mask=rotates, other=0.0).to(tl.float32)
    if BACKWARD:
        sin = -sin
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if BACKWARD:
        _store_pairs(qkv_ptr, fused, rotated_first, rotated_second, inside, INTERLEAVED, D, BLOCK_T)
    elif is_query:
        _store_pairs(query_ptr, split, rotated_first, rotated_second, inside, INTERLEAVED, D, BLOCK_T)
    elif is_value:
        _store_pairs(value_ptr, split, rotated_first, rotated_second, inside, INTERLEAVED, D, BLOCK_T)
    else:
        _store_pairs(key_ptr, split, rotated_first, rotated_second, inside, INTERLEAVED, D, BLOCK_T)


def supports_head_dim(head_dim: int, rank: int) -> bool:
    """Whether a program of any GPU can hold a head of D = `head_dim` and its share of B, of R = `rank`."""
    is_power_of_2 = head_dim == triton.next_power_of_2(head_dim)
    return 32 <= head_dim <= 256 and is_power_of_2 and head_dim * rank <= MAX_LORA_B_ELEMENTS


def _launch(qkv, query, key, value, cos, sin, lora, interleaved: bool) -> None:
    """Run the kernel: forward with `lora` = (hidden, B), from qkv; backward with None, into qkv."""
    T, H, D = query.shape
    K = key.shape[1]
    hidden, B = lora or (qkv, qkv)  # placeholders, which the kernel does not read
    R = B.shape[1] if lora else 0
    grid = (triton.cdiv(T, BLOCK_T), H + 2 * K)
    _qkv_rope_lora_kernel[grid](
        qkv,
        query,
        key,
        value,
        cos,
        sin,
        hidden,
        B,
        T,
        H,
        K,
        cos.shape[1],
        R,
        INTERLEAVED=interleaved,
        BACKWARD=lora is None,
        D=D,
        BLOCK_R=max(16, triton.next_power_of_2(R)) if lora else 0,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )


@torch.library.custom_op("chatglm_family::qkv_rope_lora", mutates_args=())
def qkv_rope_lora(
    qkv: torch.Tensor,
    hidden: torch.Tensor,
    B: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_counts: list[int],
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Query, key and value heads of qkv + hidden B^T, query and key rotated.

    Args:
        qkv: (T, C) in 16 bits, the frozen projection; like all tensors here contiguous.
        hidden: (T, R), inputs A^T of the adapter, in the dtype of `qkv`.
        B: (C, R), scaled, in the dtype of `qkv`.
        cos: (T, F). GLM: the second half repeats the first and is not read. ChatGLM-6B: F = D, and the second quarter
            of each half repeats the first and is not read.
        sin: as `cos`.
        head_counts: [H, K].
        interleaved: GLM's layout and rotation, else ChatGLM-6B's.

    Returns:
        Query (T, H, D), key (T, K, D) and value (T, K, D) in the dtype of `qkv`.
    """
    heads = _empty_heads(qkv, hidden, B, cos, sin, head_counts, interleaved)
    _launch(qkv, *heads, cos, sin, (hidden, B), interleaved)
    return heads


@qkv_rope_lora.register_fake
def _empty_heads(qkv, hidden, B, cos, sin, head_counts, interleaved):
    H, K = head_counts
    T, C = qkv.shape
    D = C // (H + 2 * K)
    return tuple(qkv.new_empty(T, count, D) for count in (H, K, K))


@torch.library.custom_op("chatglm_family::qkv_rope_lora_backward", mutates_args=())
def qkv_rope_lora_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """
    The gradient of `qkv` (T, C) from the gradients of what `qkv_rope_lora` returned.

    Args:
        query: gradient (T, H, D), key (T, K, D) and value (T, K, D), all contiguous.
        cos, sin, interleaved: as for `qkv_rope_lora`.
    """
    qkv = _empty_qkv(query, key, value, cos, sin, interleaved)
    _launch(qkv, query, key, value, cos, sin, None, interleaved)
    return qkv


@qkv_rope_lora_backward.register_fake
def _empty_qkv(query, key, value, cos, sin, interleaved):
    T, H, D = query.shape
    return query.new_empty(T, (H + 2 * key.shape[1]) * D)
