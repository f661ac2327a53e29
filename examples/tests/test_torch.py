"""delora.py in torch's own modes: compile, export, checkpointing, the fused encoder, memory.

    pytest examples/tests/test_torch.py    needs torch alone, and g++ for torch.compile

Several processes are in test_distributed.py, other packages in test_hosts.py.
"""

import copy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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
)
from test_delora import (
    TOKENS,
    Attention,
    distance,
    same_bits,
    snapshot,
    through_a_file,
    tol,
    trained,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------
# Compile and export
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("n_in", "n_out", "r", "tied"),
    [
        # Seen, with two threads: the norms of B and B₀, computed apart, were summed in two orders.
        (128, 512, 2, True),
        (48, 40, 2, True),
        (48, 40, 4, False),
    ],
)
def test_the_zero_start_survives_compilation(n_in, n_out, r, tied):
    """ΔW = 0 bit for bit in a fused graph; later compiled and eager gradients agree (Eq. 9)."""
    torch.manual_seed(0)
    base = nn.Linear(n_in, n_out)
    layer = DeLoRALinear(base, r, tie_lambda=tied)
    x = torch.randn(8, n_in)
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
    wanted = layer.delora.B.grad
    assert distance(found, wanted) <= tol(torch.float32, n_in, wanted)
    assert layer.delora.A.grad[0].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")
def test_a_model_whose_layers_are_read_and_not_called_can_be_exported():
    """torch.export follows `layer.weight` = W + ΔW."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    for adapter in inject(encoder, ["linear1", "linear2", "out_proj"], r=2).values():
        adapter.delora.A.data.normal_()
    exported = torch.export.export(encoder, (x,)).module()
    wanted = encoder(x)
    assert distance(exported(x), wanted) <= tol(torch.float32, 32, wanted)


# ------------------------------------------------------------------------------------------------
# The fused encoder, which reads weights and calls no layer
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_zero_start_survives_the_fused_encoder_layer(dtype):
    """ΔW = 0 bit for bit in the fast path of nn.TransformerEncoderLayer (Eq. 9)."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=dtype).eval()
    x = torch.randn(2, 5, 16, dtype=dtype)
    with torch.no_grad():
        before = encoder(x)
        inject(encoder, ["linear1", "linear2", "out_proj"], r=4)
        assert same_bits(encoder(x), before)


def test_an_injected_encoder_trains_alike_in_its_fused_and_its_slow_path():
    """The fast path of nn.TransformerEncoderLayer and of nn.MultiheadAttention follow training."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    adapters = inject(encoder, ["linear1", "linear2", "self_attn.out_proj"], r=4)
    optimizer = torch.optim.SGD(param_groups(encoder, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        encoder(x).square()[..., 0].sum().backward()
        for name, adapter in adapters.items():
            assert adapter.delora.A.grad.abs().sum() > 0, name
            assert adapter.delora.B.grad.abs().sum() > 0, name
        optimizer.step()
    slow = encoder(x)
    encoder.eval()
    with torch.no_grad():
        fused = encoder(x)
        with disabled(encoder):
            base = encoder(x)
    rounding = tol(torch.float32, 4 * 32, slow)  # four products in a row, sums of up to 32
    assert distance(fused, slow) <= rounding < distance(fused, base)


# ------------------------------------------------------------------------------------------------
# Memory: what a forward pass, a backward pass and a merge make and keep
# ------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """A context that holds every tensor that an operation returns in it."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else [out]
        self.tensors += [result for result in results if torch.is_tensor(result)]
        return out


def test_the_forward_pass_never_builds_the_update():
    """Forward and backward make no more tensors of W's size than the base layer alone does.

    Of x's size, none is kept for the backward pass.
    """
    n, tokens = 256, 64
    layer = DeLoRALinear(nn.Linear(n, n, bias=False), 4)
    x = torch.randn(tokens, n, requires_grad=True)
    of_the_size_of_w = []
    for enabled in (False, True):
        layer.enabled = enabled
        with Made() as made:
            layer(x).sum().backward()
        sizes = [tensor.numel() for tensor in made.tensors]
        of_the_size_of_w.append(sizes.count(n * n))
    without, with_adapter = of_the_size_of_w
    assert with_adapter == without > 0

    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    known = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    for_the_adapter = 0
    for pointer, tensor in kept.items():
        if pointer not in known:
            for_the_adapter += tensor.untyped_storage().nbytes()
    assert 0 < for_the_adapter < x.nbytes


def test_the_update_costs_one_array_of_the_size_of_the_output():
    """A product and a sum would make two, and read and write the output once more."""
    tokens, n_in, n_out = 32, 16, 48
    layer = DeLoRALinear(nn.Linear(n_in, n_out), 2)
    x = torch.randn(4, tokens // 4, n_in, requires_grad=True)
    arrays = []
    for enabled in (False, True):
        layer.enabled = enabled
        with Made() as made:
            layer(x)
        of_the_size_of_y = [t for t in made.tensors if t.numel() == tokens * n_out]
        arrays.append(len({t.untyped_storage().data_ptr() for t in of_the_size_of_y}))
    assert arrays == [1, 2]


def test_the_output_of_the_base_layer_is_left_as_it_is():
    """Hooks keep it. What is added to it in place they would see."""
    torch.manual_seed(0)
    layer = DeLoRALinear(nn.Linear(6, 5), 2)
    layer.delora.A.data.normal_()
    x = torch.randn(3, 6, requires_grad=True)
    wanted = layer.base_layer(x)
    outputs = []
    gradients = []

    def keep_output(module, inputs, y):
        outputs.append(y)

    def keep_gradient(module, to_inputs, to_outputs):
        gradients.append(to_outputs[0])

    layer.base_layer.register_forward_hook(keep_output)
    layer.base_layer.register_full_backward_hook(keep_gradient)
    y = layer(x)
    y.sum().backward()
    assert same_bits(outputs[0], wanted)
    assert not torch.equal(y, wanted)
    assert same_bits(gradients[0], torch.ones(3, 5))


def test_a_selective_checkpoint_may_keep_the_output_of_the_base_layer():
    """It would refuse to use a result that was written to."""
    name = "create_selective_checkpoint_contexts"
    create_contexts = getattr(torch.utils.checkpoint, name, None)
    if create_contexts is None:
        pytest.skip(f"this torch has no torch.utils.checkpoint.{name}")
    torch.manual_seed(0)
    layer = DeLoRALinear(nn.Linear(6, 5), 2)
    layer.delora.A.data.normal_()
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    wanted = x.grad
    x.grad = None
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_contexts, products)  # which keeps their results
    checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert same_bits(x.grad, wanted)


MERGE_AND_WATCH = """
import resource
from pathlib import Path

import delora
import torch
from torch import nn


def adapted(n):
    model = nn.Sequential(nn.Linear(n, n, bias=False, dtype=torch.bfloat16))
    delora.inject(model, ["0"], r=4)
    return model


delora.merge(adapted(512))  # so that torch loads now what it needs for it
model = adapted(8192)
now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
delora.merge(model)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((peak - now) / model[0].weight.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux has it")
def test_merging_a_narrow_layer_takes_at_most_four_times_its_weight_for_a_moment():
    """ΔW in float32, and W in float32 to add it. It is measured in a process of its own."""
    folder = Path(delora.__file__).parent
    command = [sys.executable, "-c", MERGE_AND_WATCH]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 1 < float(run.stdout) < 4.2, run.stdout


# ------------------------------------------------------------------------------------------------
# The meta device
# ------------------------------------------------------------------------------------------------


def test_shapes_can_be_had_on_the_meta_device():
    layer = DeLoRALinear(nn.Linear(6, 5, device="meta"), 2)
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    assert layer.delora.delta_weight().shape == (5, 6)
    assert layer.weight.shape == (5, 6)
    assert layer.merged().weight.shape == (5, 6)


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


# ------------------------------------------------------------------------------------------------
# FSDP2, as far as one process can see it (two: test_distributed.py)
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """This process as a group of its own: enough for tensors to be sharded, without a second."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_refused_by_name_wherever_it_must_be_whole(process_group):
    """And what a single process can see of it otherwise: it prints, and it has a bound."""
    from torch.distributed import fsdp

    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("torch.distributed.fsdp.fully_shard came with torch 2.6")
    torch.manual_seed(0)
    pretrained = Attention()
    del pretrained.second  # each weight has one name here
    del pretrained.head
    pretrained.forward = None
    model = copy.deepcopy(pretrained)
    plain = copy.deepcopy(pretrained)
    whole = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "proj"], r=2, tie_lambda=False)
    state = adapter_state_dict(model)
    bound = model.proj.delora.norm_bound()
    fsdp.fully_shard(model)
    fsdp.fully_shard(plain)
    assert "lam" in repr(model)
    assert model.proj.delora.norm_bound() == bound

    parameters = dict(model.named_parameters())
    parts = {key: parameters[key] for key in state}  # as they come, sharded
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
        before = [snapshot(each) for each in (model, plain, whole)]
        with pytest.raises(TypeError, match=message):
            call()
        assert [snapshot(each) for each in (model, plain, whole)] == before, message


# ------------------------------------------------------------------------------------------------
# torch's parametrizations
# ------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Weights that no layer can be put around.

    They are those of an embedding, of a convolution, and of the packed projection of an attention.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.embed(tokens)  # (batch, time, 8)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + attended)  # (batch, time, 16)


WEIGHTS_OF_THE_ZOO = (("embed", "weight"), ("conv", "weight"), ("attention", "in_proj_weight"))


def parametrized(model, **options):
    """The same Zoo, all of it frozen, with a DeLoRA on each of those weights."""
    model.requires_grad_(False)
    for name, leaf in WEIGHTS_OF_THE_ZOO:
        module = model.get_submodule(name)
        adapter = DeLoRA(getattr(module, leaf), r=2, **options)
        nn.utils.parametrize.register_parametrization(module, leaf, adapter)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("tied", (True, False))
def test_any_weight_is_adapted_by_a_parametrization(tied, dtype):
    """Start, bound, checkpoint and merge where DeLoRA computes the weight of a module."""
    torch.manual_seed(0)
    pretrained = Zoo().to(dtype)
    model = copy.deepcopy(pretrained)
    start = pretrained(TOKENS)
    parametrized(model, tie_lambda=tied)
    assert same_bits(model(TOKENS), start)

    inject(model, ["head"], r=3)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05))
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(TOKENS).flatten(0, 1).float()
        F.cross_entropy(logits, TOKENS.flatten().flip(0)).backward()
        optimizer.step()
    deloras = [module for module in model.modules() if isinstance(module, DeLoRA)]
    assert len(deloras) == 4
    for part in deloras:
        assert part.A.grad.count_nonzero()
        assert part.lam.item() != 15
        # The nuclear norm, which the Frobenius norm never exceeds.
        nuclear = torch.linalg.svdvals(part.delta_weight().detach().double()).sum().item()
        bound = part.norm_bound()
        assert nuclear <= bound + tol(torch.float32, 16 + 24 + 4, bound)
    assert model.conv.weight.shape == (8, 8, 3)
    assert model.conv.weight.dtype == dtype

    state = through_a_file(adapter_state_dict(model))
    names = {"head.delora"}
    for name, leaf in WEIGHTS_OF_THE_ZOO:
        names.add(f"{name}.parametrizations.{leaf}.0")
    assert {key.rpartition(".")[0] for key in state} == names
    fresh = copy.deepcopy(pretrained)
    with pytest.raises(ValueError, match="a parametrization is registered first"):
        load_adapter(fresh, state)
    parametrized(fresh, tie_lambda=tied)
    assert set(load_adapter(fresh, state)) == {"head"}
    assert same_bits(fresh(TOKENS), model(TOKENS))

    adapted = model(TOKENS)
    merge(model)
    for name, leaf in WEIGHTS_OF_THE_ZOO:
        module = model.get_submodule(name)
        nn.utils.parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
    assert not any(isinstance(module, (DeLoRA, DeLoRALinear)) for module in model.modules())
    assert type(model.conv) is nn.Conv1d
    assert model.conv.weight.dtype == dtype
    assert distance(model(TOKENS), adapted) <= tol(dtype, 8, adapted)


def test_a_linear_layer_that_is_adapted_by_a_parametrization_is_not_adapted_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = model[0]
    nn.utils.parametrize.register_parametrization(first, "weight", DeLoRA(first.weight))
    with pytest.raises(TypeError, match="^0: ParametrizedLinear is adapted already"):
        inject(model, ["0"])
    assert set(inject(model, "all-linear")) == {"1"}

    alone = nn.Sequential(first)
    with pytest.raises(ValueError, match="there is no adapter here"):
        merge(alone)
    with pytest.raises(ValueError, match="there is no adapter here"), disabled(alone):
        pass


def test_a_trainable_weight_under_a_parametrization_is_refused_by_name():
    attention = nn.MultiheadAttention(4, 2)
    parametrization = DeLoRA(attention.in_proj_weight)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", parametrization)
    with pytest.raises(ValueError, match="^parametrizations.in_proj_weight: original is trainable"):
        param_groups(attention, 1e-2)
    attention.requires_grad_(False)
    for p in (parametrization.A, parametrization.B, parametrization.lam):
        p.requires_grad_(True)
    assert param_groups(attention, 1e-2)[1]["params"] == [parametrization.lam]
