"""Query, key and value with rotation and the LoRA term, and the gradient, beside torch."""

import pytest
import torch
from kernel_checks import DEVICE, ON_GPU, ROUNDING, assert_close

from utils.kernels import qkv_rope_lora

DTYPE, TOLERANCE = (torch.bfloat16, 2 * ROUNDING) if ON_GPU else (torch.float32, 1e-5)
T = 140  # fills no tile of 32 tokens
cases = pytest.mark.parametrize(
    "is_glm, H, K, D, factors, rank",
    [
        pytest.param(True, 4, 2, 64, 32, 12, id="GLM, half of a head turns"),
        pytest.param(True, 4, 4, 64, 64, 12, id="GLM, whole heads turn"),
        pytest.param(True, 4, 1, 64, 16, 3, id="GLM, a quarter turns, one key head"),
        pytest.param(False, 4, 4, 64, 64, 4, id="ChatGLM-6B"),
        pytest.param(False, 3, 3, 32, 32, 33, id="ChatGLM-6B, 3 heads"),
    ],
)


def rotate_interleaved(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """GLM: elements 2 p and 2 p + 1 of a head turn by angle p; those beyond the angles stay."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = states[..., : 2 * half].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((turned, states[..., 2 * half :]), dim=-1)


def rotate_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """ChatGLM-6B: within each half of a head element p of the first quarter turns with p of the second."""
    first, second = states.unflatten(-1, (2, 2, -1)).unbind(-2)  # each (T, H, 2, D / 4)
    cos, sin = (factor[:, None].unflatten(-1, (2, 2, -1))[..., 0, :] for factor in (cos, sin))
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def expected_heads(qkv, hidden, B, factors, is_glm, H, K):
    heads = (qkv + hidden @ B.t()).unflatten(1, (H + 2 * K, -1))
    if is_glm:
        query, key, value = heads.split((H, K, K), dim=1)
        return rotate_interleaved(query, *factors), rotate_interleaved(key, *factors), value
    query, key, value = heads.unflatten(1, (H, 3)).unbind(2)
    return rotate_halves(query, *factors), rotate_halves(key, *factors), value


def random_factors(is_glm: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, count). The elements that repeat others are NaN: the kernel does not read them."""
    angles = 10 * torch.randn(T, count, device=DEVICE)
    repeated = torch.arange(count, device=DEVICE)
    repeated = repeated >= count // 2 if is_glm else repeated % (count // 2) >= count // 4
    return tuple(factor.masked_fill(repeated, torch.nan).to(DTYPE) for factor in (angles.cos(), angles.sin()))


@cases
def test_heads_and_the_gradient_of_the_projection(is_glm, H, K, D, factors, rank):
    shapes = (T, (H + 2 * K) * D), (T, rank), ((H + 2 * K) * D, rank)
    qkv, hidden, B = (torch.randn(*shape, device=DEVICE, dtype=DTYPE) for shape in shapes)
    cos_sin = random_factors(is_glm, factors)
    leaf = qkv.float().requires_grad_()
    exact_factors = [factor.float() for factor in cos_sin]
    expected = expected_heads(leaf, hidden.float(), B.float(), exact_factors, is_glm, H, K)
    actual = qkv_rope_lora.qkv_rope_lora(qkv, hidden, B, *cos_sin, [H, K], is_glm)
    for states, exact in zip(actual, expected, strict=True):
        assert_close(states, exact.detach(), TOLERANCE)
    gradients = [torch.randn_like(states) for states in actual]
    torch.autograd.backward(expected, [gradient.float() for gradient in gradients])
    assert_close(qkv_rope_lora.qkv_rope_lora_backward(*gradients, *cos_sin, is_glm), leaf.grad, TOLERANCE)


@pytest.mark.parametrize(
    "head_dim, rank, is_supported",
    [(128, 3 * 32, True), (128, 3 * 64, False), (256, 64, True), (16, 4, False), (512, 4, False), (96, 4, False)],
)
def test_heads_that_a_program_cannot_hold_stay_with_torch(head_dim, rank, is_supported):
    assert qkv_rope_lora.supports_head_dim(head_dim, rank) is is_supported
