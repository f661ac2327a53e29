"""The contract of DeLoRA: what must hold for delora.py, and for any other implementation of the
method.

    pytest test_delora.py                                   delora.py: the properties P1 to P11,
    then its helpers
    HYPOTHESIS_PROFILE=thorough pytest test_delora.py       ten times the examples, other ones every
    time
    DELORA_SUBJECT=my_subject.py pytest test_delora.py      another implementation: `Reference`
    shows what that takes

A property's docstring states it in one line, in the symbols of delora.py's docstring; "Eq." is an
equation of the paper
(https://arxiv.org/abs/2503.18225). Layers are drawn as a `Case`, which prints as the code that
makes it: a failing one
can be pasted back as `@example(case=Case(...))`. Every tolerance is `tol`: the precision, times the
number of
roundings, times the size of what is rounded. "Seen:" names a mistake met in public code, caught by
what is below it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

SPEC = os.environ.get("DELORA_SUBJECT", "")
try:
    import delora
    from delora import (
        DeLoRA,
        DeLoRALinear,
        adapter_state_dict,
        disabled,
        inject,
        load_adapter,
        merge,
        param_groups,
        unmerge,
    )
except ModuleNotFoundError as error:  # another implementation needs no delora.py beside it
    if error.name != "delora" or not SPEC:
        raise

# fast draws the same examples in every run, so that another outcome means other code. No deadline:
# machines are shared.
# The phase left out, explain, may print another failing example than the smallest.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("fast", max_examples=100, derandomize=True, deadline=None, phases=PHASES)
settings.register_profile(
    "thorough", settings.get_profile("fast"), max_examples=1000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("column", "frobenius", None)


# ---------------------------------------------------------------------------- whose layer is tested


class Reference:
    """delora.py as a subject. Any other is a module, class or object that has the same four
    functions.

    A fifth is optional: `unmerge(layer)`, where `merge` changes the layer and this undoes it.
    """

    @staticmethod
    def build(
        weight: Tensor, bias: Tensor | None, *, r, lambda_init, weight_norm, tie_lambda
    ) -> nn.Module:
        """A new layer, to be called as layer(x), on the parameters weight (out, in) and bias (out,)
        themselves.

        It raises NotImplementedError for a weight_norm ("column", "frobenius", None) or a
        tie_lambda that it does not
        have; without a frozen copy, that is tie_lambda=False.
        """
        base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        base.weight, base.bias = weight, bias
        return DeLoRALinear(base, r, lambda_init, weight_norm=weight_norm, tie_lambda=tie_lambda)

    @staticmethod
    def tensors(layer: nn.Module) -> dict[str, Tensor]:
        """What the layer computes with, to be read and written: A (r, in), B (out, r), lambda (1,),
        and A0, B0 and
        lambda0 if it has them. Where they are stored in another shape, a view: layer.A.T,
        layer.strength.view(1)."""
        delora = layer.delora
        named = {
            "A": delora.A,
            "B": delora.B,
            "lambda": delora.lam,
            "A0": delora.A0,
            "B0": delora.B0,
        }
        return named if delora.lam0 is None else named | {"lambda0": delora.lam0}

    @staticmethod
    def delta_weight(layer: nn.Module) -> Tensor:
        """ΔW (out, in), with gradients."""
        return layer.delora.delta_weight()

    @staticmethod
    def merge(layer: nn.Module) -> Tensor:
        """The merged weight W + ΔW (out, in), in W's dtype."""
        return layer.merged().weight


def load_subject(spec: str):
    """What DELORA_SUBJECT names: path/to/file.py, path/to/file.py:name, a.module, a.module:name."""
    stem, is_file, name = f"{spec}:".partition(".py:")
    if is_file:
        path = Path(f"{stem}.py").resolve()
        sys.path[:0] = [str(path.parent)]  # so that the file finds what lies beside it
        subject = sys.modules.get(path.stem)
        if getattr(subject, "__file__", None) != str(
            path
        ):  # else it is this file, test_delora.py:Reference
            found = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = subject = importlib.util.module_from_spec(found)
            found.loader.exec_module(subject)
    else:
        module, _, name = spec.partition(":")
        sys.path[:0] = [os.getcwd()]
        subject = importlib.import_module(module)
    for attribute in filter(None, name.rstrip(":").split(".")):
        subject = getattr(subject, attribute)
    lacking = [
        f
        for f in ("build", "tensors", "delta_weight", "merge")
        if not callable(getattr(subject, f, None))
    ]
    if lacking:
        raise TypeError(f"it lacks {', '.join(lacking)}")
    return subject


def supported_modes(subject) -> list[tuple[str | None, bool]]:
    """The (weight_norm, tie_lambda) that a subject can build, after a look at what it builds."""
    modes = []
    for mode, tied in itertools.product(MODES, (True, False)):
        weight, bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
        try:
            layer = subject.build(
                weight, bias, r=1, lambda_init=3.0, weight_norm=mode, tie_lambda=tied
            )
        except NotImplementedError:
            continue
        modes.append((mode, tied))
        if not isinstance(layer, nn.Module):
            raise TypeError(f"build returned {type(layer).__name__}, not a torch.nn.Module")
        shapes = {name: tuple(tensor.shape) for name, tensor in subject.tensors(layer).items()}
        wanted = {"A": (1, 2), "B": (3, 1), "lambda": (1,)}
        for name, shape in {
            **wanted,
            **{f"{n}0": s for n, s in wanted.items() if f"{n}0" in shapes},
        }.items():
            if shapes.get(name) != shape:
                raise TypeError(
                    f"tensors()[{name!r}] is {shapes.get(name)}, not {shape}, for r=1, in=2, out=3"
                )
    if not modes:
        raise TypeError("build raised NotImplementedError for every weight_norm and tie_lambda")
    return modes


PROBLEM, SUBJECT, SUPPORTED = "", Reference, list(itertools.product(MODES, (True, False)))
if SPEC:
    pytestmark = pytest.mark.filterwarnings(
        "default"
    )  # what a subject warns of is not what is tested
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            SUBJECT = load_subject(SPEC)
            SUPPORTED = supported_modes(SUBJECT)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever somebody else's file may raise; said below, in one line
        PROBLEM = f"DELORA_SUBJECT={SPEC}: {type(error).__name__}: {' '.join(str(error).split())}"


def ours(test: Callable) -> Callable:
    """Marks a test of delora.py's own names and helpers. With DELORA_SUBJECT it is deselected."""
    test.ours = True
    return test


class OnlyTheContract:
    """What DELORA_SUBJECT changes in pytest: tests of our helpers are deselected, and the last
    lines say so.
    """

    def pytest_collection_modifyitems(self, config, items):
        if PROBLEM:
            raise pytest.UsageError(PROBLEM)
        self.helpers = [item for item in items if hasattr(getattr(item, "function", None), "ours")]
        config.hook.pytest_deselected(items=self.helpers)
        items[:] = [item for item in items if item not in self.helpers]

    def pytest_terminal_summary(self, terminalreporter):
        if PROBLEM:
            return
        modes = ", ".join(f"{mode!r} {'tied' if tied else 'untied'}" for mode, tied in SUPPORTED)
        terminalreporter.write_line(f"Subject: {SPEC}. Its modes: {modes}.")
        terminalreporter.write_line(
            f"Deselected: {len(self.helpers)} tests of delora.py's own helpers."
        )


def pytest_generate_tests(metafunc):
    plugins = metafunc.config.pluginmanager
    if SPEC and not plugins.has_plugin("only_the_contract"):
        plugins.register(OnlyTheContract(), "only_the_contract")


# ------------------------------------------------------------------------------------ what is drawn


def tol(dtype: torch.dtype, n: int, size: float | Tensor = 1.0) -> float:
    """The error of n roundings in a row that all point the same way, of numbers of that size (of a
    tensor: its largest
    entry), with a factor of 8 because each number comes from products of a few rounded ones."""
    size = size.detach().abs().max().item() if isinstance(size, Tensor) else size
    return 8 * n * torch.finfo(dtype).eps * size


def distance(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference between two entries, in float64."""
    assert actual.shape == wanted.shape
    return (
        (actual.detach().double() - wanted.detach().double()).abs().max().item()
        if actual.numel()
        else 0.0
    )


def norms(matrix: Tensor) -> tuple[float, float]:
    """‖·‖_F and ‖·‖_*, the nuclear norm: the sum of the singular values."""
    matrix = matrix.detach().double()
    return matrix.norm().item(), torch.linalg.svdvals(matrix).sum().item()


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    return actual.dtype == wanted.dtype and torch.equal(actual, wanted)


@dataclass(frozen=True, repr=False)
class Case:
    """A layer and an input, as the code that makes them. What has its default is not printed."""

    n_in: int
    n_out: int
    r: int
    weight_norm: str | None = SUPPORTED[0][0]
    tie_lambda: bool = SUPPORTED[0][1]
    dtype: torch.dtype = torch.float64
    bias: bool = False
    zero_column: bool = False  # of W: there the adapter can do nothing, with "column"
    decade: int = 0  # W's entries are of the order 10**decade
    a: tuple[
        int | None, ...
    ] = ()  # a_i's entries are of the order 10**a[i], cyclically; None is zero, () the start
    b: tuple[int | None, ...] = ()  # likewise b_i's
    uneven: bool = (
        False  # entries of one a_i or b_i are spread evenly over 1e-12 to 1e12, sizes a and b aside
    )
    strength: float = 3.0  # λ; λ₀ is 3
    batch: tuple[int, ...] = (3,)  # x is (*batch, in)
    strided: bool = False  # x is not contiguous
    seed: int = 0

    def __repr__(self):
        shown = [
            f
            for f in fields(self)
            if f.name in ("n_in", "n_out", "r") or getattr(self, f.name) != f.default
        ]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def _repr_pretty_(self, printer, cycle):  # what Hypothesis prints
        printer.text(repr(self))

    def base(self) -> nn.Linear:
        torch.manual_seed(self.seed)
        base = nn.Linear(
            self.n_in, self.n_out, self.bias, dtype=torch.float64
        )  # entries within ± 1/√in
        base.weight.data *= 10.0**self.decade
        if self.zero_column:
            base.weight.data[:, 0] = 0
        return base.to(self.dtype)

    def build(self, start: int = 1) -> tuple[nn.Module, nn.Linear]:
        """The subject's layer, and an nn.Linear with the very weight and bias that it was given."""
        base = self.base()
        torch.manual_seed(self.seed + start)
        options = {"weight_norm": self.weight_norm, "tie_lambda": self.tie_lambda}
        layer = SUBJECT.build(base.weight, base.bias, r=self.r, lambda_init=3.0, **options)
        with torch.no_grad():
            tensors = SUBJECT.tensors(layer)
            for name, sizes, dim in (("A", self.a, 0), ("B", self.b, 1)):
                for i, component in enumerate(tensors[name].unbind(dim) if sizes else ()):
                    decade = sizes[i % len(sizes)]
                    values = torch.randn(component.shape, dtype=torch.float64) * 10.0 ** (
                        decade or 0
                    )
                    if self.uneven:
                        values *= 10 ** torch.empty_like(values).uniform_(-12, 12)
                    values = values.sign() * values.abs().clamp(1e-12, 1e12)
                    component.copy_(values * (decade is not None))
            if self.a:
                tensors["lambda"].fill_(self.strength)
        return layer, base

    def x(self) -> Tensor:
        """An input (*batch, in)."""
        torch.manual_seed(self.seed)
        x = torch.randn(*self.batch, self.n_in, 2, dtype=torch.float64).to(self.dtype)
        return x[..., 0] if self.strided else x[..., 0].contiguous()

    def w(self) -> Tensor:
        """w (in,) from W by the definition, in float64 (Eq. 8)."""
        weight = self.base().weight.detach().double()  # (out, in)
        column = torch.stack([weight[:, j].norm() for j in range(self.n_in)])  # (in,)
        return {
            "column": column,
            "frobenius": weight.norm().repeat(self.n_in),
            None: torch.ones(self.n_in).double(),
        }[self.weight_norm]

    def strengths(self, layer: nn.Module) -> list[float]:
        """λ, and what the frozen copy is multiplied with, if there is one: λ tied, λ₀ untied (Eq.
        9).
        """
        tensors = SUBJECT.tensors(layer)
        current, initial = (
            tensors["lambda"].item(),
            tensors["lambda0"].item() if "lambda0" in tensors else 3.0,
        )
        return [current, current if self.tie_lambda else initial] if "A0" in tensors else [current]

    def bound(self, layer: nn.Module) -> float:
        """What ‖ΔW‖_* cannot exceed (Eq. 6 to 9)."""
        return sum(map(abs, self.strengths(layer))) * self.w().max().item()

    def rounding(self, layer: nn.Module, size: float = 1.0) -> float:
        """`tol` for what is computed from ΔW, whose terms are as large as its bound; its sums over
        in, out and 2r.
        """
        largest = max(self.bound(layer), norms(SUBJECT.delta_weight(layer))[0])
        return tol(
            SUBJECT.tensors(layer)["A"].dtype, self.n_in + self.n_out + 2 * self.r, largest * size
        )


BATCHES = ((3,), (), (2, 3), (2, 1, 2), (0,), (0, 3))


@st.composite
def new_layers(
    draw,
    dtypes=(torch.float64,),
    sizes=(1, 2, 5, 33),
    zero_columns=(False, True),
    decades=(0,),
    batches=BATCHES,
):
    """A layer as it is built: shapes, options and inputs from the edges of what is allowed."""
    n_in, n_out = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    mode, tied = draw(st.sampled_from(SUPPORTED))
    return Case(
        n_in=n_in,
        n_out=n_out,
        r=draw(st.sampled_from((1, min(n_in, n_out), min(n_in, n_out) + 3))),
        weight_norm=mode,
        tie_lambda=tied,
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        zero_column=draw(st.sampled_from(zero_columns)),
        decade=draw(st.sampled_from(decades)),
        batch=draw(st.sampled_from(batches)),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def moved_layers(
    draw,
    dtypes=(torch.float64,),
    reach=12,
    strengths=(3.0, 1e-6, -2.0, 0.0, 1e12),
    zero=True,
    **options,
):
    """A layer that is somewhere else: components of any direction and of very different lengths,
    any λ.
    """
    case = draw(new_layers(dtypes, **options))
    sizes = st.lists(
        st.integers(-reach, reach) | (st.none() if zero else st.nothing()), min_size=1, max_size=3
    )
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    drawn = {
        "a": tuple(draw(sizes)),
        "b": tuple(draw(sizes)),
        "uneven": draw(st.just(False) | st.just(reach == 12)),
    }
    return Case(**values | drawn | {"strength": draw(st.sampled_from(strengths))})


def seen(**values) -> Callable:
    """An example that is tried before any is drawn, if the subject has that mode."""
    case = Case(**values)
    return (
        example(case=case)
        if (case.weight_norm, case.tie_lambda) in SUPPORTED
        else lambda test: test
    )


def leaf(tensor: Tensor) -> Tensor:
    """The parameter that a tensor is, or is a view of."""
    return tensor if tensor._base is None else tensor._base


def trainable(layer: nn.Module) -> dict[str, Tensor]:
    tensors = {name: SUBJECT.tensors(layer)[name] for name in ("A", "B", "lambda")}
    fixed = [name for name, tensor in tensors.items() if not leaf(tensor).requires_grad]
    assert not fixed, f"{fixed} cannot be trained"
    return tensors


def gradients(layer: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """∂L/∂A, ∂L/∂B and ∂L/∂λ, in the shapes of A, B and λ."""
    tensors = trainable(layer)
    found = torch.autograd.grad(
        loss, [leaf(tensor) for tensor in tensors.values()], allow_unused=True
    )
    unused = [name for name, gradient in zip(tensors, found, strict=True) if gradient is None]
    assert not unused, f"the output does not depend on {unused}"
    return {
        name: gradient.contiguous().as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        for (name, tensor), gradient in zip(tensors.items(), found, strict=True)
    }


def linear_loss(case: Case, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """L = ⟨G, layer(x)⟩ for a random G (..., out), then ∂L/∂ΔW = Gᵀ x (out, in), then ‖G‖ ‖x‖,
    which bounds it.
    """
    x = case.x()  # (..., in)
    G = torch.randn(*case.batch, case.n_out, dtype=x.dtype)  # (..., out)
    inputs, cotangents = (
        x.reshape(-1, case.n_in),
        G.reshape(-1, case.n_out),
    )  # (tokens, in), (tokens, out)
    return (layer(x) * G).sum(), cotangents.T @ inputs, G.norm().item() * x.norm().item()


def step(layer: nn.Module, base: nn.Linear, optimizer: str, lr: float, loss: Tensor) -> None:
    """One step of that optimiser on A, B, λ and all else that the layer declares trainable, W and b
    apart.
    """
    tensors = [*(leaf(tensor) for tensor in trainable(layer).values()), *layer.parameters()]
    parameters = {
        id(p): p for p in tensors if p.requires_grad and p is not base.weight and p is not base.bias
    }
    update = getattr(torch.optim, optimizer)(parameters.values(), lr=lr)
    loss.backward()
    update.step()
    layer.zero_grad()


# ------------------------------------------------------------------------------ a model for helpers


def snapshot(model: nn.Module) -> list:
    """All that a failed call must leave alone: which modules, which tensors, their bits, what is
    trainable.
    """
    modules = [
        (name, id(module), module.training)
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers())
    return [modules, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]]


class Attention(nn.Module):
    """A small model with what real ones have: names that end alike, a norm, a tied head, a layer
    with two names.
    """

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(16, d)
        self.q_proj, self.proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.norm, self.first = nn.LayerNorm(d), nn.Linear(d, d)
        self.second = self.first
        self.head = nn.Linear(d, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.proj(torch.tanh(self.q_proj(self.norm(x))))
        return self.head(x + self.second(torch.tanh(self.first(x))))


TOKENS = torch.arange(12).view(2, 6)


def trained(model: nn.Module, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """Some steps of AdamW on a loss that moves every adapter."""
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten().flip(0)).backward()
        optimizer.step()
    return model


# ------------------------------------------------------------------------------------ P1 zero start


@given(case=new_layers(DTYPES), grad=st.booleans())
def test_a_new_adapter_changes_no_bit_of_the_output(case, grad):
    """ΔW = 0 and layer(x) = W x + b at the start, bit for bit, in every dtype (Eq. 9)."""
    layer, base = case.build()
    with torch.set_grad_enabled(grad):
        assert same_bits(layer(case.x()), base(case.x()))
        assert SUBJECT.delta_weight(layer).count_nonzero() == 0


@given(case=new_layers(DTYPES), other=st.sampled_from(DTYPES))
# Seen: a frozen copy in another precision than A and B, which shows as soon as the model is cast.
@example(case=Case(n_in=5, n_out=2, r=2), other=torch.bfloat16)
def test_the_zero_start_survives_a_cast(case, other):
    """ΔW = 0 after layer.to(dtype), for every dtype before and after (Eq. 9)."""
    layer, base = case.build()
    layer.to(other)
    base.to(other)
    x = case.x().to(other)
    assert same_bits(layer(x), base(x))


@given(case=new_layers(DTYPES[:2]), narrow=st.sampled_from(DTYPES[2:]))
# Seen: aᵀx / (‖a‖ ‖b‖), where ‖b‖ = 0 is clamped, is ∞ in float16, and times zero not a number.
@example(case=Case(n_in=1, n_out=2, r=1, dtype=torch.float32), narrow=torch.float16)
def test_the_zero_start_survives_autocast(case, narrow):
    """layer(x) = W x + b, every bit of it, where torch.autocast chooses the precision (Eq. 9)."""
    layer, base = case.build()
    x = case.x()
    with torch.autocast("cpu", narrow):
        assert torch.equal(
            layer(x).double(), base(x).double()
        )  # in a wider dtype if the layer likes


@given(case=new_layers())
# Seen: the authors' code assigns `frozen.data = trainable.data`, and on a CPU ΔW is zero for ever.
@seen(n_in=5, n_out=2, r=2)
def test_the_frozen_copy_has_storage_of_its_own(case):
    """A₀ = A and B₀ = B at the start, yet to write A or B does not change A₀ or B₀ (Eq. 9)."""
    tensors = SUBJECT.tensors(case.build()[0])
    if "A0" not in tensors:
        pytest.skip("the subject has no frozen copy")
    for name in [name for name in tensors if name.endswith("0")]:
        copied, source = tensors[name], tensors[name[:-1]]
        assert torch.equal(copied, source) and not leaf(copied).requires_grad
        assert copied.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


@ours
@given(
    case=new_layers((torch.float32,)),
    stored=st.sampled_from(DTYPES[1:]),
    cast=st.sampled_from(DTYPES[2:]),
)
def test_an_adapter_of_any_precision_works_under_autocast_to_any_other(case, stored, cast):
    """ΔW = 0 bit for bit, whatever the two precisions are (Eq. 9)."""
    layer, base = case.build()
    layer.to(stored)
    x = case.x().to(stored)
    with torch.autocast("cpu", cast):
        assert same_bits(layer(x), base(x))
        assert same_bits(layer.weight, base.weight)


@ours
@pytest.mark.parametrize("tied", (True, False))
def test_what_is_frozen_stays_so_even_if_all_is_declared_trainable(tied):
    """∂L/∂A₀ = ∂L/∂B₀ = ∂L/∂λ₀ = ∂L/∂w = 0 after `model.requires_grad_(True)`, which is common (Eq.
    9).
    """
    layer = DeLoRALinear(nn.Linear(5, 4), 2, tie_lambda=tied)
    layer.requires_grad_(True)
    layer(torch.randn(3, 5)).square().sum().backward()
    for name, p in layer.delora.named_parameters():
        assert (p.grad is not None) == (name in ("A", "B", "lam")), name


@ours
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_zero_start_survives_compilation():
    """ΔW = 0 bit for bit in a fused graph; later compiled and eager gradients agree (Eq. 9)."""
    torch.manual_seed(0)
    # Seen, with two threads: at (512, 128) the norms of B and B₀, computed apart, were summed in
    # two orders.
    for base, tied in (
        (nn.Linear(128, 512), True),
        (nn.Linear(48, 40), True),
        (nn.Linear(48, 40), False),
    ):
        layer, x = (
            DeLoRALinear(base, 2 if tied else 4, tie_lambda=tied),
            torch.randn(8, base.in_features),
        )
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True)
        assert same_bits(compiled(x), torch.compile(base, fullgraph=True)(x))
    with torch.no_grad():
        layer.delora.A[0] = 0
        layer.delora.B.normal_()
    compiled(x).square().sum().backward()
    found = layer.delora.B.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert distance(found, layer.delora.B.grad) <= tol(torch.float32, 48, layer.delora.B.grad)
    assert layer.delora.A.grad[0].count_nonzero() == 0


@ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_zero_start_survives_the_fused_encoder_layer(dtype):
    """ΔW = 0 bit for bit where nn.TransformerEncoderLayer reads weights and calls none of its
    layers (Eq. 9).
    """
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=dtype).eval()
    x = torch.randn(2, 5, 16, dtype=dtype)
    with torch.no_grad():
        before = encoder(x)
        inject(encoder, ["linear1", "linear2", "out_proj"], r=4)
        assert same_bits(encoder(x), before)


# ----------------------------------------------------------------------------------------- P2 bound


@given(case=moved_layers((torch.float64, torch.float32), decades=(0, -12, 12)))
# Seen: no normalisation at all (LoRA), or one with an epsilon that outweighs short components.
@seen(n_in=2, n_out=3, r=2, a=(12,), b=(12, -12))
# Seen: norms along the wrong axis, over the r components instead of over each one's entries.
@seen(n_in=33, n_out=5, r=2, a=(0,), b=(0,))
def test_the_update_never_exceeds_the_bound(case):
    """‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max_j w_j; untied |λ| + |λ₀| in place of 2 |λ|, without a copy |λ|
    (Eq. 6 to 9).
    """
    layer, _ = case.build()
    bound, rounding = case.bound(layer), case.rounding(layer)
    assert max(norms(SUBJECT.delta_weight(layer))) <= bound + rounding


@given(case=moved_layers((torch.float64, torch.float32), decades=(0, -12, 12)))
def test_the_learned_term_alone_stays_within_lambda(case):
    """‖(λ/r) B Ξ A diag(w)‖_* ≤ |λ| max_j w_j: the bound with A₀ = B₀ = 0 (Eq. 6, 7)."""
    layer, _ = case.build()
    tensors = SUBJECT.tensors(layer)
    with torch.no_grad():
        for name in {"A0", "B0"} & tensors.keys():
            tensors[name].zero_()
    wanted = abs(tensors["lambda"].item()) * case.w().max().item()
    assert max(norms(SUBJECT.delta_weight(layer))) <= wanted + case.rounding(layer)


@given(
    case=new_layers((torch.float64, torch.float32)),
    optimizer=st.sampled_from(("SGD", "AdamW")),
    lr=st.sampled_from((1e-3, 1.0, 1e3)),
)
@example(case=Case(n_in=5, n_out=5, r=2), optimizer="SGD", lr=1e3)
@example(case=Case(n_in=5, n_out=5, r=2), optimizer="AdamW", lr=1e3)
def test_no_learning_rate_leaves_the_bound(case, optimizer, lr):
    """‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max_j w_j after every step of any optimiser at any learning rate (Eq.
    6 to 9).
    """
    layer, base = case.build()
    for _ in range(4):
        step(layer, base, optimizer, lr, (layer(case.x()) - 1).sin().sum())
        delta = SUBJECT.delta_weight(layer)
        assert delta.isfinite().all()
        assert max(norms(delta)) <= case.bound(layer) + case.rounding(layer)


@given(case=moved_layers(strengths=(3.0, -2.0, 1e-6, 1e12)))
# Seen: documentation that calls λ itself the bound. With column norms it is λ max_j w_j, here more
# than λ.
@seen(n_in=2, n_out=33, r=1, a=(0,), b=(0,), decade=1)
def test_the_bound_is_attained_by_aligned_components(case):
    """‖ΔW‖_F = ‖ΔW‖_* = 2 |λ| max_j w_j if all a_i = ± e_j, all b_i are equal, and the copy's are
    opposite (Eq. 7).
    """
    layer, _ = case.build()
    tensors = SUBJECT.tensors(layer)
    length, b = 10.0 ** (case.a[0] or 0), torch.arange(1.0, case.n_out + 1).unsqueeze(1)  # (out, 1)
    opposite = -1 if case.tie_lambda else -math.copysign(1, case.strength)
    with torch.no_grad():
        for A, B, sign in (("A", "B", 1), ("A0", "B0", opposite)):
            if A in tensors:
                tensors[A].zero_()[:, case.w().argmax()] = length
                tensors[B].copy_((sign * b).expand(case.n_out, case.r))
    for norm in norms(SUBJECT.delta_weight(layer)):
        assert norm == pytest.approx(case.bound(layer), abs=case.rounding(layer))


@ours
@given(case=moved_layers((torch.float64, torch.float32)))
def test_norm_bound_is_the_right_hand_side(case):
    """norm_bound() = 2 |λ| max_j w_j tied, (|λ| + |λ₀|) max_j w_j untied (Eq. 6 to 9)."""
    layer, _ = case.build()
    assert layer.delora.norm_bound() == pytest.approx(case.bound(layer), abs=case.rounding(layer))


# ----------------------------------------------------------------------------- P3 angles, not scale


@given(
    case=moved_layers(),
    i=st.integers(0, 2),
    powers=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
)
# Seen: a clamp at 1e-4 in the place of the norm. Shorter components are then not normalised.
@example(case=Case(n_in=2, n_out=2, r=1, a=(0,), b=(0,)), i=0, powers=(-6, 0))
# Seen: an epsilon of 1e-8 added to the norm.
@example(case=Case(n_in=2, n_out=2, r=1, a=(0,), b=(0,)), i=0, powers=(0, -7))
def test_rescaling_a_component_changes_no_output(case, i, powers):
    """a_i → c a_i, b_i → d b_i with c, d > 0 leave ΔW and layer(x) as they are (Eq. 5)."""
    layer, _ = case.build()
    before, rounding = SUBJECT.delta_weight(layer).detach().clone(), case.rounding(layer)
    rescale(layer, i, powers)
    assert distance(SUBJECT.delta_weight(layer), before) <= rounding


def rescale(layer: nn.Module, i: int, powers: tuple[int, int]) -> None:
    """a_i → 10**powers[0] a_i, b_i → 10**powers[1] b_i, i counted modulo r."""
    A, B = (SUBJECT.tensors(layer)[name] for name in "AB")
    with torch.no_grad():
        A[i % len(A)] *= 10.0 ** powers[0]
        B[:, i % len(A)] *= 10.0 ** powers[1]


# ----------------------------------------------------------------------------- P4 tangent gradients


@given(case=moved_layers())
# Seen: no normalisation (LoRA): a learning rate that is too high makes the components longer, and
# so the update.
@seen(n_in=2, n_out=2, r=1, a=(0,), b=(0,))
def test_gradients_turn_components_and_never_stretch_them(case):
    """⟨∂L/∂a_i, a_i⟩ = 0 = ⟨∂L/∂b_i, b_i⟩ for every i and every loss (Eq. 5)."""
    layer, _ = case.build()
    loss, _, size = linear_loss(case, layer)
    found, tensors = gradients(layer, loss), SUBJECT.tensors(layer)
    for name, dim in (("A", 1), ("B", 0)):
        stretch = (found[name] * tensors[name]).sum(dim)  # (r,)
        assert stretch.abs().max() <= case.rounding(layer, size)


ZERO = {
    "case": moved_layers(strengths=(3.0, -2.0, 1e-6)),
    "which": st.sampled_from(("A", "B", "AB")),
}


def with_a_zero_component(case: Case, which: str) -> tuple[nn.Module, float, list[Tensor]]:
    """The layer with a_0 = 0 or b_0 = 0 or both, ‖∂L/∂ΔW‖ at most, and the gradients of what is
    zero.
    """
    layer, _ = case.build()
    tensors, dims = SUBJECT.tensors(layer), {"A": 0, "B": 1}
    with torch.no_grad():
        for name in which:
            tensors[name].select(dims[name], 0).zero_()
    loss, _, size = linear_loss(case, layer)
    found = gradients(layer, loss)
    assert all(gradient.isfinite().all() for gradient in found.values())
    return layer, size, [found[name].select(dims[name], 0) for name in which]


@given(**ZERO)
# Seen: 1/ε as the gradient of a zero vector, which made the first step ten thousand times too long.
@example(case=Case(n_in=2, n_out=2, r=2, a=(0,), b=(0,)), which="B")
def test_a_zero_component_adds_nothing_and_its_gradient_stays_small(case, which):
    """a_i = 0 or b_i = 0: no i-th term in ΔW, and ‖∂L/∂a_i‖ is at most what it is at ‖a_i‖ = 1,
    never 1/ε (Eq. 5).
    """
    layer, size, found = with_a_zero_component(case, which)
    assert distance(SUBJECT.delta_weight(layer), oracle(case, layer)) <= case.rounding(layer)
    assert all(
        gradient.norm() <= case.bound(layer) * size + case.rounding(layer, size)
        for gradient in found
    )


@ours
@given(**ZERO)
def test_the_gradient_of_a_zero_component_is_zero(case, which):
    """∂L/∂a_i = 0 where a_i = 0, ∂L/∂b_i = 0 where b_i = 0: no direction is better than any other
    (Eq. 5).
    """
    assert all(gradient.count_nonzero() == 0 for gradient in with_a_zero_component(case, which)[2])


@ours
@pytest.mark.parametrize("size", (1e-18, 1e-20, 1e-21, 3e-22, 1e-22, 3e-23, 1e-30))
def test_components_whose_squares_underflow_stay_within_the_bound(size):
    """They have their direction, or count as zero; a norm that came out too small is not used."""
    torch.manual_seed(0)
    layer = DeLoRA(torch.randn(6, 6), r=1, weight_norm=None)
    for frozen in (layer.A0, layer.B0):
        frozen.data.zero_()
    for p in (layer.A, layer.B):
        p.data.fill_(size)
    assert layer.delta_weight().norm() <= layer.lam.item() * (1 + tol(torch.float32, 6))


# ----------------------------------------------------------------------------- P5 λ, strength alone


@given(case=moved_layers(), c=st.sampled_from((-2.0, 0.5, 3.0)))
def test_the_update_is_linear_in_lambda(case, c):
    """ΔW(cλ) = c ΔW(λ), so ΔW/‖ΔW‖ is free of λ > 0; untied, ΔW(λ) − ΔW(0) is (Eq. 7)."""
    layer, _ = case.build()
    strength, updates = SUBJECT.tensors(layer)["lambda"], []
    with torch.no_grad():
        for value in (0.0, case.strength, c * case.strength):
            strength.fill_(value)
            updates.append(SUBJECT.delta_weight(layer).clone())
    at_zero, at_lambda, at_multiple = updates
    rounding = case.rounding(layer)
    assert distance(at_multiple - at_zero, c * (at_lambda - at_zero)) <= rounding * (
        1 + abs(c) + 1 / abs(c)
    )
    if case.tie_lambda:
        assert at_zero.count_nonzero() == 0


@given(case=moved_layers())
def test_the_gradient_of_lambda_is_the_update_projected_on_the_loss(case):
    """λ ∂L/∂λ = ⟨∂L/∂ΔW, ΔW(λ) − ΔW(0)⟩, where ΔW(0) = 0 if tied (Eq. 7)."""
    layer, _ = case.build()
    loss, wanted, size = linear_loss(case, layer)
    slope = gradients(layer, loss)["lambda"].item()
    delta, rounding = SUBJECT.delta_weight(layer).detach().clone(), case.rounding(layer, size)
    with torch.no_grad():
        SUBJECT.tensors(layer)["lambda"].zero_()
    projected = (wanted * (delta - SUBJECT.delta_weight(layer).detach())).sum().item()
    assert abs(case.strength * slope - projected) <= 2 * rounding


@given(
    case=moved_layers(),
    i=st.integers(0, 2),
    powers=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
)
# Seen: LoRA, where the gradient of the scaling grows with A and B.
@example(case=Case(n_in=2, n_out=2, r=1, a=(0,), b=(0,)), i=0, powers=(3, 3))
def test_the_gradient_of_lambda_is_blind_to_the_scale_of_the_components(case, i, powers):
    """∂L/∂λ is the same after a_i → c a_i, b_i → d b_i with c, d > 0 (Eq. 5, 7)."""
    layer, _ = case.build()
    loss, _, size = linear_loss(case, layer)
    before = gradients(layer, loss)["lambda"].item()
    rescale(layer, i, powers)
    after = gradients(layer, linear_loss(case, layer)[0])["lambda"].item()
    n = case.n_in + case.n_out + 2 * case.r
    assert abs(after - before) <= tol(
        SUBJECT.tensors(layer)["A"].dtype, n, 2 * case.w().max().item() * size
    )


# ------------------------------------------------------------------------------ P6 continuous start


@given(
    case=new_layers(zero_columns=(False,), batches=BATCHES[:4]),
    optimizer=st.sampled_from(("SGD", "AdamW")),
)
# Seen: PEFT's B = 0 with a clamp, at full strength after one step whatever the learning rate;
# the frozen copy that shares A's storage, and A = B = 0 with an epsilon, which never move.
@example(case=Case(n_in=5, n_out=5, r=2), optimizer="SGD")
@example(case=Case(n_in=5, n_out=5, r=2), optimizer="AdamW")
def test_the_first_step_is_as_long_as_the_learning_rate(case, optimizer):
    """‖ΔW‖ = c η + O(η²) after one step of learning rate η, c > 0, over three decades of η; 0 at η
    = 0 (Eq. 9).
    """
    moves, curvature = {}, {}
    for lr in (0.0, 1e-7, 1e-6, 1e-5, 1e-4):
        layer, base = case.build()
        tensors = SUBJECT.tensors(layer)
        before = {name: tensors[name].detach().clone() for name in ("A", "B", "lambda")}
        step(
            layer,
            base,
            optimizer,
            lr,
            linear_loss(case, layer)[0] / math.prod(case.batch, start=case.n_out),
        )
        moves[lr] = norms(SUBJECT.delta_weight(layer))[0]
        turns = [0.0]  # ε, how far a component turned, in radians, or λ moved, relative to itself
        for name, dim in (("A", 1), ("B", 0), ("lambda", 0)):
            length = before[name].norm(dim=dim)
            turns += ((tensors[name].detach() - before[name]).norm(dim=dim) / length)[
                length > 0
            ].tolist()
        # v/‖v‖ leaves its tangent by ε² at most: for two factors 2 ε², ε² for their product and 2
        # ε² for that with λ.
        # What grows from zero is linear in itself, times 1 + ε for the other factor and for λ.
        curvature[lr] = 5 * max(turns) ** 2 * case.bound(layer) + 2 * max(turns) * moves[lr]
    assert moves[0.0] == 0
    if case.n_in == case.n_out == 1:
        return  # in one dimension there is nowhere to turn
    assert moves[1e-7] > 0
    for small, large in ((1e-7, 1e-6), (1e-6, 1e-5), (1e-5, 1e-4)):
        allowed = 2 * curvature[large] + 11 * case.rounding(layer)
        assert abs(moves[large] - 10 * moves[small]) <= allowed, (
            f"‖ΔW‖ after a step of each rate: {moves}"
        )


@given(case=new_layers(sizes=(2, 5, 33)))
def test_no_two_components_start_alike(case):
    """(a_i, b_i) ≠ (a_j, b_j) if i ≠ j, or else they have the same gradients for ever and the rank
    is less than r.
    """
    tensors = SUBJECT.tensors(case.build()[0])
    assert len(torch.cat((tensors["A"], tensors["B"].T), dim=1).unique(dim=0)) == case.r


# -------------------------------------------------------------------------------- P7 one linear map


@given(case=moved_layers(DTYPES, reach=2, strengths=(3.0, -2.0, 0.0)))
# Seen: a layer that fails on a narrow base, or on an x that has no batch dimension.
@seen(n_in=2, n_out=2, r=1, a=(0,), b=(0,), dtype=torch.bfloat16, batch=())
def test_the_layer_is_one_linear_map(case):
    """layer(x) = (W + ΔW) x + b, in training and in evaluation, with gradients and without (Eq.
    15).
    """
    layer, base = case.build()
    x = case.x()
    effective = (
        base.weight.detach().double() + SUBJECT.delta_weight(layer).detach().double()
    )  # (out, in)
    wanted = F.linear(
        x.double(), effective, None if base.bias is None else base.bias.detach().double()
    )
    largest = (
        effective.abs().max().item() + case.bound(layer) + 1
    )  # of the terms, the bias among them
    size = largest * (x.double().abs().sum(-1).max().item() + 1 if x.numel() else 1)
    assume(
        size < torch.finfo(case.dtype).max
    )  # always so in DeLoRA, whose updates are bounded; LoRA's may overflow
    rounding = tol(case.dtype, 6, size)  # of x, h, y and the three weights
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            y = layer.train(training)(x)
        assert y.dtype == case.dtype and distance(y, wanted) <= rounding, f"{training=}, {grad=}"


@given(
    case=moved_layers(reach=0, strengths=(3.0, -2.0), zero=False, sizes=(1, 2, 5), batches=((2,),))
)
def test_the_gradients_are_those_of_the_output(case):
    """∂/∂A, ∂/∂B, ∂/∂λ and ∂/∂x of layer(x) equal finite differences, in float64 (Eq. 15)."""
    layer, _ = case.build()
    inputs = (*(leaf(tensor) for tensor in trainable(layer).values()), case.x().requires_grad_())
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[-1]), inputs)


# Seen: `.weight` forwarded to the base layer. The adapter is then ignored, without a word, by all
# that reads the weight
# instead of calling the layer: nn.MultiheadAttention its out_proj, nn.TransformerEncoderLayer in
# inference all of them.
@pytest.mark.parametrize("name", ("self_attn.out_proj", "linear1", "linear2"))
def test_code_that_reads_the_weight_sees_the_adapter(name):
    """Reading layer.weight gives W + ΔW, with its gradients; calling the layer gives the same (Eq.
    15).
    """
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x, adapted = torch.randn(2, 5, 16), copy.deepcopy(plain)
    base, (parent, _, child) = adapted.get_submodule(name), name.rpartition(".")
    mode, tied = SUPPORTED[0]
    layer = SUBJECT.build(
        base.weight, base.bias, r=4, lambda_init=3.0, weight_norm=mode, tie_lambda=tied
    )
    setattr(adapted.get_submodule(parent), child, layer)
    unadapted = plain(x)
    with torch.no_grad():
        for leaf_name in "AB":
            SUBJECT.tensors(layer)[leaf_name].normal_()
        plain.get_submodule(name).weight += SUBJECT.delta_weight(layer)
    wanted = plain(x)
    rounding = tol(torch.float32, 4 * 32, wanted)  # four products in a row, sums of up to 32
    assert distance(adapted(x), wanted) <= rounding < distance(unadapted, wanted)
    found = gradients(layer, adapted(x)[..., 0].square().sum())
    assert all(gradient.count_nonzero() for gradient in found.values())
    with torch.no_grad():
        assert distance(adapted.eval()(x), wanted) <= rounding


@ours
@given(case=moved_layers(DTYPES, reach=2, strengths=(3.0, -2.0, 0.0)))
def test_weight_output_and_merged_layer_agree(case):
    """merged().weight = layer.weight bit for bit, in float32 or wider whatever the context, and
    they serve alike.
    """
    layer, base = case.build()
    merged, x = layer.merged(), case.x()
    assert type(merged) is nn.Linear and same_bits(merged.weight, layer.weight)
    assert same_bits(merged(x), F.linear(x, layer.weight, layer.bias))
    assert (layer.bias is None) == (merged.bias is None) == (base.bias is None)
    if base.bias is not None:
        assert same_bits(layer.bias, base.bias) and same_bits(merged.bias, base.bias)
        assert merged.bias.data_ptr() != base.bias.data_ptr()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer.weight, merged.weight) and same_bits(
            layer.merged().weight, merged.weight
        )


@ours
@given(
    case=moved_layers(reach=0, strengths=(3.0, -2.0), zero=False, sizes=(1, 2, 5), batches=((2,),))
)
def test_the_gradients_of_the_weight_are_those_of_the_update(case):
    """∂/∂A, ∂/∂B and ∂/∂λ of layer.weight equal finite differences, in float64 (Eq. 15)."""
    layer, _ = case.build()
    assert torch.autograd.gradcheck(lambda *_: layer.weight, tuple(trainable(layer).values()))


@ours
def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    """E[layer(x)] over dropout masks is (W + ΔW) x + b; in eval, and where ΔW = 0, nothing is
    dropped.
    """
    torch.manual_seed(0)
    layer, x = DeLoRALinear(nn.Linear(64, 64), 4, dropout=0.5), torch.randn(8, 64)
    assert same_bits(layer(x), layer.base_layer(x))  # training, but there is nothing to drop yet
    layer.delora.A.data.normal_()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    wanted = F.linear(x, layer.weight, layer.bias)
    assert same_bits(layer(x), layer(x)) and distance(layer(x), wanted) <= tol(
        torch.float32, 64, wanted
    )


@ours
def test_dropout_is_that_of_torch_once_on_the_input():
    """In training layer(x) is W x + b + ΔW dropout(x), with the mask that F.dropout draws."""
    torch.manual_seed(0)
    layer, x = DeLoRALinear(nn.Linear(64, 32), 4, dropout=0.25), torch.randn(8, 64)
    layer.delora.A.data.normal_()
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.25)
    wanted = layer.base_layer(x) + F.linear(dropped, layer.delora.delta_weight())
    assert distance(found, wanted) <= tol(torch.float32, 64, wanted)


@ours
def test_outputs_follow_the_parameters_in_evaluation_too():
    """Nothing that was computed before a step is kept after it, without gradients neither."""
    torch.manual_seed(0)
    layer, x = DeLoRALinear(nn.Linear(6, 5), 2).eval(), torch.randn(3, 6)
    for _ in range(2):
        layer.delora.A.data.normal_()
        layer.delora.B.data.normal_()
        delta = layer.delora.delta_weight()
        wanted = layer.base_layer(x) + F.linear(x, delta)
        with torch.no_grad():
            assert distance(layer(x), wanted) <= tol(torch.float32, 6, wanted)
            weight = layer.base_layer.weight + delta
            assert distance(layer.weight, weight) <= tol(torch.float32, 2, weight)


@ours
def test_the_output_keeps_the_dtype_of_the_base_layer():
    """A layer may compute in a precision of its own: here bfloat16, whatever it is given."""

    class Bfloat16Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())

    base, x = Bfloat16Linear(8, 8), torch.randn(3, 8)
    assert base(x).dtype == torch.bfloat16 and same_bits(DeLoRALinear(base, 2)(x), base(x))


@ours
def test_an_injected_encoder_trains_alike_in_its_fused_and_its_slow_path():
    """P7 for `inject`: the fused path of nn.TransformerEncoderLayer and nn.MultiheadAttention
    follow the training.
    """
    torch.manual_seed(0)
    encoder, x = (
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        torch.randn(2, 5, 16),
    )
    adapters = inject(encoder, ["linear1", "linear2", "self_attn.out_proj"], r=4)
    optimizer = torch.optim.SGD(param_groups(encoder, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        encoder(x).square()[..., 0].sum().backward()
        assert all(
            a.delora.A.grad.abs().sum() > 0 and a.delora.B.grad.abs().sum() > 0
            for a in adapters.values()
        )
        optimizer.step()
    slow = encoder(x)
    with torch.no_grad(), disabled(encoder):
        base = encoder.eval()(x)
    with torch.no_grad():
        fused = encoder(x)
    assert distance(fused, slow) <= tol(torch.float32, 4 * 32, slow) < distance(fused, base)


@ours
@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")
def test_a_model_whose_layers_are_read_and_not_called_can_be_exported():
    """torch.export follows `layer.weight` = W + ΔW."""
    torch.manual_seed(0)
    encoder, x = (
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        torch.randn(2, 5, 16),
    )
    for adapter in inject(encoder, ["linear1", "linear2", "out_proj"], r=2).values():
        adapter.delora.A.data.normal_()
    exported = torch.export.export(encoder, (x,)).module()
    assert distance(exported(x), encoder(x)) <= tol(torch.float32, 32, encoder(x))


# ----------------------------------------------------------------------------------------- P8 merge


def merge_and_back(layer: nn.Module) -> Tensor:
    """A copy of the merged weight (out, in). Afterwards the layer is as it was."""
    weight = SUBJECT.merge(layer).detach().clone()
    if hasattr(SUBJECT, "unmerge"):
        SUBJECT.unmerge(layer)
    return weight


@given(case=moved_layers(DTYPES, reach=2, strengths=(3.0, -2.0), zero_columns=(False,)))
# Seen: ΔW rounded to the base's dtype, and then their sum again.
@seen(n_in=5, n_out=33, r=2, a=(0,), b=(0,), dtype=torch.bfloat16)
def test_the_merged_weight_is_rounded_once(case):
    """|merged − (W + ΔW)| ≤ ½ ulp: the sum, of today's λ, is formed in float32 or wider and rounded
    once.
    """
    layer, base = case.build()
    info, wide = (
        torch.finfo(case.dtype),
        torch.promote_types(SUBJECT.tensors(layer)["A"].dtype, torch.float32),
    )
    for _ in range(2):
        exact = (
            base.weight.detach().double() + SUBJECT.delta_weight(layer).detach().double()
        )  # (out, in)
        half_ulp = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)
        merged = merge_and_back(layer)
        assert merged.dtype == case.dtype
        assert ((merged.double() - exact).abs() <= half_ulp + tol(wide, 1, exact)).all()
        with torch.no_grad():
            SUBJECT.tensors(layer)["lambda"].mul_(-0.5)


@given(case=moved_layers(DTYPES, reach=2))
# Seen: merging into the weight of a head that was tied to the embedding, which changed the
# embedding.
@seen(n_in=5, n_out=33, r=2, dtype=torch.float32, a=(0,), b=(0,))
def test_merging_changes_no_tensor_that_another_module_holds(case):
    """W and b, which an embedding may share, have the same bits after a merge as before; so has the
    random state.
    """
    layer, base = case.build()
    before, random = copy.deepcopy(base), torch.get_rng_state()
    SUBJECT.merge(layer)
    assert same_bits(base.weight, before.weight)
    assert base.bias is None or same_bits(base.bias, before.bias)
    assert torch.equal(torch.get_rng_state(), random)


@given(case=moved_layers(DTYPES, reach=2, strengths=(3.0, -2.0)))
# Seen: W + ΔW − ΔW for W, which loses bits at every turn; column norms taken anew from the merged
# weight.
@seen(n_in=5, n_out=33, r=2, dtype=torch.bfloat16, a=(0,), b=(0,))
@seen(n_in=5, n_out=33, r=2, dtype=torch.float32, a=(0,), b=(0,))
def test_merging_and_unmerging_restores_every_bit(case):
    """unmerge(merge(layer)) = layer, bit for bit, five times over."""
    layer, _ = case.build()
    bits, y = copy.deepcopy(layer.state_dict()), layer(case.x())
    weights = [merge_and_back(layer) for _ in range(5)]
    assert all(same_bits(weight, weights[0]) for weight in weights)
    assert all(same_bits(tensor, bits[name]) for name, tensor in layer.state_dict().items())
    assert same_bits(layer(case.x()), y)


@ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_restore_every_bit_of_a_model(dtype):
    """W + ΔW is rounded once; merging touches nobody else's tensor; unmerging gives back the same
    objects.
    """
    torch.manual_seed(0)
    model = Attention()
    inject(model, "all-linear", r=3)
    trained(model).to(dtype).eval()
    before = snapshot(model)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = model(TOKENS)
    for _ in range(5):
        taken = merge(model)
        # Seen: one nn.Linear under two names, of which one was adapted.
        assert (
            sorted(taken) == ["first", "head", "proj", "q_proj", "second"]
            and model.first is model.second
        )
        assert not any(isinstance(module, DeLoRALinear) for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        for name, adapter in taken.items():
            plain, wide = model.get_submodule(name), torch.promote_types(dtype, torch.float32)
            assert plain.weight.dtype == dtype and not plain.training
            exact = (
                adapter.base_layer.weight.to(wide) + adapter.delora.delta_weight().to(wide)
            ).to(dtype)
            assert same_bits(plain.weight, exact)
        assert distance(model(TOKENS), adapted) <= tol(dtype, 8, adapted)
        assert (
            same_bits(model.embed.weight, bits["embed.weight"])
            and model.head.weight is not model.embed.weight
        )
        unmerge(model, taken)
    assert snapshot(model) == before
    assert all(same_bits(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert same_bits(model(TOKENS), adapted)


@ours
def test_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = Attention().half()
    inject(model, ["q_proj", "proj"], r=1)
    with torch.no_grad():
        model.proj.delora.A.neg_()
        model.proj.delora.w.fill_(6e4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^proj: .*not finite"):
        merge(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="Linear .* nothing holds it|model itself"):
        merge(DeLoRALinear(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="there is no adapter here"):
        merge(Attention())


@ours
def test_unmerge_follows_the_mode_of_the_model_and_refuses_what_does_not_fit():
    model = Attention()
    inject(model, ["q_proj", "first"], dropout=0.5)
    taken = merge(model)
    before = snapshot(model)
    for wrong in (
        {"q_proj": nn.Linear(8, 8)},
        {"norm": taken["q_proj"]},
        {"nowhere": taken["q_proj"]},
        {"embed": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            unmerge(model, taken | wrong)
        assert snapshot(model) == before
    for other in (
        nn.Linear(8, 9),
        nn.Linear(9, 8),
        Sealed(nn.Linear(8, 8)),
        DeLoRALinear(nn.Linear(8, 8)),
    ):
        changed = copy.deepcopy(model)
        changed.q_proj = other
        with pytest.raises(
            ValueError, match=f"q_proj: .*this DeLoRALinear back for .*but {type(other).__name__}"
        ):
            unmerge(changed, taken)
        assert changed.q_proj is other and type(changed.first) is nn.Linear
    model.eval().to("meta")  # stands for any other device
    unmerge(model, taken)
    assert all(p.is_meta for p in model.parameters())
    assert (
        model.q_proj is taken["q_proj"]
        and not model.q_proj.training
        and not model.q_proj.dropout.training
    )
    with pytest.raises(ValueError, match="q_proj"):
        unmerge(model, taken)


@ours
def test_disabled_is_the_pretrained_model_and_nests():
    model = Attention()
    base = model(TOKENS)
    inject(model, ["q_proj", "second"], r=2)
    adapted = trained(model)(TOKENS)
    assert not torch.equal(adapted, base)
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            assert same_bits(model(TOKENS), base)
            assert same_bits(model.first.weight, model.first.base_layer.weight)
        assert same_bits(model(TOKENS), base)
        raise KeyError
    assert same_bits(model(TOKENS), adapted)


# ---------------------------------------------------------------------------------------- P9 oracle


def oracle(case: Case, layer: nn.Module, w: Tensor | None = None) -> Tensor:
    """ΔW by the definition, in float64: a sum over rank-one components, entry by entry. w is
    measured if not given.
    """
    tensors = {
        name: tensor.detach().double().tolist() for name, tensor in SUBJECT.tensors(layer).items()
    }
    w, (strength, *frozen) = (case.w() if w is None else w.double()).tolist(), case.strengths(layer)
    terms = [("A", "B", strength), *(("A0", "B0", -strength0) for strength0 in frozen)]
    total = [[0.0] * case.n_in for _ in range(case.n_out)]
    for rows, columns, factor in terms:
        for k in range(case.r):
            a, b = tensors[rows][k], [row[k] for row in tensors[columns]]
            length_a, length_b = math.hypot(*a), math.hypot(*b)
            if length_a == 0 or length_b == 0:
                continue
            for i in range(case.n_out):
                for j in range(case.n_in):
                    total[i][j] += factor / case.r * (b[i] / length_b) * (a[j] / length_a) * w[j]
    return torch.tensor(total, dtype=torch.float64)


@given(case=moved_layers(DTYPES[:3], decades=(0, -12, 12)))
# Seen: column norms of a narrow weight, rounded to its dtype.
@seen(n_in=5, n_out=33, r=2, a=(0,), b=(0,), dtype=torch.bfloat16)
# Seen: norms of rows where columns are meant, invisible as long as layers are square and r = 1.
@seen(n_in=2, n_out=5, r=2, a=(0, 1), b=(1, 0))
@seen(
    n_in=2,
    n_out=5,
    r=2,
    a=(0, 1),
    b=(1, 0),
    weight_norm="frobenius",
    tie_lambda=False,
    strength=-2.0,
)
@seen(n_in=2, n_out=5, r=2, a=(0, 1), b=(1, 0), weight_norm=None, strength=-2.0)
def test_the_update_equals_a_loop_over_rank_one_components(case):
    """ΔW = Σ_i (λ/r) b_i a_iᵀ / (‖b_i‖ ‖a_i‖) diag(w), minus the same of the frozen copy (Eq. 8,
    9).
    """
    layer, _ = case.build()
    assert distance(SUBJECT.delta_weight(layer), oracle(case, layer)) <= case.rounding(layer)


@pytest.mark.parametrize("mode", [mode for mode, tied in SUPPORTED if tied])
def test_the_worked_example_comes_out_as_by_hand(mode):
    """W = (3 0; 4 2), λ = ½: a = (3, 4), b = (4, 3) against a₀ = (1, 0), b₀ = (0, 1); the README
    has each step.
    """
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [4.0, 2.0]], dtype=torch.float64))
    layer = SUBJECT.build(weight, None, r=1, lambda_init=0.5, weight_norm=mode, tie_lambda=True)
    tensors = SUBJECT.tensors(layer)
    by_hand = {"A": [[3.0, 4.0]], "B": [[4.0], [3.0]], "A0": [[1.0, 0.0]], "B0": [[0.0], [1.0]]}
    with torch.no_grad():
        for name in by_hand.keys() & tensors.keys():
            tensors[name].copy_(torch.tensor(by_hand[name]))
    w = {"column": [5.0, 2.0], "frobenius": [29**0.5, 29**0.5], None: [1.0, 1.0]}[mode]
    w, delta = torch.tensor(w, dtype=torch.float64), SUBJECT.delta_weight(layer)
    directions = torch.tensor([[0.48, 0.64], [0.36, 0.48]], dtype=torch.float64)  # B̂Â
    if "A0" in tensors:
        directions[1, 0] -= 1  # B̂₀Â₀
    assert distance(delta, 0.5 * directions * w) <= tol(torch.float64, 4, w)
    if "A0" in tensors and mode == "column":
        wanted = torch.tensor([[1.2, 0.64], [-1.6, 0.48]], dtype=torch.float64)
        assert distance(delta, wanted) <= tol(torch.float64, 4, 5)
        assert norms(delta) == pytest.approx((4.64**0.5, 2.8), rel=tol(torch.float64, 4))
        assert gradients(layer, delta.sum())["lambda"].item() == pytest.approx(
            1.44, rel=tol(torch.float64, 8, 5)
        )
        y = layer(torch.ones(2, dtype=torch.float64))
        assert y.tolist() == pytest.approx([4.84, 4.88], rel=tol(torch.float64, 8))


@ours
@given(case=moved_layers((torch.float64, torch.float32), strengths=(3.0, -2.0, 1e-6)))
def test_the_factors_are_a_lora_pair_of_twice_the_rank(case):
    """ΔW = left @ right, left (out, 2r), right (2r, in), in float32 or wider for any parameters
    (Eq. 8, 9).
    """
    layer, _ = case.build()
    left, right = layer.delora.factors()
    assert left.shape == (case.n_out, 2 * case.r) and right.shape == (2 * case.r, case.n_in)
    assert distance(left @ right, oracle(case, layer)) <= case.rounding(layer)
    layer.to(torch.bfloat16)
    assert {tensor.dtype for tensor in (*layer.delora.factors(), layer.delora.delta_weight())} == {
        torch.float32
    }
    wanted = oracle(case, layer, layer.delora.w)
    rounding = tol(torch.float32, case.n_in + case.n_out + 2 * case.r, layer.delora.norm_bound())
    assert distance(layer.delora.delta_weight(), wanted) <= rounding


@ours
def test_the_weight_norm_is_measured_as_the_mode_says():
    """w: column norms over the outputs, the Frobenius norm, or one (Eq. 8, 7)."""
    base = nn.Linear(2, 2, bias=False).double()
    base.weight.data = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).double()
    for mode, w in (("column", [5.0, 2.0]), ("frobenius", [29**0.5] * 2), (None, [1.0, 1.0])):
        layer = DeLoRALinear(base, 1, weight_norm=mode)
        assert layer.delora.w.tolist() == pytest.approx(w, rel=tol(torch.float64, 4))
        assert not any(p.requires_grad for p in base.parameters())


@ours
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_weight_norm_of_a_narrow_base_is_measured_in_float32(dtype):
    base = nn.Linear(9, 300).to(dtype)
    layer = DeLoRALinear(base)
    assert layer.delora.w.dtype == torch.float32
    wanted = base.weight.double().norm(dim=0)
    assert distance(layer.delora.w, wanted) <= tol(torch.float32, 300, wanted)


# ----------------------------------------------------------------------------------- P10 checkpoint


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@given(case=moved_layers(DTYPES, reach=2, strengths=(3.0, -2.0)))
# Seen: a frozen copy that is a plain attribute, so that a checkpoint lacks it.
@seen(n_in=5, n_out=2, r=2, a=(0,), b=(0,))
def test_a_saved_layer_computes_the_same_when_loaded(case):
    """layer(x) is the same bit for bit after state_dict, a file, and load_state_dict into a new
    layer on W.
    """
    layer, _ = case.build()
    fresh, _ = case.build(start=2)
    fresh.load_state_dict(through_a_file(layer.state_dict()))
    assert same_bits(fresh(case.x()), layer(case.x()))


@ours
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_restores_the_outputs_bit_for_bit_without_a_configuration(tied, mode):
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj"], r=3, weight_norm=mode, tie_lambda=tied)
    inject(model, ["second"], r=2, lambda_init=2.0)
    model.norm.requires_grad_(True)
    model.q_proj.base_layer.bias.requires_grad_(True)
    trained(model)
    state = through_a_file(adapter_state_dict(model))
    changed = {"norm.weight", "norm.bias", "q_proj.base_layer.bias"}
    assert {key for key in state if ".delora." not in key} == changed
    assert {key.split(".")[0] for key in state if ".delora." in key} == {
        "q_proj",
        "first",
        "second",
    }

    fresh = copy.deepcopy(pretrained)
    adapters = load_adapter(fresh, state)
    assert same_bits(fresh(TOKENS), model(TOKENS))
    assert set(adapters) == {"q_proj", "first", "second"} and fresh.first is fresh.second
    trainable = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{name}.delora.{leaf}" for name in ("q_proj", "first") for leaf in ("A", "B", "lam")
    }
    fresh.norm.requires_grad_(True)  # by its owner, as after inject
    fresh.q_proj.base_layer.bias.requires_grad_(True)
    again = adapter_state_dict(fresh)
    assert again.keys() == state.keys() and all(same_bits(again[key], state[key]) for key in state)

    saved = adapter_state_dict(fresh)
    trained(
        fresh
    )  # a checkpoint is a copy: training on leaves it alone, and loading it again goes back to it
    assert all(same_bits(saved[key], state[key]) for key in state)
    assert not torch.equal(fresh(TOKENS), model(TOKENS))
    load_adapter(fresh, state)
    assert same_bits(fresh(TOKENS), model(TOKENS))


@ours
def test_a_single_layer_is_a_model_too():
    """The adapter as the root: its checkpoint has no prefix, and what it wraps is no target."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4)
    layer, fresh = DeLoRALinear(copy.deepcopy(base), 2), DeLoRALinear(copy.deepcopy(base), 2)
    layer.delora.A.data.normal_()
    state = through_a_file(adapter_state_dict(layer))
    assert "delora.A" in state and set(load_adapter(fresh, state)) == {""}
    assert same_bits(fresh(torch.ones(4)), layer(torch.ones(4)))
    for model, call in (
        (layer, lambda: inject(layer, "all-linear")),
        (base, lambda: load_adapter(base, state)),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match="leave no layer|delora.A"):
            call()
        assert snapshot(model) == before


@ours
def test_a_model_that_is_named_as_in_peft_keeps_its_names():
    torch.manual_seed(0)
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": Attention()})})
    fresh = copy.deepcopy(model)
    inject(model, ["q_proj"], r=2)["base_model.model.q_proj"].delora.A.data.normal_()
    assert set(load_adapter(fresh, adapter_state_dict(model))) == {"base_model.model.q_proj"}
    inner, same = model["base_model"]["model"], fresh["base_model"]["model"]
    assert same_bits(inner(TOKENS), same(TOKENS))


@ours
def test_a_checkpoint_that_does_not_fit_is_refused_by_key_and_changes_nothing():
    source = Attention()
    inject(source, ["q_proj", "first"], r=3, tie_lambda=False)
    state = adapter_state_dict(source)
    adapted = Attention()
    inject(adapted, ["q_proj", "first"], r=2, tie_lambda=False)
    more = Attention()
    inject(more, ["q_proj", "proj"], r=3, tie_lambda=False)
    fresh = Attention()
    A = "q_proj.delora.A"
    cases = [
        (fresh, {k: v for k, v in state.items() if k != key}, key)
        for key in state
        if "lam0" not in key
    ]
    cases = [
        (model, wrong, key)
        for model, wrong, key in cases
        if not key.startswith(("first", "second"))
    ]
    cases += [
        (fresh, state | {A: torch.randn(3, 7)}, A),
        (fresh, state | {A: torch.randn(8)}, A),
        (fresh, state | {A: torch.tensor(1.0)}, A),
        (adapted, state | {A: torch.tensor(1.0)}, A),
        (adapted, state | {A: "text"}, A),
        (fresh, state | {A: torch.ones(3, 8, dtype=torch.int64)}, A),
        (fresh, state | {A: "text"}, A),
        (fresh, state | {A: state[A] * math.nan}, "q_proj.delora.A is no tensor of finite"),
        (fresh, state | {"q_proj.delora.C": torch.randn(1)}, "q_proj.delora.C"),
        (fresh, state | {"layers.9.delora.A": torch.randn(3, 8)}, "layers.9.delora.A"),
        (fresh, state | {"norm.delora.A": torch.randn(3, 8)}, "norm: LayerNorm is no linear layer"),
        (
            fresh,
            state | {"norm.weight": torch.randn(9)},
            r"norm.weight: .*\[9\]\) in the file, .*\[8\]\) here",
        ),
        (
            fresh,
            state | {"no.codes": torch.randn(8)},
            "no.codes: the model has nothing of that name",
        ),
        (
            fresh,
            state | {"second.delora.lam": torch.tensor([1.0])},
            r"(first|second)\.delora\.lam: tied",
        ),
        (
            fresh,
            {"q_proj.lora_A.weight": torch.randn(3, 8)},
            "^q_proj.lora_A.weight: .*'lora_' is LoRA's",
        ),
        (
            fresh,
            {f"module.{k}": v for k, v in state.items()},
            "^module.*'module.' comes from DistributedDataP",
        ),
        (
            fresh,
            {f"_orig_mod.{k}": v for k, v in state.items()},
            "^_orig_mod.*'_orig_mod.' from torch.compile",
        ),
        (
            fresh,
            {f"base_model.model.proj.delora_{leaf}": torch.ones(8) for leaf in "AB"},
            "^base_model.*peft_check",
        ),
        (fresh, {"norm.weight": torch.randn(8)}, "there is no adapter here"),
        (fresh, {}, "there is no adapter here"),
        (fresh, {k: v for k, v in state.items() if "0" not in k}, r"q_proj\.delora\.A0 is missing"),
        (fresh, "adapter.pt", "as of torch.load.*adapter.pt"),
        (adapted, state, r"q_proj.delora.A: .*\[3, 8\]\) in the file, .*\[2, 8\]\) here"),
        (more, state, r"proj.delora.A"),
    ]
    for model, wrong, message in cases:
        before = snapshot(model)
        with pytest.raises((ValueError, TypeError), match=message):
            load_adapter(model, wrong)
        assert snapshot(model) == before, message


@ours
def test_an_adapter_loads_on_a_quantised_layer_and_one_of_a_quantised_layer_on_floats():
    """As with QLoRA: what is trained on codes can be merged into the floats that they came from,
    and the reverse.
    """
    torch.manual_seed(0)
    floats = Attention()
    codes = copy.deepcopy(floats)
    codes.proj = Int8Linear(codes.proj)
    for source, target in ((floats, codes), (codes, floats)):
        model, fresh = copy.deepcopy(source), copy.deepcopy(target)
        inject(model, ["proj", "q_proj"], r=2)
        state = through_a_file(adapter_state_dict(trained(model)))
        load_adapter(fresh, state)
        assert same_bits(fresh.proj.delora.delta_weight(), model.proj.delora.delta_weight())
        assert fresh.proj.base_layer is not model.proj.base_layer and type(
            fresh.proj.base_layer
        ) is type(target.proj)


@ours
def test_a_checkpoint_that_unties_what_the_model_ties_is_refused():
    """PEFT saves a trained copy of one of two tied layers. To load it would change the other one
    too.
    """
    torch.manual_seed(0)
    source = Attention()
    inject(source, ["q_proj", "first"], r=2)
    state = adapter_state_dict(source)
    head, shared = (
        state | {"head.weight": torch.randn(16, 8)},
        {k: v for k, v in state.items() if "second" not in k},
    )
    for wrong, message in (
        (head, "^(embed|head).weight: tied"),
        (shared, "^second.delora.A is missing"),
    ):
        model = Attention()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, wrong)
        assert snapshot(model) == before
    torch.manual_seed(0)
    model = Attention().bfloat16()
    unchanged = state | {"head.weight": model.head.weight.detach().clone().float()}
    load_adapter(model, unchanged)
    assert not model.embed.weight.requires_grad and model.head.weight is model.embed.weight


@pytest.fixture
def process_group():
    """This process as a group of its own: enough for tensors to be sharded, without a second
    process.
    """
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@ours
def test_a_sharded_model_is_refused_by_name_wherever_it_must_be_whole(process_group):
    """FSDP2: examples/distributed.py saves and loads it, in two processes. Here is what a single
    one can see.
    """
    fully_shard = getattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard", None)
    if fully_shard is None:
        pytest.skip("FSDP2 is torch 2.6's")
    torch.manual_seed(0)
    pretrained = Attention()
    del pretrained.second, pretrained.head
    pretrained.forward = None
    model, plain, whole = (copy.deepcopy(pretrained) for _ in range(3))
    inject(model, ["q_proj", "proj"], r=2, tie_lambda=False)
    state, bound = adapter_state_dict(model), model.proj.delora.norm_bound()
    fully_shard(model)
    assert "lam" in repr(model) and model.proj.delora.norm_bound() == bound
    parts = {
        name: p for name, p in model.named_parameters() if name in state
    }  # as they come, sharded
    fully_shard(plain)
    for call, message in (
        (lambda: inject(model, ["first"]), "^first: its weight is sharded"),
        (lambda: inject(plain, "all-linear"), "^q_proj: its weight is sharded"),
        (lambda: merge(model), "^q_proj is sharded"),
        (lambda: adapter_state_dict(model), "^q_proj.delora.A is sharded"),
        (lambda: load_adapter(model, state), "^q_proj.delora.A is sharded"),
        (lambda: load_adapter(plain, state), "^q_proj: its weight is sharded"),
        (lambda: load_adapter(whole, parts), "^q_proj.delora.A is sharded"),
        (lambda: model.proj.weight, "^its weight is sharded"),
    ):
        before = snapshot(model), snapshot(plain), snapshot(whole)
        with pytest.raises(TypeError, match=message):
            call()
        assert (snapshot(model), snapshot(plain), snapshot(whole)) == before, message


# ---------------------------------------------------------------------------- P11 nothing half done


@pytest.mark.parametrize("r", (0, -1))
def test_a_rank_that_is_none_is_refused(r):
    """r ≥ 1, or an error when the layer is built, which leaves W as it was."""
    case = Case(n_in=5, n_out=2, r=r)
    base = case.base()
    mode = {"weight_norm": case.weight_norm, "tie_lambda": case.tie_lambda}
    with pytest.raises((ValueError, TypeError)):
        SUBJECT.build(base.weight, base.bias, r=r, lambda_init=3.0, **mode)
    assert same_bits(base.weight, case.base().weight) and base.weight.requires_grad


def poisoned(value: float) -> Attention:
    model = Attention()
    model.proj.weight.data[0, 0] = value
    return model


def lazy() -> Attention:
    model = Attention()
    model.proj = nn.LazyLinear(8)
    return model


class Tanh(nn.Module):
    in_features = out_features = 8

    def forward(self, x):
        return x.tanh()


class Broken(Tanh):
    def forward(self, x):
        return x.no_such_method()


def crooked(layer: type[nn.Module] = Tanh) -> Attention:
    model = Attention()
    model.proj = layer()
    return model


@ours
def test_a_layer_that_cannot_be_measured_is_named_and_changes_nothing():
    model = crooked(Broken)
    before = snapshot(model)
    with pytest.raises(AttributeError, match="proj: .*no_such_method"):
        inject(model, "all-linear")
    assert snapshot(model) == before


@ours
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            Attention,
            {"target_modules": ["q_proj", "oj"]},
            r"'oj' matches nothing.*\['first', 'head', 'proj', 'q_proj', 'second'\]",
        ),
        (
            Attention,
            {"target_modules": "q_pro"},
            r"'q_pro' matches nothing.* as a string .*a regular expression for the whole name",
        ),
        (Attention, {"target_modules": []}, r"target_modules=\[\]"),
        (Attention, {"target_modules": None}, "None"),
        (Attention, {"target_modules": ["q_proj", 3]}, "3 matches nothing"),
        (
            Attention,
            {"target_modules": "all_linear"},
            "'all_linear' matches nothing.*'all-linear' or a regular expression",
        ),
        (Attention, {"target_modules": "*q"}, r"'\*q' is no regular expression"),
        (Attention, {"exclude": ["nowhere"]}, "nowhere"),
        (Attention, {"target_modules": ["q_proj"], "exclude": ["q_proj"]}, "leave no layer"),
        (Attention, {"target_modules": ["q_proj", "norm"]}, "norm: LayerNorm is no linear layer"),
        (Attention, {"target_modules": ["q_proj", "embed"]}, "embed: Embedding"),
        (
            Attention,
            {"target_modules": ["q_proj", ""]},
            "the model itself: Attention is no linear layer",
        ),
        (Attention, {"target_modules": [""]}, "the model itself: Attention"),
        (lambda: nn.Linear(4, 4), {}, "the model itself"),
        (lambda: poisoned(math.nan), {}, "proj: .*not finite"),
        (lambda: poisoned(math.inf), {"weight_norm": None}, "proj: .*not finite"),
        (lazy, {}, "proj: .*uninitialized parameter"),
        (crooked, {}, "proj: .*Tanh is not linear"),
        (Attention, {"r": 0}, "q_proj: r must be .*got 0"),
        (Attention, {"r": -1}, "q_proj: .*-1"),
        (Attention, {"r": True}, "q_proj: .*True"),
        (Attention, {"r": 2.0}, "q_proj: .*2.0"),
        (Attention, {"lambda_init": 0}, "q_proj: lambda_init .*got 0"),
        (Attention, {"lambda_init": -1.0}, "q_proj: lambda_init .*-1"),
        (Attention, {"lambda_init": math.nan}, "q_proj: lambda_init .*nan"),
        (Attention, {"lambda_init": math.inf}, "q_proj: lambda_init .*inf"),
        (Attention, {"lambda_init": True}, "q_proj: lambda_init .*True"),
        (Attention, {"lambda_init": "15"}, "q_proj: lambda_init .*'15'"),
        (Attention, {"dropout": 1.0}, "q_proj: dropout .*1.0"),
        (Attention, {"dropout": -0.1}, "q_proj: dropout .*-0.1"),
        (Attention, {"dropout": math.nan}, "q_proj: dropout .*nan"),
        (Attention, {"dropout": None}, "q_proj: dropout .*None"),
        (Attention, {"weight_norm": "row"}, "q_proj: weight_norm .*'row'"),
        (Attention, {"weight_norm": [1]}, r"q_proj: weight_norm .*\[1\]"),
        (Attention, {"rank": 8}, "rank"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(model, arguments, message):
    model = model()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        inject(model, **({"target_modules": "all-linear"} | arguments))
    assert snapshot(model) == before


@ours
def test_an_adapted_layer_is_not_adapted_again():
    model = Attention()
    inject(model, ["q_proj"])
    before = snapshot(model)
    for targets in (["q_proj"], ["proj", "q_proj"], "q_proj"):
        with pytest.raises((ValueError, TypeError), match="q_proj"):
            inject(model, targets)
        assert snapshot(model) == before
    with pytest.raises(TypeError, match="DeLoRALinear is adapted already"):
        DeLoRALinear(model.q_proj)
    adapters = inject(model, "all-linear")  # the rest, and nothing inside the adapter that is there
    assert (
        set(adapters) == {"proj", "first", "second", "head"}
        and type(model.q_proj.base_layer) is nn.Linear
    )
    with pytest.raises(ValueError, match="leave no layer"):
        inject(model, "all-linear")


# ------------------------------------------------------------------------------------------- inject


@ours
@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        (["proj"], (), {"proj"}),
        (
            ["blocks.1.proj", "q_proj"],
            (),
            {"blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.proj", "q_proj"},
        ),
        (
            ("first",),
            (),
            {
                "first",
                "second",
                "blocks.0.first",
                "blocks.0.second",
                "blocks.1.first",
                "blocks.1.second",
            },
        ),
        (r"blocks\.1\..*proj", (), {"blocks.1.q_proj", "blocks.1.proj"}),
        (r"blocks\.1\..*", ["first", "head"], {"blocks.1.q_proj", "blocks.1.proj"}),
        ("all-linear", r"blocks.*", {"q_proj", "proj", "first", "second", "head"}),
        ("all-linear", ["blocks"], {"q_proj", "proj", "first", "second", "head"}),
    ],
)
def test_names_match_whole_or_at_a_dot_and_expressions_match_whole(targets, exclude, names):
    class Deep(Attention):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])

    model = Deep()
    if targets == ["proj"]:
        model.blocks = None
    adapters = inject(model, targets, exclude=exclude)
    assert set(adapters) == names
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(("delora.A", "delora.B", "delora.lam")), name


@ours
def test_an_uninitialised_layer_that_is_no_target_stays_uninitialised():
    model = lazy()
    inject(model, ["q_proj"])
    assert not model.proj.weight.requires_grad and nn.parameter.is_lazy(model.proj.weight)
    merge(model)


class Sealed(nn.Module):
    """Acts like nn.Linear, contains one, and shows no weight."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.in_features, self.out_features = (
            inner,
            inner.in_features,
            inner.out_features,
        )

    def forward(self, x):
        return self.inner(x)


@ours
def test_of_layers_inside_one_another_one_is_adapted():
    """By name the outer one if it is meant; a regular expression and "all-linear" take the inner
    ones.
    """
    for targets, names in (
        (["proj"], {"proj"}),
        ("proj.*", {"proj.inner"}),
        ("all-linear", {"proj.inner", "head"}),
    ):
        model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8)), "head": nn.Linear(8, 2)})
        before = model["proj"](torch.ones(8))
        adapters = inject(model, targets)
        assert set(adapters) == names and same_bits(model["proj"](torch.ones(8)), before)
        assert not any(
            p.requires_grad for name, p in model.named_parameters() if ".delora." not in name
        )
    with pytest.raises(ValueError, match="leave no layer"):
        inject(model, "all-linear")
    model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8))})
    with pytest.raises(ValueError, match="proj contains another target"):
        inject(model, ["proj", "proj.inner"])


@ours
def test_a_new_adapter_takes_the_mode_of_its_base_and_leaves_that_alone():
    base = Sealed(nn.Linear(4, 4))
    base.inner.eval()
    layer = DeLoRALinear(base, dropout=0.5)
    assert layer.training and layer.dropout.training and base.training and not base.inner.training
    layer = DeLoRALinear(nn.Linear(4, 4).eval(), dropout=0.5)
    assert not layer.training and not layer.dropout.training


@ours
def test_a_name_or_an_attribute_alone_makes_no_transposed_layer():
    base = type("Conv1D", (Sealed,), {})(nn.Linear(3, 5))
    assert distance(DeLoRALinear(base).weight, base.inner.weight) <= tol(
        torch.float32, 1, base.inner.weight
    )
    base = nn.Linear(3, 5)
    base.nf = 5
    model = nn.Sequential(base)
    assert same_bits(inject(model, ["0"])["0"].weight, base.weight)
    unmerge(model, merge(model))  # which compares the sizes
    for size in ("in_features", "out_features"):
        model = nn.ModuleDict({"proj": nn.Linear(3, 5), "other": nn.Identity()})
        setattr(model["other"], size, 3)
        assert set(inject(model, "all-linear")) == {"proj"}


@ours
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("offset", (10.0, -100.0, 100.0, 0.0))
@pytest.mark.parametrize("scale", (1, 100))
def test_a_large_bias_does_not_round_a_measured_weight_away(dtype, offset, scale):
    torch.manual_seed(0)
    linear = nn.Linear(300, 5)
    linear.weight.data *= scale
    linear.bias.data.fill_(offset)
    adapter = DeLoRALinear(Sealed(linear.to(dtype)))
    size = linear.weight.abs().max().item() + abs(offset) / 512  # the identity is scaled by 512
    assert distance(adapter.weight, linear.weight) <= tol(dtype, 1, size)
    assert (adapter.bias is None) == (offset == 0) and (
        offset == 0 or same_bits(adapter.bias, linear.bias)
    )


@ours
@pytest.mark.parametrize("offset", (0.0, 0.3))
@pytest.mark.parametrize("n_in", (3072, 8192))
@pytest.mark.parametrize("bias", (1e-3, 0.1, 10.0))
def test_a_wide_layer_in_bfloat16_is_linear_whatever_its_bias(n_in, offset, bias):
    """Beside a large 512 W a small bias is rounded away, column for column to the same side: what
    adds up like a sum must not look like a bend. Nor a mean of W that is far from zero.
    """
    torch.manual_seed(0)
    linear = nn.Linear(n_in, 32)
    nn.init.normal_(linear.weight, offset, 0.05)
    nn.init.normal_(linear.bias, 0, bias)
    adapter = DeLoRALinear(Sealed(linear.bfloat16()), r=1)
    size = linear.weight.abs().max().item() + linear.bias.abs().max().item() / 512
    assert distance(adapter.weight, linear.weight) <= tol(torch.bfloat16, 1, size)


@ours
def test_a_weight_that_a_bias_hides_from_one_side_is_measured_exactly_from_two():
    linear = nn.Linear(16, 4)
    nn.init.normal_(linear.weight, 1, 0.1)
    linear.bias.data.fill_(0.9)  # 512 W has steps of 2 and of 4 in bfloat16
    linear.to(torch.bfloat16)
    assert distance(DeLoRALinear(Sealed(linear), r=1).weight, linear.weight) == 0


@ours
def test_a_large_weight_in_float16_is_measured():
    """Neither 512 W nor the difference of two such outputs overflows, up to |W| = 65504 / 1024."""
    linear = nn.Linear(4, 3, bias=False).half()
    linear.weight.data.fill_(60)
    assert distance(DeLoRALinear(Sealed(linear), r=1).weight, linear.weight) == 0


@ours
def test_a_layer_that_returns_its_input_is_the_identity():
    base = nn.Identity()
    base.in_features = base.out_features = 5
    assert distance(DeLoRALinear(base, r=1).weight, torch.eye(5)) == 0


@ours
def test_a_layer_of_zeros_is_linear_too():
    """A head may start at zero. w is zero then, and the adapter without effect, except with
    weight_norm=None.
    """
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for base in (linear, Sealed(linear)):
        layer = DeLoRALinear(base)
        layer.delora.A.data.normal_()
        assert layer(torch.randn(2, 4)).count_nonzero() == 0 and layer.delora.norm_bound() == 0


@ours
def test_measuring_leaves_autocast_and_gradients_out():
    """W is measured in the layer's own precision, and is a constant: its gradient reaches no
    parameter.
    """
    torch.manual_seed(0)
    base = Sealed(nn.Linear(20, 30))
    with torch.autocast("cpu", torch.bfloat16):
        layer = DeLoRALinear(base)
        weight = layer.weight
    assert distance(weight, base.inner.weight) <= tol(torch.float32, 1, base.inner.weight)
    assert distance(layer.delora.w, base.inner.weight.norm(dim=0)) <= tol(
        torch.float32, 30, layer.delora.w
    )
    base.requires_grad_(True)
    layer.weight.sum().backward()
    assert base.inner.weight.grad is None and layer.delora.A.grad is not None


class Packed(torch.Tensor):
    """A weight as quantised tensors of torchao are: it can be multiplied with, but has no entries
    to read.
    """

    @staticmethod
    def __new__(cls, codes: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].codes.float() / 64, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(f"{function} on a packed weight")


@ours
def test_a_weight_that_is_packed_into_a_tensor_subclass_is_measured():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(3, 6)
    codes = torch.randint(-64, 65, (4, 6), dtype=torch.int8)
    base.weight = nn.Parameter(Packed(codes), requires_grad=False)
    layer = DeLoRALinear(base)
    assert same_bits(layer(x), base(x))
    layer.delora.A.data.normal_()
    assert distance(layer.weight - layer.delora.delta_weight(), codes / 64) <= tol(
        torch.float32, 2, 1 + layer.delora.norm_bound()
    )
    assert distance(layer.merged()(x), layer(x)) <= tol(torch.float32, 8, layer(x))


class TermByTerm(nn.Module):
    """A linear layer that sums in the order that rounds worst: every third adds an error of the
    same sign.
    """

    def __init__(self, n_in):
        super().__init__()
        self.in_features, self.out_features = n_in, 2
        self.register_buffer("thirds", torch.full((n_in, 2), 1 / 3))

    def forward(self, x):
        return sum(x[:, j, None] * self.thirds[j] for j in range(self.in_features))


@ours
def test_a_measured_layer_may_sum_in_any_order():
    base = TermByTerm(1024)
    assert distance(DeLoRALinear(base).weight.T, base.thirds) <= tol(torch.float32, 1, base.thirds)


@ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_is_not_linear_is_refused_in_every_dtype(dtype):
    """Sizes and a weight do not make a layer linear: here the output or the input passes through
    something else.
    """

    def normalised(x):
        return F.layer_norm(x, x.shape[-1:])

    bends = [torch.tanh, torch.relu, torch.sqrt, torch.square, lambda y: y.clamp(-1, 1)]
    before = [torch.relu, torch.abs, F.gelu, F.normalize, normalised, lambda x: x.clamp(min=-6)]
    for n_in in (768, 3):
        for function in bends + before:
            base = Sealed(nn.Linear(n_in, 16).to(dtype))
            if function in bends:
                base.register_forward_hook(lambda module, x, y, function=function: function(y))
            else:
                base.register_forward_pre_hook(lambda module, x, function=function: function(x[0]))
            with pytest.raises(TypeError, match="Sealed is not linear"):
                DeLoRALinear(base)
            assert all(p.requires_grad for p in base.parameters())


class Repacked(nn.Module):
    """As a 4-bit layer of bitsandbytes on some CPUs: the first input without requires_grad ends its
    training.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.packed = (
            linear.in_features,
            linear.out_features,
            False,
        )
        self.register_buffer("codes", linear.weight.detach())

    def forward(self, x):
        self.packed |= not x.requires_grad
        return F.linear(x.detach() if self.packed else x, self.codes)


@ours
def test_measuring_leaves_a_layer_fit_for_training():
    base, x = Repacked(nn.Linear(300, 5)), torch.randn(2, 300, requires_grad=True)
    layer = DeLoRALinear(base)
    layer(x).sum().backward()
    assert not base.packed and x.grad.count_nonzero()


class Codes(nn.Module):
    """A quantised layer that has no floating-point tensor, and takes x as it comes."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features, self.out_features, self.seen = n_in, n_out, set()
        self.codes = nn.Parameter(
            torch.randint(-64, 65, (n_out, n_in), dtype=torch.int8), requires_grad=False
        )

    def forward(self, x):
        self.seen.add(x.dtype)
        return F.linear(x, self.codes.to(x.dtype) / 512)


@ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_layer_without_a_float_is_measured_and_merged_in_torch_s_default_dtype(dtype):
    """It does not say in which dtype it is called. A merged one can be cast."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(Codes(6, 6), nn.Linear(6, 6), Codes(6, 4)).to(dtype),
        torch.randn(2, 6, dtype=dtype),
    )
    adapter, base = inject(model, ["0", "2"], r=2)["2"], model[2].base_layer
    assert base.seen == {torch.float32} and adapter.delora.A.dtype == torch.float32
    adapter.delora.A.data.normal_()
    adapted = model(x)
    assert adapted.dtype == dtype and adapter.weight.dtype == torch.float32 and adapter.bias is None
    taken = merge(model)
    narrow = dtype if dtype != torch.float64 else torch.float32  # in which it was measured
    assert distance(model.to(dtype)(x), adapted) <= tol(
        narrow, 3 * 6, adapted.abs().max().item() + 6
    )
    unmerge(model, taken)
    assert same_bits(model(x), adapted)


@ours
def test_the_dtype_of_scales_is_that_of_a_quantised_layer_alone():
    base = Codes(6, 4)
    base.scales = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert DeLoRALinear(base).weight.dtype == torch.bfloat16 and base.seen == {torch.bfloat16}


@ours
def test_a_quantised_layer_that_bends_is_refused():
    class Bent(Codes):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(TypeError, match="Bent is not linear"):
        DeLoRALinear(Bent(64, 16))


@ours
def test_a_layer_may_round_inside_to_fewer_bits_than_it_returns():
    """bfloat16 products in a layer that is given and returns float32: linear, but for rounding that
    shows nowhere.
    """

    class Inside(Codes):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.codes.bfloat16() / 512).float() + 1

    torch.manual_seed(0)
    base = Inside(300, 40)
    assert distance(DeLoRALinear(base).weight, base.codes / 512) <= tol(torch.bfloat16, 1, 1)


@ours
def test_a_layer_that_drops_at_random_is_not_linear_where_its_precision_is_known():
    class Dropping(nn.Linear):
        def forward(self, x):
            return F.linear(F.dropout(x, 0.05, self.training), self.weight, self.bias)

    torch.manual_seed(0)
    with pytest.raises(TypeError, match="Dropping is not linear"):
        DeLoRALinear(Dropping(1024, 64))
    DeLoRALinear(Dropping(1024, 64).eval())


@ours
def test_names_that_look_like_ours_are_the_users_own():
    """A model may have a module called base_layer: nothing is mistaken for an adapter's."""
    torch.manual_seed(0)
    pretrained = nn.ModuleDict(
        {"base_layer": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)}
    )
    model = copy.deepcopy(pretrained)
    inject(model, ["base_layer.fc"])
    assert not model["fc"].weight.requires_grad
    inject(model, "fc")
    for adapter in (model["fc"], model["base_layer"]["fc"]):
        adapter.delora.A.data.normal_()
    fresh = copy.deepcopy(pretrained)
    load_adapter(fresh, through_a_file(adapter_state_dict(model)))
    x = torch.ones(4)
    assert same_bits(fresh["fc"](x), model["fc"](x))
    assert same_bits(fresh["base_layer"]["fc"](x), model["base_layer"]["fc"](x))


@ours
def test_merging_while_disabled_loses_nothing():
    model = Attention()
    inject(model, ["q_proj"])
    adapted = trained(model)(TOKENS)
    with disabled(model):
        merge(model)
    assert distance(model(TOKENS), adapted) <= tol(torch.float32, 8, adapted)


@ours
def test_the_defaults_are_those_of_the_paper_and_its_code():
    """r = 8, λ = 15, column norms, tied, no dropout."""
    base = nn.Linear(8, 8)
    for layer in (DeLoRALinear(base), inject(Attention(), ["q_proj"])["q_proj"]):
        assert layer.delora.A.shape == (8, 8) and layer.delora.lam.tolist() == [15.0]
        assert layer.delora.lam0 is None and layer.dropout.p == 0
        wanted = layer.base_layer.weight.norm(dim=0)
        assert distance(layer.delora.w, wanted) <= tol(torch.float32, 8, wanted)


@ours
def test_the_range_of_lambda_is_closed_below_and_open_above():
    for value in (1e-30, 1, 9e29):
        assert DeLoRALinear(nn.Linear(2, 2).double(), lambda_init=value).delora.lam.item() == value
    with pytest.raises(ValueError, match=r"got 1e\+30"):
        DeLoRALinear(nn.Linear(2, 2), lambda_init=1e30)


@ours
def test_the_components_start_uniform_as_the_authors_draw_them():
    """A ~ U(−1/√in, 1/√in), B ~ U(−1/√r, 1/√r): variance 1 / (3 fan_in)."""
    torch.manual_seed(0)
    layer = DeLoRALinear(nn.Linear(400, 300), 100)
    for p, fan_in in ((layer.delora.A, 400), (layer.delora.B, 100)):
        edge, n = fan_in**-0.5, p.numel()
        assert (
            0.99 * edge < p.abs().max().item() <= edge * (1 + tol(torch.float32, 1))
        )  # 300 and more lie out there
        assert (
            abs(p.mean().item()) < 5 * edge / (3 * n) ** 0.5
        )  # five standard deviations of a mean of n
        assert abs(p.square().mean().item() - edge**2 / 3) < 5 * edge**2 * (4 / 45 / n) ** 0.5


@ours
def test_a_model_on_the_meta_device_is_adapted_there_and_filled_later():
    torch.manual_seed(0)
    real = Attention()
    inject(real, "all-linear", r=2)
    trained(real)
    with torch.device("meta"):
        model = Attention()
        inject(model, "all-linear", r=2)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(real.state_dict(), assign=True)
    assert same_bits(model(TOKENS), real(TOKENS))


@ours
def test_a_second_injection_adds_and_leaves_the_first_as_it_was():
    model = Attention()
    first = inject(model, ["q_proj"], r=2, lambda_init=4.0)["q_proj"]
    first.delora.lam.requires_grad_(False)
    model.eval()
    second = inject(model, ["proj"], r=5)["proj"]
    assert (
        model.q_proj is first
        and first.delora.A.requires_grad
        and not first.delora.lam.requires_grad
    )
    assert second.delora.A.shape == (5, 8) and not second.training and second.delora.B.requires_grad
    assert second.delora.A.dtype == torch.float32
    assert DeLoRALinear(nn.Linear(2, 2).double()).delora.A.dtype == torch.float64
    assert DeLoRALinear(nn.Linear(2, 2).half()).delora.B.dtype == torch.float32


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is stored transposed."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.nf = n_out
        self.weight, self.bias = (
            nn.Parameter(torch.randn(n_in, n_out)),
            nn.Parameter(torch.randn(n_out)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Int8Linear(nn.Module):
    """A layer whose weight cannot be read: eight bits and a scale for each output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127  # (out, 1)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.offset = None if linear.bias is None else linear.bias.detach().clone()

    @property
    def weight(self):
        raise RuntimeError("packed")

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.offset)


@ours
@pytest.mark.parametrize(
    "kind",
    ("conv1d", "a square conv1d", "int8", "int8 without bias", "int8, wider than a block"),
)
def test_layers_that_act_like_linear_are_adapted_and_merged(kind):
    torch.manual_seed(0)
    wide = 700 if "wider" in kind else 12
    if "conv1d" in kind:
        base = Conv1D(12, 12 if "square" in kind else 5)
        weight, bias = base.weight.T, base.bias
    else:
        linear = nn.Linear(wide, 5, bias="without" not in kind)
        base = Int8Linear(linear)
        weight, bias = base.packed * base.scale, base.offset
    model, x = nn.Sequential(base, nn.ReLU()), torch.randn(2, 3, wide)
    before = model(x)
    adapter = inject(model, "all-linear", r=2)["0"]
    assert same_bits(model(x), before)
    rounding = tol(torch.float32, 1, weight) + tol(torch.float32, 1, 0 if bias is None else bias)
    assert distance(adapter.weight, weight) <= rounding
    assert (adapter.bias is None) == (bias is None)
    assert distance(adapter.delora.w, weight.norm(dim=0)) <= rounding * wide**0.5
    with torch.no_grad():
        adapter.delora.A.normal_()
    adapted = model(x)
    taken = merge(model)
    assert type(model[0]) is nn.Linear and model[0].weight.is_contiguous()
    assert distance(model(x), adapted) <= tol(torch.float32, wide, adapted)
    unmerge(model, taken)
    assert same_bits(model(x), adapted) and not torch.equal(adapted, before)


@ours
def test_the_forward_pass_never_builds_the_update():
    """Forward and backward make no more tensors of W's size than the base layer alone; of x's size,
    none is kept.
    """
    n, tokens = 256, 64
    layer, x = (
        DeLoRALinear(nn.Linear(n, n, bias=False), 4),
        torch.randn(tokens, n, requires_grad=True),
    )

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if torch.is_tensor(t)
            )
            return out

    of_the_size_of_w = []
    for layer.enabled in (False, True):
        sizes = []
        with Sizes():
            layer(x).sum().backward()
        of_the_size_of_w.append(sizes.count(n * n))
    assert of_the_size_of_w[1] == of_the_size_of_w[0] > 0

    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t
    ):
        y = layer(x)
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    kept_for_the_adapter = sum(
        t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known
    )
    assert y.requires_grad and 0 < kept_for_the_adapter < x.nbytes


@ours
def test_the_update_costs_one_array_of_the_size_of_the_output():
    """A product and a sum would make two, and read and write the output once more."""
    tokens, n_in, n_out = 32, 16, 48
    layer, x, made = (
        DeLoRALinear(nn.Linear(n_in, n_out), 2),
        torch.randn(4, tokens // 4, n_in, requires_grad=True),
        [],
    )

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                t for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)
            )
            return out

    arrays = []
    for layer.enabled in (False, True):
        made.clear()
        with Made():
            layer(x)
        arrays.append(
            len({t.untyped_storage().data_ptr() for t in made if t.numel() == tokens * n_out})
        )
    assert arrays == [1, 2]


@ours
def test_the_output_of_the_base_layer_is_left_as_it_is():
    """Hooks keep it, and a selective checkpoint does: whatever is added to it in place they would
    see, or refuse.
    """
    layer, x = DeLoRALinear(nn.Linear(6, 5), 2), torch.randn(3, 6, requires_grad=True)
    layer.delora.A.data.normal_()
    kept, gradients, wanted = [], [], layer.base_layer(x)
    layer.base_layer.register_forward_hook(lambda module, inputs, y: kept.append(y))
    layer.base_layer.register_full_backward_hook(
        lambda module, to_x, to_y: gradients.append(to_y[0])
    )
    y = layer(x)
    y.sum().backward()
    assert same_bits(kept[0], wanted) and not torch.equal(y, wanted)
    assert same_bits(gradients[0], torch.ones(3, 5))

    alone, x.grad = x.grad, None
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)  # which keeps their results
    checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert same_bits(x.grad, alone)


@ours
def test_a_base_layer_that_is_wider_than_autocast_is_not_rounded():
    class Wide(nn.Linear):  # as bitsandbytes' 4-bit layer, which returns the dtype of x
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return F.linear(x, self.weight, self.bias)

    layer, x = DeLoRALinear(Wide(6, 5), 2), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer(x), layer.base_layer(x)) and layer(x).dtype == torch.float32


@ours
@pytest.mark.parametrize("n_out", (1, 63, 64, 65, 200))
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_norms_are_right_whatever_the_number_of_rows(n_out, dtype):
    torch.manual_seed(n_out)
    base = nn.Linear(7, n_out, dtype=torch.float64).to(dtype)
    wanted = torch.stack(
        [base.weight.double()[:, j].square().sum().sqrt() for j in range(7)]
    )  # (in,)
    norms = DeLoRALinear(base, 2).delora.w
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    assert distance(norms, wanted) <= tol(norms.dtype, n_out, wanted)


@ours
def test_shapes_can_be_had_on_the_meta_device():
    layer = DeLoRALinear(nn.Linear(6, 5, device="meta"), 2)
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    assert (
        layer.delora.delta_weight().shape
        == layer.weight.shape
        == layer.merged().weight.shape
        == (5, 6)
    )


# ---------------------------------------------------------------------------- faults of real models


def offloaded(model: nn.Module, name: str) -> nn.Module:
    """As accelerate leaves a layer whose weight is on a disk: on the meta device, with a forward
    that fetches it.
    """
    layer = model.get_submodule(name)
    weight, bias = (
        layer.weight.detach().clone(),
        None if layer.bias is None else layer.bias.detach().clone(),
    )
    layer.to("meta")
    layer.forward = lambda x: F.linear(x, weight, bias)
    return model


@ours
@pytest.mark.parametrize("replaced", (True, False))
def test_a_layer_whose_weight_is_not_here_is_refused_by_name(replaced):
    """Seen: an adapter built on the meta device, with outputs out of uninitialised memory, other
    ones each time.
    """
    torch.manual_seed(0)
    source = Attention()
    inject(source, ["proj", "q_proj"], r=2)
    state = adapter_state_dict(source)
    model = offloaded(Attention(), "proj") if replaced else Attention()
    model.proj.to("meta")
    for call in (
        lambda: inject(model, "all-linear"),
        lambda: inject(model, ["q_proj", "proj"], r=2),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match="^proj.* on the meta device, without values"):
            call()
        assert snapshot(model) == before
    before = snapshot(model)
    with pytest.raises(ValueError, match="^proj.* on the meta device, without values"):
        load_adapter(model, state)
    assert snapshot(model) == before
    assert set(inject(model, "all-linear", exclude=["proj"])) == {
        "q_proj",
        "first",
        "second",
        "head",
    }


@ours
def test_an_adapter_whose_values_are_gone_is_not_saved_merged_or_loaded_into():
    """Seen: a checkpoint full of meta tensors, which torch.save takes: the training is lost."""
    model = Attention()
    inject(model, ["proj", "q_proj"], r=2)
    state = adapter_state_dict(model)
    gone = copy.deepcopy(model)
    gone.proj.delora.to("meta")
    without_w = copy.deepcopy(model)
    without_w.proj.base_layer.to("meta")
    for broken, call, message in (
        (gone, adapter_state_dict, r"^proj\.delora\.A is on the meta device"),
        (gone, merge, "^proj is on the meta device"),
        (gone, lambda m: load_adapter(m, state), r"^proj\.delora\.A is on the meta device"),
        (without_w, merge, "^proj is on the meta device"),
    ):
        before = snapshot(broken)
        with pytest.raises(ValueError, match=message):
            call(broken)
        assert snapshot(broken) == before
    whole = Attention().to("meta")
    with pytest.raises(ValueError, match="meta device"):  # its values would be lost without a word
        load_adapter(whole, state)


@ours
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    "kind", ("weight_norm", "spectral_norm", "prune", "parametrized", "pruned bias")
)
def test_a_weight_that_a_hook_computes_is_measured_right_at_once(kind):
    """After load_state_dict and before any forward, `layer.weight` is still that of the weights
    from before.
    """
    make = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "prune": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.4),
        "pruned bias": lambda layer: nn.utils.prune.random_unstructured(layer, "bias", 0.4),
        "parametrized": nn.utils.parametrizations.weight_norm,
    }[kind]
    torch.manual_seed(0)
    layer, other = make(nn.Linear(6, 4)).eval(), make(nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3.0)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(5, 6)
    adapter = DeLoRALinear(layer, 2)
    wanted, bias = (
        (other(torch.eye(6)) - other(torch.zeros(6))).T.detach(),
        other(torch.zeros(6)).detach(),
    )
    rounding = tol(torch.float32, 6, wanted.abs().max().item() + bias.abs().max().item())
    assert distance(adapter.weight, wanted) <= rounding and distance(adapter.bias, bias) <= rounding
    assert distance(adapter.delora.w, wanted.norm(dim=0)) <= 3 * rounding
    adapter.delora.A.data.normal_()
    assert (
        distance(adapter.merged()(x), adapter(x))
        <= tol(torch.float32, 16, adapter(x)) + 4 * rounding
    )


@ours
def test_sizes_and_ranks_may_be_any_integers():
    """As code that computes them with numpy passes them: np.int64 is no int."""
    np = pytest.importorskip("numpy")
    model = nn.Sequential(nn.Linear(np.prod((2, 3)), np.int64(4)), nn.Linear(4, np.int32(2)))
    assert set(inject(model, "all-linear", r=np.int64(2), lambda_init=np.float32(3))) == {"0", "1"}
    assert model[0].delora.A.shape == (2, 6) and model[0].delora.lam.item() == 3
    unmerge(model, merge(model))
    for r in (np.float64(2), np.bool_(True), np.int64(0)):
        with pytest.raises(ValueError, match="r must be"):
            DeLoRALinear(nn.Linear(2, 2), r)


@ours
def test_the_first_parameters_are_still_the_model_s():
    """Code asks next(model.parameters()).dtype for the dtype of a model; adapters are float32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    before = [id(p) for p in model.parameters()]
    inject(model, ["0"])
    assert next(model.parameters()).dtype == torch.bfloat16
    assert [id(p) for p in model[0].parameters()][:2] == before[:2]
    attention = nn.MultiheadAttention(4, 2, dtype=torch.bfloat16)
    nn.utils.parametrize.register_parametrization(
        attention, "in_proj_weight", DeLoRA(attention.in_proj_weight)
    )
    assert next(attention.parameters()).dtype == torch.bfloat16


@ours
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_adapters_in_16_bits_are_warned_of(dtype):
    """λ = 15 in bfloat16 is 1/16 from its neighbours: steps of 1e-2 change nothing."""
    model = Attention()
    inject(model, ["q_proj"])
    param_groups(model, 1e-2)  # no word: any warning is an error here
    model.to(dtype)
    with pytest.warns(UserWarning, match="cast first, then inject"):
        param_groups(model, 1e-2)
    model = Attention().to(dtype)
    inject(model, ["q_proj"])
    param_groups(model, 1e-2)


@ours
def test_loading_freezes_all_but_the_adapters_whatever_the_file_holds():
    """As Hugging Face's Trainer saves: the whole state_dict of the model, buffers too."""
    torch.manual_seed(0)

    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(8)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    pretrained = Normed()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "second"], r=2)
    model.norm.requires_grad_(True)
    trained(model)
    model.batch_norm.running_mean.fill_(3.0)
    model.batch_norm.num_batches_tracked.fill_(7)
    for state in (model.state_dict(), adapter_state_dict(model)):
        for fresh in (copy.deepcopy(pretrained), copy.deepcopy(model)):
            load_adapter(fresh, state)
            names = {name for name, p in fresh.named_parameters() if p.requires_grad}
            assert names == {
                f"{name}.delora.{leaf}"
                for name in ("q_proj", "first")
                for leaf in ("A", "B", "lam")
            }
            assert same_bits(fresh(TOKENS), model(TOKENS))
            others, strengths = param_groups(fresh, 1e-2)
            assert len(others["params"]) == 4 and len(strengths["params"]) == 2
    load_adapter(pretrained, model.state_dict())
    assert all(
        same_bits(value, model.state_dict()[key]) for key, value in pretrained.state_dict().items()
    )


@ours
@pytest.mark.parametrize("mode", ("column", "frobenius"))
def test_an_adapter_of_another_base_is_warned_of(mode):
    """Its w says what W was: another model, weights that were loaded afterwards, or an update that
    is applied twice.
    """
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "proj"], r=2, weight_norm=mode)
    state = adapter_state_dict(trained(model))
    load_adapter(copy.deepcopy(pretrained), state)  # no word
    load_adapter(copy.deepcopy(pretrained).bfloat16(), state)
    load_adapter(model, state)

    other = copy.deepcopy(pretrained)
    other.proj.weight.data[:, 3] *= 1.2
    other.proj.weight.data *= 1 if mode == "column" else 1.2
    with pytest.warns(
        UserWarning, match=r"^proj: w has norm [\d.]+ in the checkpoint, [\d.]+ here"
    ) as seen:
        load_adapter(other, state)
    assert len(seen) == 1

    late = copy.deepcopy(pretrained)
    for p in late.parameters():
        p.data *= 0.1
    inject(late, ["q_proj", "proj"], r=2, weight_norm=mode)
    real = {
        k.replace("q_proj.", "q_proj.base_layer."): v for k, v in pretrained.state_dict().items()
    }
    late.load_state_dict(
        {k.replace("proj.w", "proj.base_layer.w"): v for k, v in real.items()}, strict=False
    )
    late.proj.base_layer.weight.data.copy_(pretrained.proj.weight)
    with pytest.warns(UserWarning, match="weights were loaded or merged after it was made") as seen:
        load_adapter(copy.deepcopy(pretrained), adapter_state_dict(late))
    assert {str(w.message).partition(":")[0] for w in seen} == {"q_proj", "proj"}

    model.proj.delora.A.data.neg_()
    state = adapter_state_dict(model)
    merge(model)
    with pytest.warns(UserWarning, match="^(q_)?proj: w has norm"):
        load_adapter(model, state)


@ours
def test_a_checkpoint_of_the_whole_model_brings_its_own_base():
    """Then w is compared with the norms of the W that comes along, not of the one it replaces."""
    torch.manual_seed(0)
    model, other = Attention(), Attention()
    other.proj.weight.data *= 3
    inject(model, ["proj"], r=2)
    adapter = load_adapter(other, model.state_dict())["proj"]  # any warning is an error here
    assert same_bits(adapter.base_layer.weight, model.proj.base_layer.weight)


@ours
@pytest.mark.parametrize("mode", ("column", "frobenius", None))
def test_columns_of_equal_norms_are_no_sign_of_another_mode(mode):
    """As in orthogonal and in binary weights."""
    torch.manual_seed(0)
    for weight in (2 * torch.eye(8), 0.02 * torch.randn(8, 8).sign(), torch.full((8, 8), 0.1)):
        pretrained = Attention()
        pretrained.proj.weight.data.copy_(weight)
        model = copy.deepcopy(pretrained)
        inject(model, ["proj"], r=2, weight_norm=mode)
        adapter = load_adapter(pretrained, adapter_state_dict(model))["proj"]  # no word
        assert adapter.delora.weight_norm == mode


@ours
@pytest.mark.parametrize(
    "value", ("text", None, torch.ones(8, 8).numpy(), torch.ones(8, 8).to("meta"))
)
def test_a_head_that_cannot_be_copied_is_refused_before_anything_is(value):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    inject(model, ["body"], r=2)
    state = adapter_state_dict(model) | {"head.weight": value}
    state["body.delora.A"] += 1
    before = snapshot(model)
    with pytest.raises(ValueError, match="^head.weight"):
        load_adapter(model, state)
    assert snapshot(model) == before


@ours
def test_a_load_that_fails_at_the_comparison_changes_nothing():
    """W is not finite any more; or warnings are errors."""
    torch.manual_seed(0)
    model = Attention()
    inject(model, ["q_proj", "proj"], r=2)
    state = adapter_state_dict(trained(copy.deepcopy(model)))
    model.proj.base_layer.weight.data[0, 0] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(model, state)
    assert snapshot(model) == before

    model.proj.base_layer.weight.data.fill_(1)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="^proj: w has norm"):
            load_adapter(model, state)
    assert snapshot(model) == before


@ours
def test_without_weight_norm_there_is_nothing_to_compare_and_codes_may_be_further_off():
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj"], r=2, weight_norm=None)
    state = adapter_state_dict(model)
    pretrained.q_proj.weight.data *= 3
    adapter = load_adapter(pretrained, state)["q_proj"]  # no word
    assert adapter.delora.w.tolist() == [1.0] * 8 and adapter.delora.weight_norm is None

    for scale, said in ((1.1, False), (1.3, True)):
        model, codes = Attention(), Attention()
        codes.load_state_dict(model.state_dict())
        codes.proj.weight.data *= scale
        codes.proj = Int8Linear(codes.proj)
        inject(model, ["proj"], r=2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load_adapter(codes, adapter_state_dict(model))
        assert len(seen) == said


@ours
@pytest.mark.parametrize("mode", ("column", "frobenius"))
def test_a_weight_of_zeros_is_warned_of_and_learns_without_w(mode):
    """A residual branch that starts at zero: with w = 0 it stays there, whatever the optimiser
    does.
    """
    torch.manual_seed(0)
    model = Attention()
    nn.init.zeros_(model.proj.weight)
    with pytest.warns(UserWarning, match="^proj: W is zero.*weight_norm=None") as seen:
        inject(model, ["q_proj", "proj"], r=2, weight_norm=mode)
    assert len(seen) == 1
    model = Attention()
    nn.init.zeros_(model.proj.weight)
    inject(model, ["q_proj", "proj"], r=2, weight_norm=None)  # no word
    trained(model)
    assert model.proj.delora.delta_weight().count_nonzero()


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Picky(nn.Linear):
    def forward(self, x):
        return [][len(x)]


@ours
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Router(8, 8), "^proj: Router is not linear: it returns a tuple"),
        (
            lambda: nn.Linear(8, 8, dtype=torch.complex64),
            r"^proj: torch.complex64, \(8, 8\) is no matrix",
        ),
        (lambda: Picky(8, 8), "^proj: list index out of range"),
        (lambda: nn.Linear(0, 8), r"^proj: torch.float32, \(8, 0\) is no matrix"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_adapted_is_refused_by_name(make, message):
    model = Attention()
    model.proj = make()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        inject(model, "all-linear")
    assert snapshot(model) == before
    inject(model, "all-linear", exclude=["proj"])


@ours
def test_a_model_without_a_linear_layer_is_told_what_it_asked_for():
    for model in (nn.Sequential(nn.Conv2d(1, 1, 1)), nn.ReLU()):
        with pytest.raises(
            ValueError, match="target_modules='all-linear', exclude=.. leave no layer"
        ):
            inject(model, "all-linear")


@ours
def test_a_weight_under_an_adapter_that_is_trainable_is_refused_by_name():
    """Seen: `model.head.requires_grad_(True)`, as for a new head, after "all-linear": W moved
    beside ΔW.
    """
    model = Attention()
    inject(model, "all-linear")
    model.norm.requires_grad_(True)
    model.first.base_layer.bias.requires_grad_(True)  # that is no weight
    param_groups(model, 1e-2)
    for change in (
        lambda m: m.head.requires_grad_(True),
        lambda m: m.embed.requires_grad_(True),
    ):  # they are tied
        changed = copy.deepcopy(model)
        change(changed)
        with pytest.raises(
            ValueError, match=r"^head: base_layer.weight is trainable.*exclude=\['head'\]"
        ):
            param_groups(changed, 1e-2)
    with pytest.raises(ValueError, match="is trainable, and W would move beside ΔW"):
        param_groups(model.requires_grad_(True), 1e-2)
    attention = nn.MultiheadAttention(4, 2)
    nn.utils.parametrize.register_parametrization(
        attention, "in_proj_weight", DeLoRA(attention.in_proj_weight)
    )
    with pytest.raises(ValueError, match="^parametrizations.in_proj_weight: original is trainable"):
        param_groups(attention, 1e-2)


MERGE_AND_WATCH = """
import resource
from pathlib import Path

import delora
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16))
delora.inject(model, ["0"], r=4)
now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
delora.merge(model)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((peak - now) / model[0].weight.nbytes)
"""


@ours
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux has it")
def test_merging_a_narrow_layer_takes_at_most_four_times_its_weight_for_a_moment():
    """In a second process: ΔW in float32, W in float32 to add it, and some MiB of torch's own."""
    folder = Path(delora.__file__).parent
    command = [sys.executable, "-c", MERGE_AND_WATCH]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 1 < float(run.stdout) < 4.2, run.stdout


# --------------------------------------------------------------------------------- parametrizations


class Zoo(nn.Module):
    """An embedding, a convolution and the packed projection of an attention: weights that no layer
    can be put around.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def parametrized(model: Zoo, **options) -> Zoo:
    model.requires_grad_(False)
    for name, leaf in (("embed", "weight"), ("conv", "weight"), ("attention", "in_proj_weight")):
        module = model.get_submodule(name)
        delora = DeLoRA(getattr(module, leaf), r=2, **options)
        nn.utils.parametrize.register_parametrization(module, leaf, delora)
    return model


@ours
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("tied", (True, False))
def test_any_weight_is_adapted_by_a_parametrization(tied, dtype):
    """P1, P2, P8 and P10 where DeLoRA computes the weight of a module: start, bound, checkpoint,
    merge.
    """
    torch.manual_seed(0)
    pretrained = Zoo().to(dtype)
    model, start = copy.deepcopy(pretrained), pretrained(TOKENS)
    parametrized(model, tie_lambda=tied)
    assert same_bits(model(TOKENS), start)
    inject(model, ["head"], r=3)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten().flip(0)).backward()
        optimizer.step()
    deloras = [m for m in model.modules() if isinstance(m, DeLoRA)]
    assert len(deloras) == 4 and all(
        m.A.grad.count_nonzero() and m.lam.item() != 15 for m in deloras
    )
    for delora in deloras:
        bound = delora.norm_bound()
        assert max(norms(delora.delta_weight())) <= bound + tol(torch.float32, 16 + 24 + 4, bound)
    assert model.conv.weight.shape == (8, 8, 3) and model.conv.weight.dtype == dtype

    state = through_a_file(adapter_state_dict(model))
    names = {"embed.parametrizations.weight.0", "conv.parametrizations.weight.0", "head.delora"}
    assert {key.rpartition(".")[0] for key in state} == names | {
        "attention.parametrizations.in_proj_weight.0"
    }
    fresh = copy.deepcopy(pretrained)
    with pytest.raises(ValueError, match="a parametrization is registered first"):
        load_adapter(fresh, state)
    assert set(load_adapter(parametrized(fresh, tie_lambda=tied), state)) == {"head"}
    assert same_bits(fresh(TOKENS), model(TOKENS))

    adapted = model(TOKENS)
    merge(model)
    for name, leaf in (("embed", "weight"), ("conv", "weight"), ("attention", "in_proj_weight")):
        nn.utils.parametrize.remove_parametrizations(
            model.get_submodule(name), leaf, leave_parametrized=True
        )
    assert not any(isinstance(m, (DeLoRA, DeLoRALinear)) for m in model.modules())
    assert type(model.conv) is nn.Conv1d and model.conv.weight.dtype == dtype
    assert distance(model(TOKENS), adapted) <= tol(dtype, 8, adapted)


@ours
def test_a_linear_layer_that_is_adapted_by_a_parametrization_is_not_adapted_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", DeLoRA(model[0].weight))
    with pytest.raises(TypeError, match="^0: ParametrizedLinear is adapted already"):
        inject(model, ["0"])
    assert set(inject(model, "all-linear")) == {"1"}
    for call in (merge, lambda m: disabled(m).__enter__()):
        with pytest.raises(ValueError, match="there is no adapter here"):
            call(nn.Sequential(model[0]))


@ours
@pytest.mark.parametrize("mode", MODES)
def test_print_shows_rank_strength_and_mode(mode):
    model = Attention()
    inject(model, ["q_proj"], r=3, lambda_init=4.5, weight_norm=mode, tie_lambda=False)
    assert f"(delora): DeLoRA(r=3, lam=tensor([4.5000]), w={mode}, tied=False)" in str(model)
    fresh = Attention()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another base: only what is printed is looked at
        load_adapter(fresh, adapter_state_dict(model))
    assert f"w={mode}, tied=False" in str(fresh)
    assert "r=3" in str(model.to("meta"))


@ours
def test_an_adapter_is_taken_out_by_its_base_layer_and_hooks_on_that_are_not_merged():
    model = Attention()
    before = model(TOKENS)
    inject(model, ["q_proj"], r=2)
    trained(model)
    hooked = copy.deepcopy(model)
    hooked.q_proj.base_layer.register_forward_hook(lambda layer, x, y: 2 * y)
    adapted = hooked(TOKENS)
    merge(hooked)
    assert distance(hooked(TOKENS), adapted) > 100 * tol(torch.float32, 8, adapted)
    model.q_proj = model.q_proj.base_layer
    assert same_bits(model(TOKENS), before)


# ------------------------------------------------------------------------------------- param_groups


@ours
def test_lambda_has_its_own_learning_rate_and_no_weight_decay():
    model = Attention()
    adapters = inject(model, ["q_proj", "first"])
    model.norm.requires_grad_(True)
    rest, strengths = param_groups(model, 1e-2, lambda_lr=0.0, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"], strengths["lr"], strengths["weight_decay"]) == (
        1e-2,
        0.1,
        0.0,
        0.0,
    )
    assert {id(p) for p in strengths["params"]} == {id(a.delora.lam) for a in adapters.values()}
    everything = [id(p) for p in rest["params"] + strengths["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    adapters["first"].delora.lam.requires_grad_(False)
    rest, strengths = param_groups(model, 1e-2)
    assert rest["weight_decay"] == 0.0 and strengths["lr"] == 1e-2
    assert [id(p) for p in strengths["params"]] == [id(adapters["q_proj"].delora.lam)]


@ours
def test_what_needs_adapters_says_so_when_there_are_none():
    for call in (
        merge,
        adapter_state_dict,
        lambda m: param_groups(m, 1e-3),
        lambda m: disabled(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="there is no adapter here"):
            call(Attention())


# ------------------------------------------------------------------------- what the docstrings say


@ours
@pytest.mark.parametrize("mode", ["column", "frobenius"])
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


@ours
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradients_at_the_start(tied):
    """λ G Âᵀ for B̂ and λ B̂₀ᵀ G for Â, where G = ∂L/∂ΔW · diag(w) / r; none for λ, if tied."""
    torch.manual_seed(0)
    weight, slope = torch.randn(2, 5, 7, dtype=torch.float64)  # L = Σ slope · ΔW
    adapter = DeLoRA(weight, r=3, tie_lambda=tied)
    (adapter.delta_weight() * slope).sum().backward()
    G = slope * adapter.w / 3  # (out, in)
    with torch.no_grad():
        A_hat = adapter.A / adapter.A.norm(dim=1, keepdim=True)
        B_hat = adapter.B / adapter.B.norm(dim=0, keepdim=True)
        of_A = adapter.lam * B_hat.T @ G
        of_B = adapter.lam * G @ A_hat.T
        # The gradient of a_i is that of â_i, without its part along â_i, over ‖a_i‖.
        of_A = (of_A - (of_A * A_hat).sum(1, keepdim=True) * A_hat) / adapter.A.norm(dim=1)[:, None]
        of_B = (of_B - (of_B * B_hat).sum(0, keepdim=True) * B_hat) / adapter.B.norm(dim=0)
    torch.testing.assert_close(adapter.A.grad, of_A)
    torch.testing.assert_close(adapter.B.grad, of_B)
    assert (adapter.lam.grad == 0) == tied


@ours
@pytest.mark.parametrize("r", [1, 8])
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


@ours
@pytest.mark.parametrize("tied", (True, False))
def test_orthogonal_components_reach_the_bound_in_the_nuclear_norm(tied):
    """And in the Frobenius norm they do not: there are 2r singular values of |λ| / r."""
    r, strength = 3, -2.0
    adapter = DeLoRA(torch.zeros(7, 6), r, 0.5, weight_norm=None, tie_lambda=tied)
    adapter.lam.data.fill_(strength)
    adapter.A.data, adapter.A0.data = 5 * torch.eye(6).split(r)[0], torch.eye(6).split(r)[1]
    adapter.B.data, adapter.B0.data = torch.eye(7)[:, :r], torch.eye(7)[:, 3 : 3 + r]
    frobenius, nuclear = norms(adapter.delta_weight())
    bound = 2 * abs(strength) if tied else abs(strength) + 0.5
    assert abs(nuclear - bound) <= tol(torch.float32, r, bound)
    assert frobenius < bound / 2


@ours
def test_at_the_start_lambda_has_a_gradient_if_it_is_untied():
    torch.manual_seed(0)
    for tied in (True, False):
        adapter = DeLoRA(torch.randn(5, 6), r=2, weight_norm=None, tie_lambda=tied)
        upstream = torch.randn(5, 6)
        (adapter.delta_weight() * upstream).sum().backward()
        A_hat = adapter.A / adapter.A.norm(dim=1, keepdim=True)
        B_hat = adapter.B / adapter.B.norm(dim=0, keepdim=True)
        wanted = torch.zeros(1) if tied else (upstream / 2 * (B_hat @ A_hat)).sum().view(1)
        assert distance(adapter.lam.grad, wanted) <= tol(torch.float32, 30) * (not tied)


@ours
def test_equal_terms_do_not_cancel_in_one_product():
    """Why the factors are subtracted: [B̂, −B̂₀] · [Â; Â₀] is not zero at the start."""
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(64, 768), r=8)
    A_hat = adapter.A / adapter.A.norm(dim=1, keepdim=True)  # and Â₀ is the same
    B_hat = adapter.B / adapter.B.norm(dim=0, keepdim=True)
    naive = torch.cat((B_hat, -B_hat), dim=1) @ torch.cat((A_hat, A_hat))
    assert 0 < naive.abs().max() < 1e-6
    assert adapter.delta_weight().abs().max() == 0


@ours
def test_steps_of_sgd_lengthen_the_components_and_weight_decay_keeps_them_short():
    """Longer ones turn less by the same step; the update does not see the lengths."""
    turned, length = {}, {}
    for decay in (0.0, 0.2):
        torch.manual_seed(0)
        adapter = DeLoRA(torch.randn(8, 8), r=1, weight_norm=None, lambda_init=1.0)
        optimizer = torch.optim.SGD(param_groups(nn.Sequential(adapter), 0.5, 0.0, decay))
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
    assert length[0.2] < length[0.0] and turned[0.2] > turned[0.0]


@ours
def test_a_module_of_ones_own_may_train_what_stands_beside_a_delora():
    """Which of its parameters W is, only its author knows."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(6, 6), requires_grad=False)
            self.adapter = DeLoRA(self.W, r=2)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x @ self.adapter(self.W).T)

    model = Own()
    others, strengths = param_groups(model, lr=0.1, lambda_lr=0.2)
    wanted = {model.adapter.A, model.adapter.B, *model.head.parameters()}
    assert set(others["params"]) == wanted and strengths["params"] == [model.adapter.lam]


@ours
def test_norms_that_overflow_are_refused_in_every_mode():
    for mode in ("column", "frobenius", None):
        with pytest.raises(ValueError, match="not finite, or its norms are not"):
            DeLoRA(torch.full((1, 4), 3e38), weight_norm=mode)


@ours
def test_the_defaults_are_those_of_the_docstring():
    adapter = DeLoRA(torch.ones(3, 4))
    assert adapter.A.shape == (8, 4) and adapter.lam.item() == 15 and adapter.lam0 is None


@ours
def test_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match="no matrix"):
        DeLoRA(torch.ones(3))


@ours
def test_an_embedding_with_an_attribute_of_conv1d_is_no_linear_layer():
    embedding = nn.Embedding(5, 3)
    embedding.nf = 3
    with pytest.raises(TypeError, match="no linear layer"):
        DeLoRALinear(embedding)


@ours
def test_a_forward_that_was_put_on_one_layer_decides_what_its_weight_is():
    """As offloading and other tools do, without a class of their own."""
    torch.manual_seed(0)
    base = nn.Linear(4, 3)
    base.forward = lambda x: F.linear(x, 2 * base.weight, base.bias)
    wanted = 2 * base.weight
    rounding = tol(torch.float32, 1, wanted) + tol(torch.float32, 1, base.bias)
    assert distance(DeLoRALinear(base, 2).weight, wanted) <= rounding


@ours
def test_a_parametrized_weight_is_read_and_not_measured():
    """Measured beside so large a bias, the weight would lose half of its digits."""
    torch.manual_seed(0)
    base = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    base.bias.data.fill_(1e7)
    assert same_bits(DeLoRALinear(base, 2).weight, base.weight)


@ours
def test_one_output_that_is_not_linear_is_found_beside_large_ones():
    class Half(nn.Linear):
        def forward(self, x):
            y = super().forward(x)  # (..., out)
            return torch.cat((y[..., :1].abs(), y[..., 1:]), dim=-1)

    base = Half(4, 3, bias=False)
    base.weight.data[0] = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    base.weight.data[1:] = 1e3
    with pytest.raises(TypeError, match="not linear"):
        DeLoRALinear(base, 2)


@ours
def test_what_is_saved_hangs_on_no_graph():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], r=2)
    assert not any(tensor.requires_grad for tensor in adapter_state_dict(model).values())


@ours
def test_a_module_with_a_state_that_is_no_tensor_may_stand_beside_the_adapter():
    class Counter(nn.Identity):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 3), Counter())
    fresh = copy.deepcopy(model)
    inject(model, ["0"], r=2)["0"].delora.A.data.normal_()
    load_adapter(fresh, adapter_state_dict(model))
    x = torch.randn(2, 4)
    assert same_bits(fresh(x), model(x))


@ours
def test_two_names_of_one_adapter_may_be_in_a_file_in_two_precisions():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    model = nn.ModuleDict({"first": layer, "second": layer})
    inject(model, ["first", "second"], r=2)
    state = adapter_state_dict(model)
    wide = {key: value for key, value in state.items() if key.startswith("first")}
    narrow = {key.replace("first", "second"): value.float() for key, value in wide.items()}
    load_adapter(model, wide | narrow)
    assert same_bits(model["second"].delora.A, state["first.delora.A"])


@ours
def test_an_adapter_of_one_column_loads():
    model = nn.Sequential(nn.Linear(1, 3))
    fresh = copy.deepcopy(model)
    inject(model, ["0"], r=2)["0"].delora.A.data.normal_()
    load_adapter(fresh, adapter_state_dict(model))
    x = torch.randn(2, 1)
    assert same_bits(fresh(x), model(x))


@ours
def test_an_adapter_of_zeros_is_no_adapter_of_another_base():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data.zero_()
    fresh = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="W is zero"):
        inject(model, ["0"], r=2)
    adapters = load_adapter(fresh, adapter_state_dict(model))  # any warning is an error here
    assert adapters["0"].delora.norm_bound() == 0


@ours
def test_how_far_w_may_be_off_is_a_share_of_the_mean_norm():
    """A twentieth: 7 % of a large column are too much, all of a tiny one is not."""
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight.data.copy_(torch.tensor([1.0, 1.1, 1e-3]).expand(4, 3))
    large, tiny = copy.deepcopy(model), copy.deepcopy(model)
    inject(model, ["0"], r=2)
    tiny[0].weight.data[:, 2] *= 2
    load_adapter(tiny, adapter_state_dict(model))  # any warning is an error here
    large[0].weight.data[:, 0] *= 1.07
    with pytest.warns(UserWarning, match="w has norm"):
        load_adapter(large, adapter_state_dict(model))


@ours
def test_the_public_names_are_those_of_the_module():
    public = [
        name
        for name, value in vars(delora).items()
        if getattr(value, "__module__", None) == delora.__name__ and not name.startswith("_")
    ]
    assert public == [
        "DeLoRA",
        "DeLoRALinear",
        "inject",
        "merge",
        "unmerge",
        "disabled",
        "param_groups",
        "adapter_state_dict",
        "load_adapter",
    ]
    assert all(getattr(delora, name).__doc__ for name in public)
