"""Can the tests fail? Break delora.py in one place at a time, and report which test turns red.

    python .ci/mutants.py                   every mutant: about half an hour on two cores
    python .ci/mutants.py --sample 40       the known mistakes, and as many others as make 40, the same every time
    python .ci/mutants.py --only cast       those whose description contains the text

A mutant is delora.py with one small change: another operator, axis, sign or constant, a condition forced, a guard, a
`detach`, a keyword, a context or a statement dropped. KNOWN has the mistakes of other implementations, by name. A
mutant that no test notices must stand in SURVIVORS with the reason why a user could not notice either. The exit status
is 1 if a known mistake survives, if a survivor is not listed, if a listed one is killed after all, or if fewer than
95 % of all are killed. Needs torch, pytest and hypothesis; `fork`, so not Windows.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "delora.py").read_text(encoding="utf-8")
TIMEOUT = 300  # seconds; a mutant that hangs is noticed

# ------------------------------------------------------------------------------------------------ known mistakes

INIT_A = "nn.init.kaiming_uniform_(torch.empty(r, n_in, **like), a=5**0.5)"
INIT_B = "nn.init.kaiming_uniform_(torch.empty(n_out, r, **like), a=5**0.5)"
NORM = "(torch.linalg.vector_norm(v, dim=dim, keepdim=True) + zero)"
LARGEST = "    v = v / largest.masked_fill((zero := largest == 0), torch.inf)\n"
COPY = "nn.Parameter(p.clone(), requires_grad=False) for p in [*self.parameters()]"
MERGED = "nn.Parameter((weight + self.delta_weight()).to(weight.dtype).contiguous(), requires_grad=False)"
KNOWN = {
    "storage shared with the frozen copy": {COPY: COPY.replace("p.clone()", "p.detach()")},
    "B = 0 with a clamp, and no frozen copy": {
        INIT_B: "torch.zeros(n_out, r, **like)",
        COPY: COPY.replace("p.clone()", "0 * p"),
        LARGEST: "",
        NORM: "torch.linalg.vector_norm(v, dim=dim, keepdim=True).clamp(min=1e-4)",
    },
    "B = 0 with a clamp, and a frozen copy": {
        INIT_B: "torch.zeros(n_out, r, **like)",
        LARGEST: "",
        NORM: "torch.linalg.vector_norm(v, dim=dim, keepdim=True).clamp(min=1e-4)",
    },
    "A = B = 0 with an epsilon": {
        INIT_A: "torch.zeros(r, n_in, **like)",
        INIT_B: "torch.zeros(n_out, r, **like)",
        LARGEST: "",
        NORM: "(torch.linalg.vector_norm(v, dim=dim, keepdim=True) + 1e-8)",
    },
    "norms of A along the wrong axis": {"A0.detach())), dim=2)": "A0.detach())), dim=1)"},
    "norms of B along the wrong axis": {"B0.detach())), dim=1)": "B0.detach())), dim=2)"},
    "column norms of W along the wrong axis": {"squares.sum(0).sqrt()": "weight.detach().norm(dim=1)"},
    "column norms of the last block of rows": {".addcmul_(rows, rows)": ".copy_(rows * rows)"},
    "the update added to the base's output in place": {
        "torch.addmm(y.reshape(-1, y.shape[-1]), ": "torch.Tensor.addmm_(y.reshape(-1, y.shape[-1]), "
    },
    "column norms taken after a merge": {
        "        return linear": "        self.delora_w_norm.data = linear.weight.norm(dim=0)\n        return linear"
    },
    "an epsilon added instead of a zero guarded": {
        LARGEST: "",
        NORM: "(torch.linalg.vector_norm(v, dim=dim, keepdim=True) + 1e-8)",
    },
    "a clamp instead of a zero guarded": {
        LARGEST: "",
        NORM: "torch.linalg.vector_norm(v, dim=dim, keepdim=True).clamp(min=1e-12)",
    },
    "merging into the tied tensor": {
        MERGED: "nn.Parameter(weight.data.copy_(weight + self.delta_weight()), requires_grad=False)"
    },
    "merging rounds twice": {MERGED: MERGED.replace("self.delta_weight())", "self.delta_weight().to(weight.dtype))")},
    ".weight forwarded to the base": {
        "return (weight + self.delta_weight()).to(weight.dtype) if self.enabled else weight": "return weight"
    },
    ".weight without gradients": {
        "self.delta_weight()).to(weight.dtype) if": "self.delta_weight().detach()).to(weight.dtype) if"
    },
    "frozen copy kept in another precision": {COPY: COPY.replace(".clone()", ".clone().bfloat16()")},
    "frozen copy kept in float32 on a float64 base": {COPY: COPY.replace(".clone()", ".clone().float()")},
    "frozen copy not saved": {
        "self.delora_A0, self.delora_B0, self.delora_lambda0 = A0, B0,": (
            "self.__dict__.update(delora_A0=A0, delora_B0=B0); self.delora_lambda0 ="
        )
    },
    "no normalisation: plain LoRA": {"    return v / " + NORM: "    return v"},
    "the bound called lambda, without the column norms": {"* self.delora_w_norm.max().item()": "* 1.0"},
    "one name of a shared module adapted": {
        "placed = {name: new[module] for name, module in _modules(model).items() if module in new}": (
            "placed = {name: new[module] for name, module in model.named_modules() if module in new}"
        )
    },
}


# ------------------------------------------------------------------------------------------------ small changes

SWAP = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or,
    ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
DROPPED_CALLS = {
    "detach", "clone", "to", "contiguous", "abs", "clamp", "masked_fill", "roll", "train", "requires_grad_", "lstrip",
    "removeprefix", "norm", "repeat", "max", "sum", "cpu", "float", "copy",
}  # fmt: skip


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """What an expression or a statement could have been by mistake; None where a statement is dropped."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in SWAP:
            yield ast.BinOp(left, SWAP[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAP[type(op)](), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:i], SWAP[type(op)](), *ops[i + 1 :]], comparators)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(1 - value if value in (0, 1) else value + 1)
        case ast.Constant(float() as value):
            yield ast.Constant(2 * value or 1.0)
        case ast.Constant(str() as value):
            yield ast.Constant(value + "_")
        case ast.Constant(None):
            yield ast.Constant(0)
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.If(_, body, orelse):
            yield ast.If(ast.Constant(True), body, orelse)
            yield ast.If(ast.Constant(False), body, orelse)
        case ast.Call(function, arguments, keywords):
            if isinstance(function, ast.Attribute) and function.attr in DROPPED_CALLS:
                yield function.value
            for i in range(len(keywords)):
                yield ast.Call(function, arguments, keywords[:i] + keywords[i + 1 :])
        case ast.Attribute(value, "T"):
            yield value
        case ast.comprehension(target, iterator, conditions) if conditions:
            yield ast.comprehension(target, iterator, [], 0)
        case ast.Expr() | ast.AugAssign() | ast.Raise():
            yield None
        case ast.Assign([ast.Attribute() | ast.Subscript(), *_]):
            yield None
        case ast.With(items, body):
            for i in range(len(items)):
                rest = items[:i] + items[i + 1 :]
                yield ast.With(rest, body) if rest else ast.If(ast.Constant(True), body, [])
        case ast.FunctionDef(decorator_list=decorators):
            for i in range(len(decorators)):
                fields = {name: getattr(node, name) for name in node._fields}
                yield ast.FunctionDef(**fields | {"decorator_list": decorators[:i] + decorators[i + 1 :]})


def places(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST, str, int | None]]:
    """(function, parent, field, index) of everything that may be changed: not types, messages, docstrings, imports."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params", "format_spec") or isinstance(node, ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            message = isinstance(node, ast.Call) and ast.unparse(node.func) == "_require" and field == "args" and index
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            fixed = message or docstring or isinstance(child, (ast.Import, ast.ImportFrom))
            if fixed or not isinstance(child, ast.AST):
                continue
            yield function, node, field, index
            yield from places(child, function)


def text(node: ast.AST) -> str:
    """The code on one line, its middle left out where that is long."""
    code = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return code if len(code) < 100 else f"{code[:60]} ... {code[-35:]}"


def mutants() -> Iterator[tuple[str, str]]:
    """(description, source) of every mutant. A description says where and what, so it outlives other changes."""
    for name, replacements in KNOWN.items():
        source = SOURCE
        for old, new in replacements.items():
            if source.count(old) != 1:
                sys.exit(f"{name}: the line it breaks stands {source.count(old)} times in delora.py, not once: {old}")
            source = source.replace(old, new)
        yield f"known: {name}", source
    tree, seen = ast.parse(SOURCE), {}
    for function, parent, field, index in list(places(tree)):  # a list, since the tree changes on the way
        holder = getattr(parent, field) if index is not None else parent.__dict__
        key = field if index is None else index
        original = holder[key]
        for variant in variants(original):
            new = ast.Pass() if variant is None else variant
            around = isinstance(original, ast.Constant) and isinstance(parent, (ast.expr, ast.keyword))
            before = text(parent if around else original)
            holder[key] = new
            source = ast.unparse(ast.fix_missing_locations(tree))
            after = text(parent if around else new) if variant else "dropped"
            description = f"{function or 'module'}: {before}  ->  {after}"
            holder[key] = original
            seen[description] = seen.get(description, 0) + 1
            yield description + f"  #{seen[description]}" * (seen[description] > 1), source


# ------------------------------------------------------------------------------------------------ who notices


class FirstFailure:
    """The pytest plugin that remembers the first red test. Those that take longest run last: they draw, or compile."""

    name = ""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: ("compilation" in item.name, hypothesis.is_hypothesis_test(item.function)))

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid.partition("::")[2]

    def pytest_collectreport(self, report):
        if report.failed:
            self.name = "cannot be imported"


def killed_by(source: str) -> str:
    """The test that turns red on that source, "" if none does. To be called in a process of its own."""
    folder = Path(tempfile.mkdtemp())
    watch = FirstFailure()
    try:
        (folder / "delora.py").write_text(source, encoding="utf-8")
        for name in ("test_delora.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        torch.set_num_threads(1)
        early = "ignore:Module already imported so cannot be rewritten"  # Hypothesis is, above
        status = pytest.main(["-x", "-p", "no:cacheprovider", "-W", early, "test_delora.py"], plugins=[watch])
        return watch.name or ("" if status == 0 else f"pytest ended with {status}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(chosen: list[tuple[str, str]], jobs: int) -> Iterator[tuple[str, str]]:
    """(description, red test or "") of each, as they come in; every mutant in a fork of this process."""
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            description, source = waiting.pop()
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reader)
                signal.alarm(TIMEOUT)  # which ends this process
                os.write(writer, json.dumps(killed_by(source)).encode())
                os._exit(0)
            os.close(writer)
            running[child] = description, reader
        child, _ = os.wait()
        description, reader = running.pop(child)
        with os.fdopen(reader) as answer:
            yield description, json.loads(answer.read() or '"it crashes or hangs"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="that many mutants only, all the known mistakes among them")
    parser.add_argument("--only", default="", help="mutants whose description contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the descriptions and stop")
    options = parser.parse_args()
    os.environ.update(HYPOTHESIS_PROFILE="fast", TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1")
    os.environ.pop("DELORA_SUBJECT", None)

    everything = [mutant for mutant in mutants() if options.only in mutant[0]]
    chosen = everything
    if options.sample:
        known = [mutant for mutant in everything if mutant[0].startswith("known: ")]
        others = [mutant for mutant in everything if mutant not in known]
        random.Random(0).shuffle(others)
        chosen = known + others[: max(0, options.sample - len(known))]
    if options.list:
        print("\n".join(description for description, _ in chosen))
        return
    if red := [test for _, test in run([("unchanged", SOURCE)], 1) if test]:
        sys.exit(f"delora.py itself fails {red[0]}")

    started, survivors = time.monotonic(), []
    for count, (description, test) in enumerate(run(chosen, options.jobs), start=1):
        reason = SURVIVORS.get(description, "no reason is known")
        survivors += [] if test else [description]
        verdict = f"red: {test}" if test else f"SURVIVES: {reason}"
        print(f"{count}/{len(chosen)} {time.monotonic() - started:.0f} s  {description}\n        {verdict}", flush=True)

    killed = len(chosen) - len(survivors)
    print(f"\n{killed} of {len(chosen)} mutants killed, {killed / len(chosen):.1%}, in "
          f"{(time.monotonic() - started) / 60:.0f} minutes; {len(everything)} in all. Survivors:")  # fmt: skip
    for description in survivors:
        print(f"  {description}\n      {SURVIVORS.get(description, 'no reason is known')}")
    unknown = [description for description in survivors if description not in SURVIVORS]
    stale = [d for d in SURVIVORS if d in dict(chosen) and d not in survivors or d not in dict(mutants())]
    for text, descriptions in (("survive without a reason", unknown), ("are listed, but do not survive", stale)):
        if descriptions:
            print(f"{len(descriptions)} {text}: {descriptions}")
    sys.exit(bool(unknown or stale or killed < 0.95 * len(chosen)))


# ------------------------------------------------------------------------------------------------ who may survive

MARGIN = "how far a measured layer may be from linear: rounding stays far below it, layers that bend stay far above"
ELSEWHERE = "shows only on another device"
SURVIVORS: dict[str, str] = {
    "_weight_and_bias: torch.empty(0)  ->  torch.empty(1)": "only its device and its dtype are read",
    "_weight_and_bias: 8 * torch.finfo(bias.dtype).eps  ->  9 * torch.finfo(bias.dtype).eps": MARGIN,
    "_weight_and_bias: -23  ->  -24": MARGIN,
    "_weight_and_bias: 2 * weight.abs().sum(1)  ->  3 * weight.abs().sum(1)": MARGIN,
    "_weight_and_bias: 1 / 16  ->  1 / 17": MARGIN,
    "DeLoRALinear.__init__: torch.empty(0, dtype=dtype)  ->  torch.empty(1, dtype=dtype)": "only its dtype is read",
    "DeLoRALinear.__init__: torch.zeros(64, n_in, **like)  ->  torch.zeros(65, n_in, **like)": "the size of a block",
    "DeLoRALinear.__init__: () if weight.is_meta else weight.detach().split(len(squares))  ->  "
    "weight.detach().split(len(squares))": "on the meta device there are no values: the loop would only take time",
    "DeLoRALinear.__init__: weight.detach()  ->  weight": "autograd records what nobody differentiates",
    "DeLoRALinear.forward: 'cpu' if x.is_meta else x.device.type  ->  'cpu'": ELSEWHERE,
    "DeLoRALinear.delta_weight: 'cpu' if self.delora_A.is_meta else self.delora_A.device.type  ->  'cpu'": ELSEWHERE,
    "load_adapter: getattr(v, 'dtype', None)  ->  getattr(v, 'dtype', 0)": "neither is a dtype",
    "load_adapter: state.get(k, p).to(filled[p])  ->  state.get(k, p)": "shows only where model and checkpoint are on "
    "different devices",
    "load_adapter: value.to(p.device)  ->  value": "shows only where model and checkpoint are on different devices",
}

if __name__ == "__main__":
    main()
