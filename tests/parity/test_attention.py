"""Attention of segments in bfloat16 on a CPU equals torch's own, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmchat.models.llm import PRODUCTS_MAX_LENGTH, _segment_attention

DIM, SCALING = 32, 32**-0.5


def _inputs(length: int, kv_heads: int, scale: float) -> list[Tensor]:
    """Query, key and value of 6 query heads; scores are of about `scale` squared."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(1, heads, length, DIM, generator=generator) * size).bfloat16().requires_grad_()
        for heads, size in ((6, scale), (kv_heads, scale), (kv_heads, 1.0))
    ]


def _run(attend, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    out.backward(weights)
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def _ours(borders: list[int], dropout: float = 0.0):
    lengths = torch.tensor(borders, dtype=torch.int32)
    return lambda q, k, v: _segment_attention(
        nn.Module(), q, k, v, None, scaling=SCALING, dropout=dropout, cu_seq_lens_q=lengths
    )[0].transpose(1, 2)


def _torchs(borders: list[int], dropout: float = 0.0):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, a:b],
                k[:, :, a:b],
                v[:, :, a:b],
                dropout_p=dropout,
                is_causal=True,
                scale=SCALING,
                enable_gqa=True,
            )
            for a, b in pairwise(borders)
        ]
        return torch.cat(parts, dim=2)

    return attend


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("lengths", [(1, 2, 70), (PRODUCTS_MAX_LENGTH, PRODUCTS_MAX_LENGTH + 1)], ids=str)
def test_attention_in_bfloat16_is_as_exact_as_torchs(lengths: tuple[int, ...], kv_heads: int, scale: float) -> None:
    """No further from the truth, torch's in float64, than twice torch's own error in bfloat16, on average; and within
    3 % of the largest value of each tensor everywhere. At scale 10, scores rounded to bfloat16 are ten times off.
    """
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = _inputs(borders[-1], kv_heads, scale)
    true = _run(_torchs(borders), inputs, torch.float64)
    ours, torchs = (_run(attend(borders), inputs, torch.bfloat16) for attend in (_ours, _torchs))
    for wanted, found, other in zip(true, ours, torchs, strict=True):
        limit = float(wanted.abs().max())
        assert (found - wanted).abs().mean() <= 2 * (other - wanted).abs().mean() + 1e-5 * limit
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.03 * limit)


def test_dropout_is_applied_and_long_segments_are_torchs() -> None:
    for borders, dropout in (([0, 40, 100], 0.5), ([0, PRODUCTS_MAX_LENGTH + 1], 0.0)):
        inputs = _inputs(borders[-1], 2, 1.0)
        results = []
        for attend in (_ours, _torchs):
            torch.manual_seed(3)
            results.append(_run(attend(borders, dropout), inputs, torch.bfloat16))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    short = _inputs(60, 2, 1.0)
    plain, thinned = (_run(_ours([0, 60], dropout), short, torch.bfloat16)[0] for dropout in (0.0, 0.5))
    assert not torch.allclose(plain, thinned)


def test_only_short_segments_take_memory_with_their_length_squared() -> None:
    """Torch's fused kernel keeps no matrix of shares for the backward, the products do."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    for length, has_matrix in ((64, True), (PRODUCTS_MAX_LENGTH + 1, False)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _ours([0, length])(*_inputs(length, 2, 1.0))
        assert any(shape[-1] == length == shape[-2] for shape in kept if len(shape) > 1) == has_matrix
