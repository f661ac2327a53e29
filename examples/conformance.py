# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "pytest>=7", "hypothesis>=6.60", "peft>=0.21"]
# ///
"""Which implementation has which property of DeLoRA: the contract in test_delora.py, run on three.

    python examples/conformance.py                       the table of examples/README.md, in three
                                                         minutes
    python examples/conformance.py --quick               three of its rows, for CI
    python examples/conformance.py --authors CHECKOUT    a fourth column: the authors' code, in a
                                                         checkout of github.com/ExplainableML/DeLoRA

delora.py, DeLoRA as PEFT has it, and plain LoRA are each described to the contract, as any other
layer can be: `OfClass` in test_delora.py says how.

    DELORA_QUALITY=1 DELORA_SUBJECT=examples/conformance.py:PeftDeLoRA pytest test_delora.py

runs one of them with all details. `MyLayer` is a layer to begin with: the formula as it reads.

Plain LoRA is the control: it is no DeLoRA, so a contract that it passed would say nothing, and the
script then fails. Its α is a parameter here, in the place of λ: ΔW = (α / r) B A.

A cell has a tick; or the simplest case, in words, at which the property did not hold; or a dash,
where the layer does not have what is tested. "Simplest" is what Hypothesis shrank a failure to.
Where it drew none, and only a case that the test names by itself fails, the cell says "as seen".
What is no tick is no verdict on somebody else's work, which has aims of its own. It is what was
measured, with the versions below the table.

Which mistake turns which test red? The mistakes of examples/tests/subjects.py, planted in a right
layer one by one, stand here under the test that is red first, in the order of the file. With a star
it is the only one. (`PYTHONPATH=examples python examples/tests/test_subjects.py`, seven minutes.)

    P9 the worked example comes out as by hand
        λ starts at one, whatever lambda_init is *
        The frozen copy shares its storage with A and B
        A is normalised over its components instead of within each
        B is normalised over its components instead of within each
        B is not normalised
        Neither A nor B is normalised
        LoRA
        DoRA
        λ² in the place of λ
        softplus(λ) in the place of λ
        A and A₀ are exchanged
        ΔW is transposed where W is square
        w is not applied
        w has the norms of the rows of W, and scales the rows of ΔW
        w is the Frobenius norm of W for every column, though "column" is asked for
    P1 training starts at w through a frozen copy
        The frozen copy is rounded to bfloat16
        There is no frozen copy
        A and B are divided by their Frobenius norms, one for all components
        1e-8 is added to the norms
        λ is not divided by r
        The frozen copy is added
        Only the first half of the components counts
        w is rounded to W's dtype, be it bfloat16
        The output lacks b
        An x without a batch dimension comes back with one
        An x that is no matrix is refused
        x is scaled by w in place
    P2 the update never exceeds the bound
        The frozen copy keeps λ at the start, though λ is to be tied
    P5 the gradient of lambda does not see the lengths
        λ is detached, and has no gradient
        B starts at zero, norms are clamped at 1e-4, and there is no frozen copy
        A and B start at zero, with an epsilon in the norm
        Norms are clamped at 1e-4
    P4 gradients turn components and never stretch them
        The norms are detached
    P4 a zero component adds nothing
        |λ| in the place of λ
        Norms are clamped at 1e-30, and the gradient of a component that is zero is 1e30
    P6 the start is spread and leaves the random state to the user
        A and B start with no negative entry *
        Building sets the seed *
        All components start alike, and stay so *
    P7 training changes a b and lambda and nothing else
        W is left trainable
        b is left trainable *
        A bias of its own is trained, too
        A is a buffer that requires a gradient *
        λ is a buffer that requires a gradient *
        The frozen copy is trained, too
    P7 the layer is one linear map
        The adapter sees the first token, and gives all tokens the same
        Dropout acts in evaluation *
        The weight is kept from the first call in evaluation, whatever is trained afterwards
        The weight is kept in evaluation without gradients until .train() or .eval() is called *
        The weight is kept from the first call under torch.no_grad *
        It asks for the version of a tensor, which there is none of under torch.inference_mode *
    P7 the gradients are those of the equation
        x is detached on its way into the adapter *
    P7 code that reads the weight sees the adapter
        .weight is W *
    P7 w is measured once and the weight is not copied
        W and b are copied *
        w is measured anew in every forward, and follows W *
    P8 the merged weight is the sum rounded once
        The merged weight has λ as it was at the start *
        The merged weight is W plus a ΔW that was rounded to W's dtype before *
        Merging writes into the W that was given, and that others may hold *
    P9 the update is a sum over components
        w is measured from the first 64 rows of W *
    P10 a saved layer computes the same when loaded
        The frozen copy is not in state_dict *
    P10 a copy moves whole is independent and leaves nothing behind
        w is an attribute *
        .to() and its like take the frozen copy anew, and ΔW is zero again *
        It holds a tensor with a history, and copy.deepcopy fails *
    P10 nothing is kept from call to call
        Every ΔW is kept in a list *
    P11 a rank below one is refused
        r = 0 and r = -1 are taken for 1 *
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "test_delora.py"
QUICK = (
    "test_p1_training_starts_at_w_through_a_frozen_copy",
    "test_p2_the_update_never_exceeds_the_bound",
    "test_p5_the_gradient_of_lambda_does_not_see_the_lengths",
)
CONTROL = QUICK[1:]  # what plain LoRA must fail


class MyLayer(nn.Module):
    """A layer of one's own, which needs nothing of delora.py: copy it, and put yours in its place.

    The names are those of DeLoRALinear, so that test_delora.py needs no further description.
    """

    def __init__(self, base_layer, r, lambda_init):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        n_out, n_in = base_layer.weight.shape
        self.A = nn.Parameter(torch.randn(r, n_in))
        self.B = nn.Parameter(torch.randn(n_out, r))
        self.lam = nn.Parameter(torch.tensor([lambda_init]))
        self.register_buffer("w", base_layer.weight.norm(dim=0))  # (in,)
        self.register_buffer("start", self.directions().detach())  # (out, in), the frozen copy

    def directions(self):
        return F.normalize(self.B, dim=0) @ F.normalize(self.A, dim=1)  # (out, in)

    def delta_weight(self):
        return self.lam / len(self.A) * (self.directions() - self.start) * self.w  # (out, in)

    def forward(self, x):
        return self.base_layer(x) + F.linear(x, self.delta_weight())


# ----------------------------------------------------------------------------------------------
# The subjects
# ----------------------------------------------------------------------------------------------


class PeftDeLoRA:
    """peft.DeloraConfig with its defaults."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        import peft

        if weight_norm != "column" or not tie_lambda:
            raise NotImplementedError("PEFT has no such mode")
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
        self.W = weight.requires_grad_(False)  # (out, in)
        self.b = None if bias is None else bias.requires_grad_(False)  # (out,)
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
        A = torch.empty(r, weight.shape[1], **like)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=5**0.5))  # (r, in)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], r, **like))  # (out, r)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), **like))  # (1,)

    def forward(self, x):
        y = F.linear(x, self.W, self.b)  # (..., out)
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        update = F.linear(h, self.B.to(h.dtype))  # (..., out)
        return y + (self.alpha / len(self.A)).to(y.dtype) * update.to(y.dtype)


class PlainLoRA:
    """LoRA, as the control."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm is not None or not tie_lambda:
            raise NotImplementedError("LoRA has no weight norm")
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


class AuthorsDeLoRA:
    """The layer in peft/src/peft/tuners/delora.py of the checkout that DELORA_AUTHORS names.

    That file is run as it is. What it imports from the rest of its repository, and does not need
    for a layer, has a stand-in here.
    """

    @staticmethod
    def module():
        if "authors.tuners.delora" not in sys.modules:
            checkout = Path(os.environ["DELORA_AUTHORS"])
            utils = types.ModuleType("authors.utils")
            utils.PeftConfig = object
            utils.PeftType = None
            utils.transpose = lambda weight, transposed: weight.T if transposed else weight
            for package in ("authors", "authors.tuners"):
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = []
            sys.modules["authors.utils"] = utils
            path = checkout / "peft" / "src" / "peft" / "tuners" / "delora.py"
            spec = importlib.util.spec_from_file_location("authors.tuners.delora", path)
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[spec.name])
        return sys.modules["authors.tuners.delora"]

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm != "column" or not tie_lambda:
            raise NotImplementedError("the authors' code has no such mode")
        n_out, n_in = weight.shape
        layer = AuthorsDeLoRA.module().Linear(n_in, n_out, r, lambda_init, bias=bias is not None)
        layer.to(weight.dtype)
        layer.weight, layer.bias = weight.requires_grad_(False), bias
        if bias is not None:
            bias.requires_grad_(False)  # as mark_only_delora_as_trainable does in a model
        return layer

    @staticmethod
    def tensors(layer):
        A, B = layer.delora_A.weight, layer.delora_B.weight
        return {"A": A, "B": B, "lambda": layer.delora_lambda}

    @staticmethod
    def delta_weight(layer):
        return layer.get_ABCD()

    @staticmethod
    def merge(layer):
        layer.merge_weights = True
        layer.train(False)
        return layer.weight

    @staticmethod
    def unmerge(layer):
        layer.train(True)
        layer.merge_weights = False


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def properties():
    """{test: its tier} of every test of the contract that is about any layer, in their order."""
    found = {}
    tier = 1
    for line in CONTRACT.read_text(encoding="utf-8").splitlines():
        test = re.match(r"def (test_p\d+b?_\w+)", line)
        if line == "@quality":
            tier = 2
        if test:
            found[test[1]] = tier
            tier = 1
    return found


def run(subject, tests, profile):
    """{test: its failure, "" if it passes, None if it is skipped}."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"{CONTRACT}::{test}" for test in tests]
    environment = {"DELORA_SUBJECT": subject, "DELORA_QUALITY": "1", "HYPOTHESIS_PROFILE": profile}
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = subprocess.run([*command, f"--junitxml={report}"], timeout=1200, **options)
        if pytest.returncode not in (0, 1):
            sys.exit(f"{subject}: {pytest.stdout}{pytest.stderr}".strip())
        cases = ElementTree.parse(report).findall(".//testcase")
    found = {}
    for case in cases:
        name = case.get("name").partition("[")[0]
        failure = case.find("failure")
        if case.find("skipped") is not None:
            found[name] = None
        elif failure is not None:
            found[name] = failure.text
        else:
            found.setdefault(name, "")  # of a test with parameters, what is no tick stays
    return found


def outcomes(subject, tests):
    """{test: a cell of the table}."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "fast")
    first = run(subject, tests, profile)
    red = [test for test in tests if first[test]]
    drawn = run(subject, red, "drawn") if red else {}  # the cases that the tests name left out
    cells = {}
    for test in tests:
        if first[test] is None:
            cells[test] = "–"
        elif not first[test]:
            cells[test] = "✓"
        elif drawn[test]:
            cells[test] = in_words(drawn[test])
        else:
            cells[test] = f"as seen: {in_words(first[test])}"
    return cells


def in_words(failure):
    """The arguments that Hypothesis prints, of the simplest case if it found several."""
    found = re.findall(r"(?:Failing|Falsifying)[^\n]*\(\n(.*?)\n[E| ]*\)", failure, re.DOTALL)
    if not found:
        return "always"
    lines = [line.strip("E| ") for line in min(found, key=len).splitlines()]
    names = {"Case": dict, "torch": torch}
    arguments = eval(f"dict({' '.join(lines)})", names)  # of a test of ours, printed by Hypothesis
    case = arguments.pop("case")
    shape = f"{case['n_out']} × {case['n_in']}, r = {case['r']}"
    words = [f"W {shape}"]
    for name, value in (case | arguments).items():
        match name:
            case "mode":
                words += (
                    [] if value[0] == "column" else ["w = 1" if value[0] is None else "w = ‖W‖"]
                )
                words += [] if value[1] else ["untied"]
            case "dtype":
                words.append(str(value).removeprefix("torch."))
            case "lengths" if value != (0,):
                words.append("lengths " + ", ".join(f"1e{power}" for power in value))
            case "strength":
                words.append(f"λ = {value:g}")
            case "decade" if value:
                words.append(f"W about 1e{value}")
            case "batch":
                words.append(f"x of {value}")
            case "bias":
                words.append("with b")
            case "optimizer":
                words.append(value)
            case "lr":
                words.append(f"rate 1e{value}")
            case "c" if "d" not in arguments:
                words.append(f"λ times {value:g}")
            case "c" if value:
                words.append(f"a_i times 1e{value}")
            case "d" if value:
                words.append(f"b_i times 1e{value}")
            case "k" if abs(value) > 2:
                words.append(f"entries 1e{value}")
            case "which":
                words.append(f"zero in {value}")
            case "other":
                words.append(f"cast to {str(value).removeprefix('torch.')}")
    return ", ".join(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rows only")
    parser.add_argument("--authors", help="a checkout of the authors' repository")
    options = parser.parse_args()
    try:
        peft = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("conformance.py compares with PEFT, which is not installed: pip install peft")
    started = time.monotonic()
    here = Path(__file__).relative_to(ROOT).as_posix()
    subjects = {
        "delora.py": "delora:DeLoRALinear",
        f"PEFT {peft} DeLoRA": f"{here}:PeftDeLoRA",
        "plain LoRA, the control": f"{here}:PlainLoRA",
    }
    if options.authors:
        os.environ["DELORA_AUTHORS"] = str(Path(options.authors).resolve())
        subjects["the authors' code"] = f"{here}:AuthorsDeLoRA"
    tests = properties()
    if options.quick:
        tests = {test: tests[test] for test in QUICK}
    columns = {}
    for title, subject in subjects.items():
        print(f"running the contract on {subject} ...", file=sys.stderr, flush=True)
        columns[title] = outcomes(subject, tests)

    print(f"| | tier | property | {' | '.join(columns)} |")
    print(f"| --- | --- | --- |{' --- |' * len(columns)}")
    for test, tier in tests.items():
        number, _, words = test.removeprefix("test_").partition("_")
        cells = " | ".join(cells[test] for cells in columns.values())
        print(f"| P{number[1:]} | {tier} | {words.replace('_', ' ')} | {cells} |")
    packages = ("torch", "peft", "hypothesis", "pytest")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    profile = os.environ.get("HYPOTHESIS_PROFILE", "fast")
    how = f"Python {platform.python_version()}, profile {profile}, on a CPU"
    print(f"\nMeasured with {versions}, {how}, in {time.monotonic() - started:.0f} s.")

    broken = [test for test, cell in columns["delora.py"].items() if cell != "✓"]
    tame = [test for test in CONTROL if columns["plain LoRA, the control"][test] == "✓"]
    if broken:
        sys.exit(f"delora.py breaks its own contract: {', '.join(broken)}")
    if tame:
        sys.exit(f"plain LoRA passes {', '.join(tame)}: a test that cannot fail")


if __name__ == "__main__":
    main()
