"""examples/export.py: what is written gives the same outputs in PEFT, or is refused and nothing is written."""

import copy
import json
import sys
import warnings
from pathlib import Path

import pytest
import test_hosts
import torch
from export import export
from torch import Tensor, nn

from delora import disabled, inject, load_adapter
from test_delora import distance, snapshot, tol

pytestmark = pytest.mark.filterwarnings(
    "default"
)  # what other packages warn of is not what is tested


def in_peft(pretrained: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of PEFT, which warns where it misses a tensor or does not know one."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained), folder).eval()
    keys = [str(w.message) for w in said if "key" in str(w.message).lower()]
    assert not keys, keys
    with torch.no_grad():
        return model(**inputs).logits


def compare(
    model: nn.Module, pretrained: nn.Module, inputs: dict[str, Tensor], folder: Path, to: str
) -> None:
    before = snapshot(model)
    export(model, folder, to)
    assert snapshot(model) == before
    with torch.no_grad():
        ours = model(**inputs).logits
        with disabled(model):
            base = model(**inputs).logits
    rounding = tol(torch.float32, test_hosts.depth(model), ours)
    assert distance(in_peft(pretrained, folder, inputs), ours) <= rounding < distance(ours, base)


@pytest.mark.parametrize("weight_norm", ("column", "frobenius", None))
@pytest.mark.parametrize(("to", "tied"), (("lora", True), ("lora", False), ("delora", True)))
def test_peft_gives_the_outputs_of_a_trained_model(to, tied, weight_norm, tmp_path):
    pytest.importorskip("safetensors")
    pretrained, inputs = test_hosts.hugging_face("Llama")
    model = copy.deepcopy(pretrained)
    options = {
        "tie_lambda": tied,
        "weight_norm": weight_norm,
        "lambda_init": 5.0 if weight_norm == "column" else 1.0,
    }
    inject(model, ["q_proj", "v_proj", "lm_head"], r=3, **options)
    inject(
        model, ["down_proj"], r=1, lambda_init=0.5, tie_lambda=tied
    )  # another rank, another strength
    test_hosts.steps(model, lambda: model(**inputs).loss, lr=3e-2)
    compare(model.eval(), pretrained, inputs, tmp_path / "new" / to, to)


@pytest.mark.parametrize("to", ("lora", "delora"))
def test_components_of_any_length_are_exported(to, tmp_path):
    """PEFT's DeLoRA clamps a norm at 1e-4, and squares in float32; zero has no direction, and a λ may be negative."""
    pytest.importorskip("safetensors")
    pretrained, inputs = test_hosts.hugging_face("BERT")
    model = copy.deepcopy(pretrained)
    torch.manual_seed(1)
    for adapter in inject(model, ["query", "value"], r=4).values():
        with torch.no_grad():
            adapter.delora_A.normal_().mul_(torch.tensor([1e-9, 1.0, 1e25, 0.0])[:, None])
            adapter.delora_B.normal_().mul_(torch.tensor([1e-7, 1e30, 1.0, 1.0]))
            adapter.delora_B0[:, 1] = 0
            adapter.delora_lambda.mul_(-0.5)
    compare(model, pretrained, inputs, tmp_path, to)
    state = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "adapter_model.safetensors"
    )
    if to == "delora":  # and here again, as any checkpoint of PEFT
        fresh = copy.deepcopy(pretrained)
        load_adapter(fresh, state)
        with torch.no_grad():
            ours = model(**inputs).logits
            assert distance(fresh(**inputs).logits, ours) <= tol(
                torch.float32, test_hosts.depth(model), ours
            )


@pytest.mark.parametrize("to", ("lora", "delora"))
def test_a_trained_head_and_trained_biases_go_along(to, tmp_path):
    pytest.importorskip("safetensors")
    pretrained, inputs = test_hosts.hugging_face("BERT")
    model = copy.deepcopy(pretrained)
    for adapter in inject(model, ["query", "value"], r=2).values():
        adapter.base_layer.bias.requires_grad_(True)
    model.classifier.weight.requires_grad_(True)  # its bias stays frozen, and is carried as it is
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    test_hosts.steps(model, lambda: model(**inputs).loss)
    compare(model.eval(), pretrained, inputs, tmp_path, to)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["bert.embeddings.LayerNorm", "classifier"]
    assert config["bias"] == f"{to}_only" and config["r"] == 4


def test_conv1d_is_exported_to_lora(tmp_path):
    pytest.importorskip("safetensors")
    pretrained, inputs = test_hosts.hugging_face("GPT-2")
    model = copy.deepcopy(pretrained)
    inject(model, "all-linear", exclude=["lm_head"], r=2)
    test_hosts.moved(model)
    compare(model, pretrained, inputs, tmp_path, "lora")
    refused(
        model,
        tmp_path / "no",
        "delora",
        "transformer.h.0.attn.c_attn: PEFT's DeLoRA takes nn.Linear, .* a Conv1D",
    )


class Nested(nn.Module):
    """Two layers of which one name is the end of the other's."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = (
            nn.Linear(4, 4),
            nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 4)}),
        )
        self.lm_head = nn.Linear(4, 4)

    def forward(self, x):
        return self.lm_head(self.inner["head"](self.inner["fc"](self.fc(x))))


@pytest.mark.parametrize("to", ("lora", "delora"))
def test_a_name_that_ends_another_is_no_pattern(to, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pretrained, x = Nested(), torch.randn(3, 4)
    model = copy.deepcopy(pretrained)
    inject(model, "fc", r=1)
    test_hosts.moved(model)
    export(model, tmp_path, to)
    served = peft.PeftModel.from_pretrained(pretrained, tmp_path)
    assert distance(served(x), model(x)) <= tol(torch.float32, 4 * 4, model(x))
    assert [
        name for name, _ in served.named_parameters() if "inner.fc" in name and "base_layer" in name
    ] == []


def refused(model: nn.Module, folder: Path, to: str, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        export(model, folder, to)
    assert snapshot(model) == before and not folder.exists()


def test_what_peft_cannot_express_is_refused_by_name_and_nothing_is_written(tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "folder"
    model = Nested()
    refused(model, folder, "lora", "Nested has no DeLoRALinear")
    adapter = inject(model, ["inner.fc"], r=1, tie_lambda=False)["inner.fc"]
    refused(model, folder, "peft", "to must be 'lora' or 'delora', got 'peft'")
    export(copy.deepcopy(model), tmp_path / "same", "delora")  # λ = λ₀ still
    adapter.delora_lambda.data.fill_(2.0)
    refused(model, folder, "delora", "^inner.fc: λ is 2.0, λ₀ is 15.0, .*export to LoRA")
    model.inner["head"].requires_grad_(True)
    export(copy.deepcopy(model), tmp_path / "head", "lora")
    model.twin = model.inner["head"]
    refused(model, folder, "lora", "^twin.weight: the same parameter as inner.head.weight, trained")
    model.inner["head"].requires_grad_(False)
    model.twin, model.head = None, nn.Linear(4, 4)
    refused(
        model,
        folder,
        "lora",
        r"^(inner.head|lm_head): PEFT would take it for one of the trainable \['head'\]",
    )
    model.head = None
    model.inner.bias = nn.Parameter(torch.ones(4))
    refused(model, folder, "lora", "^inner.bias is trainable, and PEFT has no place for it")
    model.inner.bias = None
    adapter.base_layer.weight.requires_grad_(True)
    refused(model, folder, "lora", "^inner.fc.base_layer.weight is trainable")
    adapter.base_layer.weight.requires_grad_(False)
    model.twin = adapter
    refused(
        model,
        folder,
        "lora",
        "^(twin|inner.fc): the same layer as (inner.fc|twin), and PEFT adapts only one name",
    )


def test_without_peft_one_line_says_so(monkeypatch):
    import export as script

    monkeypatch.setattr(sys, "argv", ["export.py"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        SystemExit, match="^export.py needs peft, which is not installed: pip install peft saf"
    ):
        script.main()
