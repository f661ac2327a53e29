# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "pytest>=7", "hypothesis>=6.60", "peft>=0.21"]
# ///
"""Which implementation has which property of DeLoRA: the contract in test_delora.py, run on three.

    python examples/conformance.py              the table in the README, in about a minute
    python examples/conformance.py --quick      three of its rows, for CI

delora.py, DeLoRA as PEFT has it, and plain LoRA are each described to the contract by four
functions, as any other implementation can be; DELORA_SUBJECT=examples/conformance.py:PeftDeLoRA
pytest test_delora.py runs one with all details. Plain LoRA is the control: it is no DeLoRA, so a
contract that it passed would say nothing, and the script then fails. Its α is a parameter here and
stands where DeLoRA has λ: ΔW = (α / r) B A.

A cell has a tick; or the smallest layer at which the property did not hold, as Hypothesis found it;
or a dash, where there is nothing to test. What is no tick is no verdict on somebody else's work,
which has aims of its own. It is what was measured, with the versions below the table, and the cell
can be pasted into the test to see it again.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "test_delora.py"
QUICK = "changes_no_bit or never_exceeds or as_long_as_the_learning_rate"
CONTROL = (  # what plain LoRA must fail
    "test_the_update_never_exceeds_the_bound",
    "test_rescaling_a_component_changes_no_output",
    "test_the_gradient_of_lambda_is_blind_to_the_scale_of_the_components",
)


class PeftDeLoRA:
    """peft.DeloraConfig with its defaults."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        import peft

        if weight_norm != "column" or not tie_lambda:
            raise NotImplementedError
        base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        base.weight, base.bias = weight, bias
        config = peft.DeloraConfig(r=r, delora_lambda=lambda_init, target_modules=["0"])
        return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]

    @staticmethod
    def tensors(layer):
        return {name: getattr(layer, f"delora_{name}")["default"] for name in ("A", "B", "lambda")}

    @staticmethod
    def delta_weight(layer):
        return layer.get_delta_weight("default")

    @staticmethod
    def merge(layer):
        layer.merge()
        return layer.get_base_layer().weight

    @staticmethod
    def unmerge(layer):
        layer.unmerge()


class LoRALayer(nn.Module):
    """(W + (α / r) B A) x + b, from B = 0 (Eq. 1 of the DeLoRA paper)."""

    def __init__(self, weight, bias, r, alpha):
        super().__init__()
        self.W, self.b = weight, bias  # (out, in), (out,)
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.A = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(r, weight.shape[1], **like), a=5**0.5)
        )  # (r, in)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], r, **like))  # (out, r)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), **like))  # (1,)

    def forward(self, x):
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        y = F.linear(x, self.W, self.b)  # (..., out)
        return y + (self.alpha / len(self.A)).to(y.dtype) * F.linear(h, self.B.to(h.dtype)).to(
            y.dtype
        )


class PlainLoRA:
    """LoRA, as the control."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm is not None or not tie_lambda:
            raise NotImplementedError
        return LoRALayer(weight, bias, r, lambda_init)

    @staticmethod
    def tensors(layer):
        return {"A": layer.A, "B": layer.B, "lambda": layer.alpha}

    @staticmethod
    def delta_weight(layer):
        return layer.alpha / len(layer.A) * layer.B @ layer.A

    @staticmethod
    def merge(layer):
        return (layer.W + PlainLoRA.delta_weight(layer)).detach().to(layer.W.dtype)


def outcomes(subject, quick):
    """A cell for every test of the contract, by the test's name, in the contract's order."""
    command = [sys.executable, "-m", "pytest", str(CONTRACT), "-p", "no:cacheprovider"]
    if quick:
        command += ["-k", QUICK]
    environment = os.environ | {"DELORA_SUBJECT": subject}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = subprocess.run([*command, f"--junitxml={report}"], timeout=1200, **options)
        if run.returncode not in (0, 1):
            sys.exit(f"{subject}: {run.stdout}{run.stderr}".strip())
        cases = ElementTree.parse(report).findall(".//testcase")
    cells = {}
    for case in cases:
        name, _, parameter = case.get("name").partition("[")
        failure = case.find("failure")
        if case.find("skipped") is not None:
            cell = "–"
        elif failure is None:
            cell = "✓"
        else:
            cell = failing_example(failure.text) or f"`[{parameter}`"
        if cells.get(name, "✓") == "✓":  # of a test with parameters, the first that is no tick
            cells[name] = cell
    return cells


def failing_example(report):
    """The arguments that Hypothesis prints, of the smallest example if it found several."""
    found = re.findall(r"(?:Failing|Falsifying)[^\n]*\(\n(.*?)\n[E| ]*\)", report, re.DOTALL)
    arguments = []
    for line in min(found, key=len, default="").splitlines():
        argument = line.lstrip("E| ").rstrip(",").removeprefix("case=")
        arguments.append(f"`{argument}`")
    return ", ".join(arguments)


def sections():
    """The property, P1 to P11, under which each test stands in the contract."""
    found = {}
    section = ""
    for line in CONTRACT.read_text(encoding="utf-8").splitlines():
        heading = re.match(r"# -+ (P\d+) ", line)
        test = re.match(r"def (test_\w+)", line)
        if heading:
            section = heading[1]
        if test:
            found[test[1]] = section
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rows only")
    quick = parser.parse_args().quick
    try:
        peft = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("conformance.py compares with PEFT, which is not installed: pip install peft")
    started = time.monotonic()
    subjects = {
        "delora.py": "test_delora.py:Reference",
        f"PEFT {peft} DeLoRA": "examples/conformance.py:PeftDeLoRA",
        "plain LoRA, the control": "examples/conformance.py:PlainLoRA",
    }
    columns = {}
    for title, subject in subjects.items():
        print(f"running the contract on {subject} ...", file=sys.stderr, flush=True)
        columns[title] = outcomes(subject, quick)
    ours, _, control = columns.values()

    print(f"| | property | {' | '.join(columns)} |")
    print(f"| --- | --- |{' --- |' * len(columns)}")
    section = sections()
    for name in ours:
        words = name.removeprefix("test_").replace("_", " ")
        row = [cells[name] for cells in columns.values()]
        print(f"| {section[name]} | {words} | {' | '.join(row)} |")
    packages = ("torch", "peft", "hypothesis", "pytest")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    profile = os.environ.get("HYPOTHESIS_PROFILE", "fast")
    how = f"Python {platform.python_version()}, profile {profile}, on a CPU"
    print(f"\nMeasured with {versions}, {how}, in {time.monotonic() - started:.0f} s.")

    broken = [name for name, cell in ours.items() if cell != "✓"]
    tame = [name for name in CONTROL if control.get(name) == "✓"]
    if broken:
        sys.exit(f"delora.py breaks its own contract: {', '.join(broken)}")
    if tame:
        sys.exit(f"plain LoRA passes {', '.join(tame)}: a test that cannot fail")


if __name__ == "__main__":
    main()
