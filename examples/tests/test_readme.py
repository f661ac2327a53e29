"""What the README says is run, and what it shows is printed: code, commands, tables, links."""

import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from delora import DeLoRALinear

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_HAND, USE, SUBJECT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def text_after(code: str) -> str:
    """The block of text that follows a block of code."""
    return re.search(r"```text\n(.*?)```", README[README.index(code) + len(code) :], re.DOTALL)[1]


def contract(
    subject: str | Path, *options: str, folder: Path = ROOT
) -> subprocess.CompletedProcess:
    """DELORA_SUBJECT=subject pytest test_delora.py, in that folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_delora.py"]
    environment = {**os.environ, "DELORA_SUBJECT": str(subject)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_diff_of_the_readme_makes_two_lines_of_a_training_script_delora():
    lines = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    heads = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    before, x = {name: layer.weight.clone() for name, layer in heads.items()}, torch.randn(3, 4)
    outputs = {name: layer(x) for name, layer in heads.items()}
    for sign in "-+":
        scope = {"torch": torch, "model": heads}
        exec("\n".join(line[1:] for line in lines if line[0] == sign), scope)
        assert isinstance(scope["optimizer"], torch.optim.AdamW)
    assert [name for name, layer in heads.items() if isinstance(layer, DeLoRALinear)] == [
        "q_proj",
        "v_proj",
    ]
    assert all(torch.equal(heads[name](x), y) for name, y in outputs.items())
    heads["q_proj"](x).square().sum().backward()
    scope["optimizer"].step()
    assert not torch.equal(heads["q_proj"].weight, before["q_proj"])


def test_the_python_code_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(USE, "README.md", "exec"), {})
    assert capsys.readouterr().out == text_after(USE)
    assert (tmp_path / "adapter.pt").exists()


def test_the_quickstart_ends_with_the_report_of_the_readme():
    """The same run, whole. Another machine rounds otherwise, and 850 steps make much of that: a tenth of a loss."""
    command = [sys.executable, "examples/quickstart.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    said, shown = (
        run.stdout[run.stdout.index("Report") :],
        text_after("python examples/quickstart.py\n"),
    )
    lines = [
        [re.sub(r" *[\d.,]*\d(e-\d+)?", " #", line) for line in text.splitlines()[1:]]
        for text in (said, shown)
    ]
    assert lines[0] == lines[1]
    for what in ("new text", "old text"):
        pairs = [
            re.search(rf"loss, {what} +([\d.]+) -> ([\d.]+)", text).groups()
            for text in (said, shown)
        ]
        assert all(abs(float(a) - float(b)) < 0.1 for a, b in zip(*pairs, strict=True)), pairs


def test_the_accuracies_of_the_readme_are_those_of_the_example():
    table = (ROOT / "examples" / "huggingface.py").read_text(encoding="utf-8")
    for method, rate in (("LoRA", "0.0005"), ("DeLoRA", "0.01")):  # its usual one
        accuracy = re.search(
            rf"^  {method} +{rate} +[\d,]+ +[\d.]+ +([\d.]+) \(", table, re.MULTILINE
        )[1]
        assert re.search(rf"a real task: .*\b{method} {accuracy} %", README), method
    error = re.search(r"standard error of ([\d.]+) points", table)[1]
    assert f"± {error} each, no verdict" in README


def test_the_lines_of_code_beside_the_equation_are_those_of_the_file():
    quoted = re.findall(r"^\| \$.*\$ \| `(.*)` \|$", README, re.MULTILINE)
    lines = [line.strip() for line in inspect.getsource(DeLoRALinear.factors).splitlines()]
    assert len(quoted) == 4 and all(
        any(line.split("  # ")[0] == code for line in lines) for code in quoted
    )


def test_the_links_of_the_readme_lead_somewhere():
    for path in re.findall(r"\]\((?!http)([\w./]+)", README):
        assert (ROOT / path).exists(), path
    links = re.findall(r"\[(P\d+)\]\(test_delora.py#L(\d+)\)", README)
    tests = (ROOT / "test_delora.py").read_text(encoding="utf-8").splitlines()
    assert [name for name, _ in links] == [f"P{n}" for n in range(1, 12)]
    assert all(re.match(rf"# -+ {name} ", tests[int(line) - 1]) for name, line in links)


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) < 400


def test_the_worked_example_prints_what_the_readme_says(capsys):
    exec(compile(BY_HAND, "README.md", "exec"), {})
    assert capsys.readouterr().out == text_after(BY_HAND)


def test_the_steps_of_the_worked_example_are_those_of_the_layer():
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(BY_HAND, "README.md", "exec"), scope)
    layer, delta = scope["layer"], scope["delta"].detach()

    def shown(m: torch.Tensor) -> str:
        rows = [" ".join(f"{round(number, 4):g}" for number in row) for row in m.tolist()]
        return f"({'; '.join(rows)})"

    a, b, a0, b0 = (
        nn.functional.normalize(getattr(layer, f"delora_{name}").detach().flatten(), dim=0)
        for name in ("A", "B", "A0", "B0")
    )  # (2,) each
    new, old = b.outer(a), b0.outer(a0)  # (2, 2)
    steps = re.search(r"```text\n(direction.*?)```", README, re.DOTALL)[1]
    wanted = ["(0.6, 0.8)    b / ‖b‖ = (0.8, 0.6)", shown(new)]
    wanted += [f"minus b̂₀ â₀ᵀ = {shown(old)}", f"is {shown(new - old)}"]
    wanted += [f"= {shown(delta)} = ΔW", f"√{delta.square().sum():.2f} = {delta.norm():.3f}"]
    wanted += [
        f"‖ΔW‖_* = {torch.linalg.svdvals(delta).sum():.1f}",
        f"2 · ½ · 5 = {layer.norm_bound():g}",
    ]
    wanted += [
        f"the sum of ΔW, {delta.sum():.2f}, by λ: {delta.sum():.2f} / ½ = {layer.delora_lambda.grad.item():.2f}"
    ]
    assert [a.tolist(), b.tolist()] == [pytest.approx([0.6, 0.8]), pytest.approx([0.8, 0.6])]
    assert not [text for text in wanted if text not in steps]


def test_the_subject_of_the_readme_passes_the_contract_as_it_says(tmp_path):
    (tmp_path / "my_subject.py").write_text(SUBJECT, encoding="utf-8")
    assert len(SUBJECT.splitlines()) < 25
    for name in ("delora.py", "test_delora.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    run = contract("my_subject.py", folder=tmp_path)
    assert text_after(SUBJECT) in re.sub(r" in [\d.]+s.*", "", run.stdout), run.stdout + run.stderr


def test_a_subject_that_cannot_be_used_is_told_so_in_one_line(tmp_path):
    (tmp_path / "half.py").write_text(
        "def build(weight, bias, **options):\n    raise NotImplementedError\n"
    )
    (tmp_path / "crash.py").write_text("1 / 0\n")
    (tmp_path / "shapes.py").write_text(
        SUBJECT.replace('"A": layer.delora_A', '"A": layer.delora_A.T')
    )
    lines = {
        "nowhere.py": "FileNotFoundError: .*nowhere.py'",
        "nowhere": "ModuleNotFoundError: No module named 'nowhere'",
        "half.py": "TypeError: it lacks tensors, delta_weight, merge",
        "half.py:Layer": "AttributeError: module 'half' has no attribute 'Layer'",
        "crash.py": "ZeroDivisionError: division by zero",
        "shapes.py": r"TypeError: tensors\(\)\['A'\] is \(2, 1\), not \(1, 2\), .*",
    }
    for subject, line in lines.items():
        path = tmp_path / subject if subject.endswith(".py") or ":" in subject else subject
        run = contract(path)
        (said,) = [text for text in run.stderr.splitlines() if text.strip()]
        prefix = f"ERROR: DELORA_SUBJECT={path}: "
        assert (
            run.returncode == 4
            and said.startswith(prefix)
            and re.fullmatch(line, said.removeprefix(prefix))
        )


def test_the_table_has_a_row_for_every_property_of_the_contract():
    tests = dict.fromkeys(
        re.findall(r"::test_(\w+)", contract("test_delora:Reference", "--collect-only").stdout)
    )
    rows = re.findall(r"^\| P\d+ \| ([^|]+?) \|", README, re.MULTILINE)
    assert rows == [name.replace("_", " ") for name in tests]


def test_the_two_commands_of_the_readme_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == [
        'pip install -e ".[test]" && python examples/quickstart.py',
        'pip install -e ".[test]" && pytest',
    ]
