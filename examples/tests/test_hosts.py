"""delora.py where its users are: Hugging Face's models, quantised layers, PyTorch's modes.

    pytest examples/tests/test_hosts.py    what needs a package that is missing is skipped by name

Nothing is downloaded: models are made from small configurations, and trained for a few steps on
real text. Several processes are in test_distributed.py, PEFT's checkpoints in test_peft.py.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil

import common
import pytest
import torch
from torch import Tensor, nn

from delora import (
    DeLoRALinear,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    param_groups,
    unmerge,
)
from test_delora import distance, nuclear_norm, same_bits, snapshot, tol

pytestmark = pytest.mark.filterwarnings(
    "default"
)  # what other packages warn of is not what is tested
os.environ.update(HF_HUB_OFFLINE="1", BITSANDBYTES_NOWELCOME="1")

TEXT = common.english()["train"][:4096].long() % 128  # (bytes,), of ASCII
TOKENS = TEXT[:24].view(2, 12)  # (batch, time)


# ------------------------------------------------------------------------------------------ helpers


def steps(model: nn.Module, loss, count: int = 3, lr: float = 1e-2) -> dict[str, Tensor]:
    """Steps of AdamW. Returns the gradients of the last one, by name."""
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moved(model: nn.Module) -> dict[str, DeLoRALinear]:
    """The adapters, after a turn of all their components."""
    adapters = {
        name: module for name, module in model.named_modules() if isinstance(module, DeLoRALinear)
    }
    torch.manual_seed(1)
    for adapter in adapters.values():
        adapter.delora.A.data.normal_()
    return adapters


def depth(model: nn.Module) -> int:
    """The roundings in a row from the first layer to the last: the terms of the sums of every
    linear layer.
    """
    weights = [getattr(module, "weight", None) for module in model.modules()]
    return sum(weight.shape[-1] for weight in weights if isinstance(weight, Tensor))


# ------------------------------------------------------------------------------------- Hugging Face


def hugging_face(kind: str, **changes) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of that kind without dropout, and its input with labels."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 128}
    calm = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    if kind == "GPT-2":
        config = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
        } | ends
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**config | changes)
        ).eval(), inputs
    if kind == "Llama":
        config = small | ends | {"num_key_value_heads": 2, "initializer_range": 0.2}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config | changes)
        ).eval(), inputs
    if kind == "T5":
        config = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        } | ends
        config |= {"decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**config | changes)
        ).eval(), inputs
    if kind == "BERT":
        config = small | ends | calm
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**config | changes)
        )
        return model.eval(), {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    config = small | calm | {"image_size": 16, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config | changes))
    pixels = TEXT[: 2 * 3 * 16 * 16].view(2, 3, 16, 16) / 64 - 1  # (batch, channel, height, width)
    return model.eval(), {"pixel_values": pixels.to(model.dtype), "labels": torch.tensor([0, 1])}


KINDS = ("GPT-2", "Llama", "T5", "BERT", "ViT")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_model_starts_equal_trains_every_adapter_and_merges(kind, tmp_path):
    """GPT-2 has Conv1D; T5 reads wo.weight.dtype in forward; Llama's heads share keys; BERT and ViT
    have a pooler.
    """
    model, inputs = hugging_face(kind)
    pretrained = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs).logits
    adapters = inject(model, "all-linear", r=2)
    linear = {
        name
        for name, module in pretrained.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    assert set(adapters) == linear and len(adapters) > 8
    with torch.no_grad():
        assert same_bits(model(**inputs).logits, before)
    found = steps(model.train(), lambda: model(**inputs).loss)
    for name in adapters:
        for leaf in ("A", "B", "lam"):
            gradient = found[f"{name}.delora.{leaf}"]
            assert gradient.isfinite().all() and gradient.count_nonzero(), (name, leaf)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    with torch.no_grad():
        adapted = model(**inputs).logits
        torch.save(adapter_state_dict(model), tmp_path / "adapter.pt")
        load_adapter(pretrained, torch.load(tmp_path / "adapter.pt", weights_only=True))
        assert same_bits(pretrained(**inputs).logits, adapted)
        taken = merge(model)
        merged, rounding = model(**inputs).logits, tol(torch.float32, depth(model), adapted)
        assert distance(merged, adapted) <= rounding < distance(adapted, before)
        unmerge(model, taken)
        assert same_bits(model(**inputs).logits, adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_model_in_bfloat16_starts_equal_and_keeps_its_dtype(kind):
    model, inputs = hugging_face(kind)
    model.bfloat16()
    inputs = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    model.requires_grad_(
        False
    )  # as inject will: PyTorch has other kernels for attention where T5's biases are trained
    before = model(**inputs).logits
    inject(model, "all-linear", r=2)
    assert same_bits(model(**inputs).logits, before)
    found = steps(model, lambda: model(**inputs).loss)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert (
        not same_bits(model(**inputs).logits, before)
        and model(**inputs).logits.dtype == torch.bfloat16
    )
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", (True, False))
def test_a_merged_hugging_face_model_is_saved_and_loaded_as_any_other(tied, tmp_path):
    """Also where the head was tied to the embedding: merged, it is no longer, and the folder has
    both.
    """
    model, inputs = hugging_face("Llama", tie_word_embeddings=tied)
    inject(model, "all-linear", r=2)
    moved(model)
    merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert same_bits(again(**inputs).logits, model(**inputs).logits)


def test_a_merged_gpt2_is_no_checkpoint_for_a_gpt2_with_conv1d(tmp_path):
    """As the README warns: the merged layers are nn.Linear, whose weight is the transpose of
    Conv1D's.
    """
    model, inputs = hugging_face("GPT-2")
    inject(model, ["mlp.c_fc"], r=2)
    merge(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)


def test_generation_with_a_cache_follows_the_adapter():
    model, _ = hugging_face("Llama")
    inject(model, "all-linear", exclude=["lm_head"], r=2)
    moved(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    adapted, slow = (model.generate(TOKENS, **options, use_cache=cache) for cache in (True, False))
    with disabled(model):
        base = model.generate(TOKENS, **options)
    assert torch.equal(adapted, slow) and not torch.equal(adapted, base)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing_in_a_hugging_face_model_changes_no_gradient(reentrant):
    model, inputs = hugging_face("Llama")
    inject(model, "all-linear", r=2)
    moved(model)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # what a reentrant checkpoint needs where the embedding is frozen
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )
    assert all(same_bits(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def trainer_on(model, folder, **changes):
    """Hugging Face's Trainer with the two groups of param_groups."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), **(options | changes))
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    return trainer, optimizer


def test_a_checkpoint_that_trainer_saved_loads_and_nothing_of_the_base_becomes_trainable(tmp_path):
    """It holds the whole state_dict of the adapted model. Resuming from it is exact."""
    safetensors = pytest.importorskip("safetensors.torch")
    pretrained, inputs = hugging_face("Llama")
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "v_proj"], r=2)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_on(model, tmp_path, max_steps=4, **saving)[0].train()

    loaded = copy.deepcopy(pretrained)
    state = safetensors.load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    adapters = load_adapter(loaded, state)
    wanted = {f"{name}.delora.{leaf}" for name in adapters for leaf in ("A", "B", "lam")}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == wanted
    with torch.no_grad():
        assert same_bits(loaded(**inputs).logits, model.eval()(**inputs).logits)

    resumed = copy.deepcopy(pretrained)
    inject(resumed, ["q_proj", "v_proj"], r=2)
    trainer, _ = trainer_on(resumed, tmp_path, max_steps=4, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with torch.no_grad():
        assert same_bits(resumed.eval()(**inputs).logits, model(**inputs).logits)


def test_an_offloaded_model_is_refused_by_the_name_of_a_layer():
    """accelerate leaves the weights on the meta device, and fetches them inside of each forward."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = hugging_face("Llama")
    source = copy.deepcopy(model)
    inject(source, ["q_proj"], r=2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    before = snapshot(model)
    for call in (
        lambda: inject(model, ["q_proj"]),
        lambda: load_adapter(model, adapter_state_dict(source)),
    ):
        with pytest.raises(ValueError, match="q_proj: its weight is on the meta device"):
            call()
        assert snapshot(model) == before
    assert model(**inputs).logits.isfinite().all()

    part, _ = hugging_face("Llama")
    accelerate.cpu_offload(part.model.layers[1], torch.device("cpu"))
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj.* meta device"):
        inject(part, ["q_proj"])
    inject(part, "all-linear", exclude=["layers.1"])

    late, _ = hugging_face("Llama")
    inject(late, ["q_proj"], r=2)
    accelerate.cpu_offload(late, torch.device("cpu"))
    for call in (adapter_state_dict, merge):
        with pytest.raises(ValueError, match="q_proj.* on the meta device"):
            call(late)


def test_a_router_that_returns_a_tuple_is_refused_by_name():
    """As those of Llama 4, which inherit from nn.Linear."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.llama4")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 128, "num_local_experts": 2, "pad_token_id": 0}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))
    before = snapshot(model)
    with pytest.raises(TypeError, match="router: Llama4Router is not linear: it returns a tuple"):
        inject(model, "all-linear")
    assert snapshot(model) == before
    assert inject(model, "all-linear", exclude=["router"])


def test_a_feed_forward_of_t5_reads_the_weight_that_it_calls():
    """It asks for wo.weight.dtype at each call, and W + ΔW is formed for it."""
    model, inputs = hugging_face("T5", feed_forward_proj="gated-gelu")
    adapters = inject(model, ["wo", "q"], r=2)
    formed = []
    for name, adapter in adapters.items():
        adapter.delora.register_forward_hook(lambda *_, name=name: formed.append(name))
    model(**inputs)
    assert formed and all(name.endswith("wo") for name in formed)


def test_the_schedule_of_trainer_decays_the_rate_of_lambda_too(tmp_path):
    model, _ = hugging_face("Llama")
    inject(model, ["q_proj"], r=2)
    trainer, optimizer = trainer_on(model, tmp_path, lr_scheduler_type="linear")
    trainer.train()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_the_trainer_of_hugging_face_takes_the_two_groups(tmp_path):
    model, _ = hugging_face("Llama")
    adapters = inject(model, ["q_proj", "v_proj"], r=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, optimizer = trainer_on(model, tmp_path)
    trainer.train()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {f"{name}.delora.{part}" for name in adapters for part in ("A", "B", "lam")}
    assert changed == wanted


# ----------------------------------------------------------------------------- PyTorch's own layers


@pytest.mark.parametrize("padded", (False, True))
def test_the_fused_transformer_encoder_sees_every_adapter(padded):
    """nn.TransformerEncoder in eval without gradients calls none of its layers; with padding it
    nests tensors.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    real = (slice(None), slice(None, 4))  # what is padded has no defined output
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=mask)
        adapters = inject(encoder, "all-linear", r=2)
        assert len(adapters) == 6 and same_bits(encoder(x, src_key_padding_mask=mask), before)
        moved(encoder)
        fused = encoder(x, src_key_padding_mask=mask)
    slow = encoder.train()(x, src_key_padding_mask=mask)
    for name, p in encoder.named_parameters():
        assert p.requires_grad == name.endswith(("delora.A", "delora.B", "delora.lam"))
    slow[real].square()[..., 0].sum().backward()
    assert all(
        a.delora.A.grad.count_nonzero() and a.delora.B.grad.count_nonzero()
        for a in adapters.values()
    )
    rounding = tol(torch.float32, depth(encoder), slow)
    assert distance(fused[real], slow[real]) <= rounding < distance(fused[real], before[real])
    merge(encoder)
    with torch.no_grad():
        merged = encoder.eval()(x, src_key_padding_mask=mask)
    assert distance(merged[real], fused[real]) <= rounding


@pytest.mark.parametrize("grad", (True, False))
def test_multihead_attention_reads_its_adapted_out_proj(grad):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(
        2, 6, 16, requires_grad=grad
    )  # if so, and the weights are frozen, nothing else decides on the path
    with torch.set_grad_enabled(grad):
        before = attention(x, x, x)[0]
        adapter = inject(attention, ["out_proj"], r=2)["out_proj"]
        assert same_bits(attention(x, x, x)[0], before)
        moved(attention)
        adapted = attention(x, x, x)[0]
    if grad:
        adapted.square()[..., 0].sum().backward()
        assert adapter.delora.A.grad.count_nonzero() and adapter.delora.lam.grad.count_nonzero()
    merge(attention)
    rounding = tol(torch.float32, 4 * 16, adapted)
    assert distance(attention(x, x, x)[0], adapted) <= rounding < distance(adapted, before)


# --------------------------------------------------------------------------------- quantised layers


def small_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)
    return nn.Sequential(*layers).to(dtype).eval()


def torch_ao(model: nn.Module) -> nn.Module:
    """int8 weights, and activations that are rounded to 8 bits as they come."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(name: str):
    def quantise(model: nn.Module) -> nn.Module:
        quantization = pytest.importorskip(
            "torchao.quantization", reason="could not import 'torchao'"
        )
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return quantise


def bitsandbytes(name: str, **options):
    def quantise(model: nn.Module) -> nn.Module:
        layer = getattr(pytest.importorskip("bitsandbytes").nn, name)
        for i in (1, 3):
            new = layer(
                model[i].in_features, model[i].out_features, model[i].bias is not None, **options
            )
            new.load_state_dict(model[i].state_dict())
            new.bias = model[i].bias
            model[i] = new.to("cpu")
        return (
            model.train()
        )  # on some CPUs its 4-bit layers are for inference alone after the first call in eval

    return quantise


QUANTISED = {
    "torch.ao int8": (torch_ao, torch.float32),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), torch.float32),
    "torchao int8 bfloat16": (torchao("Int8WeightOnlyConfig"), torch.bfloat16),
    "torchao int8 activations": (torchao("Int8DynamicActivationInt8WeightConfig"), torch.float32),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), torch.bfloat16),
    "bitsandbytes int8": (bitsandbytes("Linear8bitLt", has_fp16_weights=False), torch.float32),
    "bitsandbytes int8 bfloat16": (
        bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        torch.bfloat16,
    ),
    "bitsandbytes nf4": (bitsandbytes("Linear4bit", quant_type="nf4"), torch.float32),
    "bitsandbytes nf4 in bfloat16": (
        bitsandbytes("Linear4bit", compute_dtype=torch.bfloat16),
        torch.float32,
    ),
    "bitsandbytes fp4 bfloat16": (bitsandbytes("Linear4bit", quant_type="fp4"), torch.bfloat16),
}


def dequantised(layer: nn.Module) -> Tensor:
    """W (out, in) as the library itself restores it."""
    if callable(layer.weight):  # torch.ao
        return layer.weight().dequantize()
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if hasattr(layer.weight, "CB"):
        holder = (
            layer.weight if layer.weight.CB is not None else layer.state
        )  # where it is after the first call
        return holder.CB.float() * holder.SCB.float().unsqueeze(1) / 127
    return layer.weight.dequantize()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_layer_starts_equal_trains_and_merges_into_floating_point(kind):
    quantise, dtype = QUANTISED[kind]
    model, again, x = (
        quantise(small_mlp(dtype)),
        quantise(small_mlp(dtype)),
        torch.randn(5, 64).to(dtype),
    )
    restored = {name: dequantised(model[int(name)]).double() for name in "13"}  # (out, in)
    before = model(x)
    adapters = inject(model, "all-linear", r=2)
    assert same_bits(model(x), before)

    # An activation of 8 bits is off by at most a 254th of the largest; a weight that is measured in
    # a narrow dtype, or
    # computed in one inside, by its precision.
    narrow = torch.bfloat16 if "bfloat16" in kind or "float8" in kind else torch.float16
    precision = torch.finfo(narrow).eps + (1 / 127 if "activations" in kind else 0)
    for name, adapter in adapters.items():
        W, exact = small_mlp(dtype)[int(name)].weight.double(), restored[name]
        assert distance(adapter.weight, exact) <= precision * exact.abs().max()
        # | ‖q_j‖ - ‖w_j‖ | ≤ ‖q_j - w_j‖, the error of the quantisation in column j
        error = (exact - W).norm(dim=0) + precision * exact.norm(dim=0)  # (in,)
        assert ((adapter.delora.w - W.norm(dim=0)).abs() <= error).all()
        assert not same_bits(adapter.delora.w, W.norm(dim=0).float())

    found = steps(model, lambda: (model(x).float() - 1).square().mean())
    assert all(
        gradient.isfinite().all() and gradient.count_nonzero() for gradient in found.values()
    )
    adapted = model(x)
    again(x)  # at the first call bitsandbytes' 4-bit layers decide in which dtype they compute
    load_adapter(again, adapter_state_dict(model))
    assert same_bits(again(x), adapted)
    sizes = [
        a.weight.detach().float().abs().sum(1).max().item() for a in adapters.values()
    ]  # the gain of each layer
    merge(model)
    assert all(type(model[i]) is nn.Linear for i in (1, 3))
    model.to(dtype)  # a layer of codes alone was measured in float32
    rounding = tol(dtype, 64 + 96, adapted)
    if (
        "ao int8" in kind or "bitsandbytes" in kind
    ):  # activations of 8 bits, or of float16 or bfloat16, in the base
        rounding += sum(
            (1 / 254 + precision) * 2 * x.abs().max().item() * size for size in sizes
        ) * max(1, sizes[1])
    assert distance(model(x), adapted) <= rounding


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_a_plain_layer_loads_on_a_quantised_one_and_the_reverse(kind):
    """Without a warning: w of the codes is within a fifth of that of the floats."""
    quantise, dtype = QUANTISED[kind]
    plain, codes = small_mlp(dtype), quantise(small_mlp(dtype))
    trained = inject(plain, ["3"], r=2)["3"]
    trained.delora.A.data.normal_()
    loaded = load_adapter(codes, adapter_state_dict(plain))["3"]
    assert same_bits(loaded.delora.delta_weight(), trained.delora.delta_weight())
    fresh = small_mlp(dtype)
    loaded.delora.lam.data.fill_(3)
    load_adapter(fresh, adapter_state_dict(codes))
    assert same_bits(fresh[3].delora.delta_weight(), loaded.delora.delta_weight())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bits", (4, 8))
def test_a_hugging_face_model_that_is_loaded_quantised_is_adapted(bits, dtype, tmp_path):
    """QLoRA's setting: no layer has a bias, so none says in which dtype the model computes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.1}
    plain, inputs = hugging_face("Llama", **wide)
    plain.save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    options = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    model = type(plain).from_pretrained(tmp_path / "base", **options).train()
    before = model(**inputs).logits
    adapters = inject(model, "all-linear", exclude=["lm_head"], r=2)
    assert len(adapters) == 14 and same_bits(model(**inputs).logits, before)
    found = steps(model, lambda: model(**inputs).loss)
    assert len(found) == 3 * 14 and all(gradient.count_nonzero() for gradient in found.values())
    adapted = model(**inputs).logits
    fresh = type(plain).from_pretrained(tmp_path / "base", **options).train()
    load_adapter(fresh, adapter_state_dict(model))
    assert same_bits(fresh(**inputs).logits, adapted)
    merge(model)
    for name in adapters:
        model.get_submodule(name).to(dtype)  # no layer has a bias: measured in float32
    error, effect = ((model(**inputs).logits - y).float().norm() for y in (adapted, before))
    assert (
        error < effect / 4
    )  # activations in the quantised base are of 8 bits, or rounded: what is merged is close


# ---------------------------------------------------------------------------------- PyTorch's modes


def byte_transformer(**options) -> common.ByteTransformer:
    """The quickstart's model as it is before pretraining, with an adapter on every layer but the
    head.
    """
    torch.manual_seed(0)
    model = common.ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4, **options)
    return model


def loss_on_text(model: nn.Module, batch: slice = slice(0, 4)) -> Tensor:
    """On windows of 33 bytes of English, which the model shares out to `batch`."""
    return common.loss_of(model, TEXT[: 4 * 33].view(4, 33)[batch])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.slow
def test_a_block_compiles_as_one_graph_forward_and_backward():
    torch.manual_seed(0)
    block, x = common.Block(), torch.randn(2, 9, common.WIDTH)
    before = torch.compile(block, fullgraph=True)(x)
    adapters = inject(block, "all-linear", r=2)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    assert same_bits(compiled(x), before)
    moved(block)
    found = []
    for forward in (compiled, block):
        block.zero_grad()
        forward(x).square()[..., 0].sum().backward()
        found.append(
            {name: p.grad.clone() for name, p in block.named_parameters() if p.requires_grad}
        )
    for name, gradient in found[1].items():
        assert gradient.count_nonzero()
        assert distance(found[0][name], gradient) <= tol(torch.float32, depth(block), gradient)
    assert len(found[1]) == 3 * len(adapters) == 18


@pytest.mark.parametrize("base", (torch.float32, torch.bfloat16))
def test_autocast_takes_float32_adapters_on_a_base_of_any_precision(base):
    torch.manual_seed(0)
    model = common.ByteTransformer().to(base)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(TOKENS)
        adapters = inject(model, "all-linear", r=2)
        assert same_bits(model(TOKENS), before)
        found = steps(model, lambda: loss_on_text(model))
        assert not same_bits(model(TOKENS), before) and model(TOKENS).isfinite().all()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32} and len(
        found
    ) == 3 * len(adapters)
    assert all(
        adapter.delora.delta_weight().norm() <= adapter.delora.norm_bound()
        for adapter in adapters.values()
    )


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing_changes_no_gradient(reentrant):
    model, x = byte_transformer(), torch.randn(2, 9, common.WIDTH, requires_grad=True)
    moved(model)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        h = x
        for block in model.blocks:
            h = (
                torch.utils.checkpoint.checkpoint(block, h, use_reentrant=reentrant)
                if checkpointed
                else block(h)
            )
        h.square()[..., 0].sum().backward()
        found.append([p.grad.clone() for name, p in model.named_parameters() if p.requires_grad])
    assert all(same_bits(a, b) and a.count_nonzero() for a, b in zip(*found, strict=True))


def test_functional_call_and_vmap_run_several_adapters_on_one_base():
    models = [byte_transformer() for _ in range(3)]
    for i, model in enumerate(models):
        torch.manual_seed(i)
        for name, p in model.named_parameters():
            if name.endswith("delora.A"):
                nn.init.normal_(p)
    trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in models]
    stacked = {name: torch.stack([adapter[name] for adapter in trained]) for name in trained[0]}

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(
            models[0], adapter, TOKENS[:, :-1]
        )  # (batch, time, 256)
        return common.F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

    together = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i, model in enumerate(models):
        trainable = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(common.loss_of(model, TOKENS), trainable)
        for gradients, gradient in zip(together.values(), wanted, strict=True):
            assert distance(gradients[i], gradient) <= tol(torch.float32, depth(model), gradient)


@pytest.mark.slow
def test_an_adapted_model_is_exported():
    model = byte_transformer()
    moved(model)
    exported = torch.export.export(model.eval(), (TOKENS,)).module()
    assert distance(exported(TOKENS), model(TOKENS)) <= tol(
        torch.float32, depth(model), model(TOKENS)
    )


def test_copies_and_pickles_are_independent_and_equal():
    model = byte_transformer(tie_lambda=False)
    moved(model)
    y = model(TOKENS)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert same_bits(other(TOKENS), y)
        pointers = {p.data_ptr() for p in model.parameters()}
        assert not pointers & {p.data_ptr() for p in other.parameters()}
        assert [(n, p.requires_grad) for n, p in other.named_parameters()] == [
            (n, p.requires_grad) for n, p in model.named_parameters()
        ]
        steps(other, lambda other=other: loss_on_text(other))
    assert same_bits(model(TOKENS), y)


def test_a_model_on_the_meta_device_takes_the_tensors_of_another():
    source = byte_transformer()
    moved(source)
    with torch.device("meta"):
        model = common.ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(model(TOKENS), source(TOKENS))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert (
        trainable == [name for name, p in source.named_parameters() if p.requires_grad]
        and trainable
    )


# ---------------------------------------------------------------------------------------- bad input


def refused(model: nn.Module, state, message: str) -> None:
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_adapter(model, state)
    assert snapshot(model) == before


def test_a_checkpoint_of_another_architecture_is_refused_by_name():
    source, _ = hugging_face("Llama")
    inject(source, ["q_proj"], r=2)
    state = adapter_state_dict(source)
    for kind in ("GPT-2", "T5", "BERT", "ViT"):
        name = r"model.layers.0.self_attn.q_proj.delora.A: the model has nothing of that name"
        refused(hugging_face(kind)[0], state, name)
    wider, shallower = (
        hugging_face("Llama", **size)[0] for size in ({"hidden_size": 64}, {"num_hidden_layers": 1})
    )
    refused(wider, state, r"q_proj.delora.A: .*\[2, 32\]\) in the file, .*\[2, 64\]\) here")
    refused(shallower, state, "model.layers.1.self_attn.q_proj.delora.A: .*nothing of that name")


def test_a_truncated_file_is_noticed_at_every_length(tmp_path):
    """By torch.load or safetensors, which name the trouble; what is missing of a whole state, by
    load_adapter.
    """
    model, path = byte_transformer(), tmp_path / "adapter.pt"
    torch.save(adapter_state_dict(model), path)
    data = path.read_bytes()
    torch.manual_seed(0)
    fresh = common.ByteTransformer()
    before = snapshot(fresh)
    for length in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises((EOFError, RuntimeError, pickle.UnpicklingError)):
            load_adapter(fresh, torch.load(path, weights_only=True))
        assert snapshot(fresh) == before
    state = adapter_state_dict(model)
    for key in list(state)[::7]:
        refused(fresh, {name: value for name, value in state.items() if name != key}, key)


def test_a_rank_that_differs_from_the_injected_one_is_refused():
    model, _ = hugging_face("Llama")
    source = copy.deepcopy(model)
    inject(source, ["v_proj"], r=3)
    inject(model, ["v_proj"], r=2)
    refused(
        model,
        adapter_state_dict(source),
        r"v_proj.delora.A: .*\[3, 32\]\) in the file, .*\[2, 32\]\) here",
    )


def test_a_lora_checkpoint_is_told_from_a_delora_one(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = hugging_face("Llama")
    fresh = copy.deepcopy(model)
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    for target in (fresh, copy.deepcopy(fresh)):
        if target is not fresh:
            inject(target, ["q_proj"])
        refused(target, state, "q_proj.lora_A.weight: .*'lora_' is LoRA's")


def test_every_update_stays_within_its_bound_in_a_real_model():
    model, inputs = hugging_face("Llama")
    adapters = inject(model, "all-linear", r=2)
    steps(model, lambda: model(**inputs).loss, count=3, lr=1e3)
    for adapter in adapters.values():
        bound = adapter.delora.norm_bound()
        assert nuclear_norm(adapter.delora.delta_weight()) <= bound + tol(
            torch.float32, 32 + 48 + 4, bound
        )
