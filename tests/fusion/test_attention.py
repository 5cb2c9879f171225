from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtshpc.core.config import FusionConfig
from rtshpc.fusion.attention import KERNELS, fused_attention
from rtshpc.fusion.mixers import CrossAttention, StackedAttention

FLASH = "ScaledDotProductFlashAttentionForCpuBackward0"


def _nodes(out: Tensor) -> set[str]:
    """Names of the autograd nodes behind a result."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize(("c", "d"), [(16, 16), (13, 5), (4, 12), (96, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_product_of_matrices_at_any_width(c: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, w, dtype=dtype, requires_grad=True) for n, w in ((50, c), (40, c), (40, d)))
    weight = torch.randn(2, 3, 50, d)
    found = fused_attention(q, k, v)
    wanted = (q.float() @ k.float().mT * c**-0.5).softmax(dim=-1) @ v.float()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.float(), wanted, **near)
    ours = torch.autograd.grad((found.float() * weight).sum(), (q, k, v))
    plain = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for a, b in zip(ours, plain, strict=True):
        assert float((a.float() - b.float()).norm()) <= (1e-5 if dtype == torch.float32 else 0.02) * float(b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_kernel_runs_whatever_the_width_of_the_values(dtype: torch.dtype) -> None:
    q, k = (torch.randn(1, 1, 9, 12, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 1, 9, 5, dtype=dtype, requires_grad=True)
    assert FLASH in _nodes(fused_attention(q, k, v))
    # Without the padding torch takes the path that stores the matrix, and says nothing.
    assert FLASH not in _nodes(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_fallback_is_an_error(monkeypatch) -> None:
    q, k = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)
    with sdpa_kernel(KERNELS), pytest.raises(RuntimeError, match="No available kernel"):
        F.scaled_dot_product_attention(q, k, torch.randn(1, 1, 9, 8))
    # Where none of the kernels exists, as this one on a CPU, the call takes no other way.
    monkeypatch.setattr("rtshpc.fusion.attention.KERNELS", [SDPBackend.EFFICIENT_ATTENTION])
    with pytest.raises(RuntimeError, match="No viable backend"):
        fused_attention(q, k, k)


@pytest.mark.parametrize("mixer", [CrossAttention, StackedAttention])
def test_no_mixer_keeps_a_matrix_for_backward(mixer: type[CrossAttention]) -> None:
    side, width = 64, 8
    block = mixer(width, FusionConfig(heads=(1, 1, 1, 1), mlp_ratio=1), 0)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(torch.randn(1, width, side, side), torch.randn(1, width, side, side))
    assert FLASH in _nodes(out)
    matrix = (side * side) ** 2 * 4
    assert max(kept.values()) <= 2 * side * side * width * 4 * 2 and sum(kept.values()) < matrix / 20


PEAK = """
import resource, torch
from rtshpc.fusion.attention import fused_attention
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for n in (128, 128, 128))
fused_attention(q, k, v).sum().backward()
q, k, v = (torch.randn(1, 1, 16400, 8, requires_grad=True) for _ in range(3))
before = peak()
fused_attention(q, k, v).sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_the_peak_of_forward_and_backward_stays_far_below_the_matrix() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    matrix = 16400**2 * 4
    assert matrix > 1e9 and int(done.stdout) < matrix / 10
