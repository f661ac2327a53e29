"""What the docstrings of delora.py say, number by number.

    pytest examples/tests/test_docstrings.py    needs torch alone

Each test computes a claim from its formula, beside delora.py. The symbols are those of delora.py's
docstring.
"""

import pytest
import torch
from torch import nn

from delora import DeLoRA, DeLoRALinear, inject, param_groups
from test_delora import Attention, distance, tol


def unit_rows(A):
    """Â (r, in): A with rows of length one."""
    return A / A.norm(dim=1, keepdim=True)


def unit_columns(B):
    """B̂ (out, r): B with columns of length one."""
    return B / B.norm(dim=0, keepdim=True)


# ------------------------------------------------------------------------------------------------
# The arguments
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ("DeLoRALinear", "inject"))
def test_the_defaults_are_those_of_the_paper_and_its_code(by):
    """r = 8, λ = 15, column norms, tied, no dropout."""
    if by == "inject":
        layer = inject(Attention(), ["q_proj"])["q_proj"]
    else:
        layer = DeLoRALinear(nn.Linear(8, 8))
    assert layer.delora.A.shape == (8, 8)
    assert layer.delora.lam.tolist() == [15.0]
    assert layer.delora.lam0 is None
    assert layer.dropout.p == 0
    wanted = layer.base_layer.weight.norm(dim=0)
    assert distance(layer.delora.w, wanted) <= tol(torch.float32, 8, wanted)


def test_a_delora_alone_has_the_same_defaults():
    delora = DeLoRA(torch.ones(3, 4))
    assert delora.A.shape == (8, 4)
    assert delora.lam.tolist() == [15.0]
    assert delora.lam0 is None
    assert delora.weight_norm == "column"


@pytest.mark.parametrize("weight", (torch.ones(3), torch.ones(3, 2).long(), torch.ones(0, 2)))
def test_what_is_no_matrix_of_floats_is_refused(weight):
    with pytest.raises(ValueError, match="no matrix of floats"):
        DeLoRA(weight)


def test_the_range_of_lambda_is_closed_below_and_open_above():
    for value in (1e-30, 1, 9e29):
        layer = DeLoRALinear(nn.Linear(2, 2).double(), lambda_init=value)
        assert layer.delora.lam.item() == value
    with pytest.raises(ValueError, match=r"got 1e\+30"):
        DeLoRALinear(nn.Linear(2, 2), lambda_init=1e30)


@pytest.mark.parametrize("mode", ("column", "frobenius", None))
def test_norms_that_overflow_are_refused_in_every_mode(mode):
    with pytest.raises(ValueError, match="not finite, or its norms are not"):
        DeLoRA(torch.full((1, 4), 3e38), weight_norm=mode)


# ------------------------------------------------------------------------------------------------
# The start
# ------------------------------------------------------------------------------------------------


def test_the_components_start_uniform_as_the_authors_draw_them():
    """A ~ U(−1/√in, 1/√in), B ~ U(−1/√r, 1/√r): variance 1 / (3 fan_in)."""
    torch.manual_seed(0)
    adapter = DeLoRALinear(nn.Linear(400, 300), 100).delora
    for p, fan_in in ((adapter.A, 400), (adapter.B, 100)):
        edge = fan_in**-0.5
        n = p.numel()
        largest = p.abs().max().item()
        # 300 entries and more are expected between 0.99 of the edge and the edge.
        assert 0.99 * edge < largest <= edge * (1 + tol(torch.float32, 1))
        # Five standard deviations of a mean of n numbers, and of their squares.
        assert abs(p.mean().item()) < 5 * edge / (3 * n) ** 0.5
        assert abs(p.square().mean().item() - edge**2 / 3) < 5 * edge**2 * (4 / 45 / n) ** 0.5


@pytest.mark.parametrize("mode", ("column", "frobenius"))
def test_how_strong_lambda_is_at_the_start(mode):
    """‖(λ/r) B Ξ A diag(w)‖_F ≈ λ ‖W‖_F / √(r · in): 0.19 ‖W‖_F for λ = 15, r = 8, in = 768."""
    torch.manual_seed(0)
    weight = torch.randn(512, 768)
    strength = 15.0 if mode == "column" else 15.0 / 768**0.5
    adapter = DeLoRA(weight, r=8, lambda_init=strength, weight_norm=mode)
    left, right = adapter.factors()
    learned = left[:, 8:] @ right[:8]  # λ B̂₀ Â, and at the start B̂ is B̂₀
    # Components at random cross at an angle with a cosine of about 1/√512 · 1/√768, and there are
    # r (r − 1) pairs beside r squares: a part of 7/√(512 · 768) of the square, if all had one sign.
    assert abs(learned.norm() / weight.norm() - 0.19) < 0.19 * 7 / (512 * 768) ** 0.5 + 0.005


def test_equal_terms_do_not_cancel_in_one_product():
    """Why the factors are subtracted: [B̂, −B̂₀] · [Â; Â₀] is not zero at the start."""
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(64, 768), r=8)
    A_hat = unit_rows(adapter.A)  # and Â₀ is the same
    B_hat = unit_columns(adapter.B)
    naive = torch.cat((B_hat, -B_hat), dim=1) @ torch.cat((A_hat, A_hat))
    assert 0 < naive.abs().max() < 1e-6
    assert adapter.delta_weight().abs().max() == 0


@pytest.mark.parametrize("r", (1, 8))
def test_from_zero_the_first_step_jumps_to_full_strength(r):
    """Why B = 0 is no start: however short b_i is, ‖ΔW‖ is |λ| for r = 1, about |λ|/√r for more."""
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(64, 768), r=r, lambda_init=15.0, weight_norm=None)
    adapter.A0.data.zero_()
    adapter.B0.data.zero_()
    adapter.B.data.zero_()
    assert adapter.delta_weight().norm() == 0
    slope = torch.randn(64, 768)
    adapter.B.data = 1e-9 * slope @ adapter.A.data.T  # a step of size 1e-9, if B had a gradient
    # Pairs of components at random, as above, cross at 1/√64 · 1/√768.
    part = (r - 1) / (64 * 768) ** 0.5
    assert abs(adapter.delta_weight().norm() / (15 / r**0.5) - 1) <= part + 1e-5


@pytest.mark.parametrize("tied", (True, False))
def test_the_gradients_at_the_start(tied):
    """λ G Âᵀ for B̂ and λ B̂₀ᵀ G for Â, where G = ∂L/∂ΔW · diag(w) / r; none for λ, if tied."""
    torch.manual_seed(0)
    weight, slope = torch.randn(2, 5, 7, dtype=torch.float64)  # L = Σ slope · ΔW
    adapter = DeLoRA(weight, r=3, tie_lambda=tied)
    (adapter.delta_weight() * slope).sum().backward()
    G = slope * adapter.w / 3  # (out, in)
    with torch.no_grad():
        A_hat = unit_rows(adapter.A)
        B_hat = unit_columns(adapter.B)
        of_A_hat = adapter.lam * B_hat.T @ G
        of_B_hat = adapter.lam * G @ A_hat.T
        # The gradient of a_i is that of â_i, without its part along â_i, over ‖a_i‖.
        along_A = (of_A_hat * A_hat).sum(1, keepdim=True) * A_hat
        along_B = (of_B_hat * B_hat).sum(0, keepdim=True) * B_hat
        of_A = (of_A_hat - along_A) / adapter.A.norm(dim=1, keepdim=True)
        of_B = (of_B_hat - along_B) / adapter.B.norm(dim=0, keepdim=True)
    torch.testing.assert_close(adapter.A.grad, of_A)
    torch.testing.assert_close(adapter.B.grad, of_B)
    assert (adapter.lam.grad == 0) == tied


@pytest.mark.parametrize("tied", (True, False))
def test_at_the_start_lambda_has_a_gradient_if_it_is_untied(tied):
    """It is ⟨∂L/∂ΔW, B̂Â diag(w) / r⟩, and zero to the bit if tied."""
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(5, 6), r=2, weight_norm=None, tie_lambda=tied)
    slope = torch.randn(5, 6)
    (adapter.delta_weight() * slope).sum().backward()
    if tied:
        assert adapter.lam.grad.count_nonzero() == 0
    else:
        directions = unit_columns(adapter.B) @ unit_rows(adapter.A)  # (out, in), times w = 1
        wanted = (slope * directions).sum().view(1) / 2
        assert distance(adapter.lam.grad, wanted) <= tol(torch.float32, 30)


# ------------------------------------------------------------------------------------------------
# The bound, and the lengths of the components
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", (True, False))
def test_orthogonal_components_reach_the_bound_in_the_nuclear_norm(tied):
    """And in the Frobenius norm they do not: there are 2r singular values of |λ| / r."""
    r = 3
    strength = -2.0
    adapter = DeLoRA(torch.zeros(7, 6), r, 0.5, weight_norm=None, tie_lambda=tied)
    adapter.lam.data.fill_(strength)
    adapter.A.data = 5 * torch.eye(6)[:r]
    adapter.A0.data = torch.eye(6)[r:]
    adapter.B.data = torch.eye(7)[:, :r]
    adapter.B0.data = torch.eye(7)[:, r : 2 * r]
    singular_values = torch.linalg.svdvals(adapter.delta_weight().detach().double())
    nuclear = singular_values.sum().item()
    frobenius = singular_values.norm().item()
    bound = 2 * abs(strength) if tied else abs(strength) + 0.5
    assert abs(nuclear - bound) <= tol(torch.float32, r, bound)
    assert frobenius < bound / 2


@pytest.mark.parametrize("size", (1e-18, 1e-20, 1e-21, 3e-22, 1e-22, 3e-23, 1e-30))
def test_components_whose_squares_underflow_stay_within_the_bound(size):
    """They have their direction, or count as zero; a norm that came out too small is not used."""
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(6, 6), r=1, weight_norm=None)
    adapter.A0.data.zero_()
    adapter.B0.data.zero_()
    adapter.A.data.fill_(size)
    adapter.B.data.fill_(size)
    assert adapter.delta_weight().norm() <= adapter.lam.item() * (1 + tol(torch.float32, 6))


def test_steps_of_sgd_lengthen_the_components_and_weight_decay_keeps_them_short():
    """Longer ones turn less by the same step; the update does not see the lengths."""
    turned = {}
    length = {}
    for decay in (0.0, 0.2):
        torch.manual_seed(0)
        adapter = DeLoRA(torch.randn(8, 8), r=1, weight_norm=None, lambda_init=1.0)
        groups = param_groups(nn.Sequential(adapter), 0.5, 0.0, decay)
        optimizer = torch.optim.SGD(groups)
        turned[decay] = 0.0
        for _ in range(100):
            before = adapter.A.detach().clone()
            optimizer.zero_grad()
            (adapter.delta_weight() * torch.randn(8, 8)).sum().backward()
            optimizer.step()
            if decay == 0:
                assert adapter.A.norm() > before.norm()
            cosine = nn.functional.cosine_similarity(adapter.A.detach(), before)
            turned[decay] += 1 - cosine.item()
        length[decay] = adapter.A.norm()
    assert length[0.2] < length[0.0]
    assert turned[0.2] > turned[0.0]
