"""Can the tests fail? Break delora.py in one place at a time, and report which test turns red.

    python .ci/mutants.py                   every mutant: about an hour of CPU time
    python .ci/mutants.py --sample 40       40 of them, half known mistakes, the same every time
    python .ci/mutants.py --only known      those whose description contains the text
    python .ci/mutants.py --contract        by test_delora.py alone: what the contract catches
    python .ci/mutants.py --list            print the descriptions, run nothing

A mutant is delora.py with one mistake in it. The known mistakes are those of other implementations,
or likely ones, by name (KNOWN). The others are small changes, made wherever they can be: another
operator, axis, sign or constant, a condition forced, a guard, a `detach`, a keyword, a context or a
statement dropped.

A mutant is killed if a test of TESTS turns red, or the interpreter crashes, and survives if all
pass. It is timed out if it takes five times the CPU time that delora.py itself takes, its child
processes included; then nobody knows, and it counts neither way. Nor does it if the clock on the
wall ends it, or ends something that a test waits for. A mutant that survives must stand in
SURVIVORS, and one that is timed out in TIMED_OUT, with the reason why.

The exit status is 0 if all is as it should be, and 1 if
- delora.py itself fails a test, or a known mistake cannot be made, cannot be imported, or survives;
- a mutant survives or is timed out, and no reason is given;
- one with a reason is killed after all, or does not exist any more;
- without --only: fewer than 95 % of those that are killed or survive are killed.
With --contract those that survive or are timed out are only listed, whatever they are: the exit
status is 1 if delora.py fails the contract, or a known mistake cannot be made or imported.

Needs torch, pytest, hypothesis, and `fork`, so not Windows.
"""

import argparse
import ast
import copy
import inspect
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# The contract first, which --contract runs alone. The others are what else is asked of delora.py.
TESTS = (
    "test_delora.py",
    "examples/tests/test_layers.py",
    "examples/tests/test_torch.py",
    "examples/tests/test_adapters.py",
    "examples/tests/test_docstrings.py",
)

# Read once: a run takes long, and somebody may edit them meanwhile.
FILES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("delora.py", "pyproject.toml", *TESTS)
    if (ROOT / name).is_file()
}

CPU_FACTOR = 5  # times what delora.py takes; more is a time-out
WALL_FACTOR = 100  # likewise, in seconds on the clock: for what waits for ever and computes nothing

# Functions that are the equation. Half of what is not known in a sample is theirs.
EQUATION = (
    "_unit:",
    "_weight_norms:",
    "DeLoRA.__init__:",
    "DeLoRA.factors:",
    "DeLoRA.delta_weight:",
    "DeLoRA.norm_bound:",
    "DeLoRA.forward:",
    "DeLoRALinear.forward:",
)


class Mutant(NamedTuple):
    description: str  # says where and what, not in which line: it outlives other changes
    source: str  # of delora.py


class Result(NamedTuple):
    description: str
    outcome: str  # "killed", "survived" or "timed out"
    by: str  # the red test, if killed
    seconds: float  # of CPU time


# ----------------------------------------------------------------------------------------------
# Known mistakes
# ----------------------------------------------------------------------------------------------

UNIT = """
v = _wide(v)
norm = torch.linalg.vector_norm(v, dim=dim, keepdim=True)
return v / {}
"""

B_IS_ZERO = """
nn.init.kaiming_uniform_(self.A, a=5**0.5)
nn.init.zeros_(self.B)
"""

FACTORS = """
A, A0 = _unit(torch.stack((self.A, self.A0.detach())), dim=2)
B, B0 = _unit(torch.stack((self.B, self.B0.detach())), dim=1)
lam = _wide(self.lam)
lam0 = lam if self.lam0 is None else _wide(self.lam0.detach())
left = {}
right = {}
return left, right * (_wide(self.w.detach()) / len(A))
"""

KEPT_WITHOUT_GRADIENTS = """
if torch.is_grad_enabled() or not self.enabled:
    return ANY
if not hasattr(self, "kept"):
    self.kept = ANY
return self.kept
"""

# {what the mistake is: {function: its new body, or {what stands in it: what stands there instead}}}
# For a class the code is a method that is added.
# What stands there is found by its syntax tree: an expression, or else a statement, which becomes
# any number of statements. ANY is whatever stands in that place. If it is not there exactly once,
# the script stops.
KNOWN = {
    # The start
    "storage shared with the frozen copy": {
        "DeLoRA.__init__": {
            "_frozen(self.A)": "nn.Parameter(self.A.detach(), requires_grad=False)",
            "_frozen(self.B)": "nn.Parameter(self.B.detach(), requires_grad=False)",
        }
    },
    "storage shared between lam and lam0": {
        "DeLoRA.__init__": {
            "_frozen(self.lam)": "nn.Parameter(self.lam.detach(), requires_grad=False)"
        }
    },
    "B = 0 with a clamp, and no frozen copy": {
        "DeLoRA.__init__": {
            "for p in (self.A, self.B): ANY": B_IS_ZERO,
            "_frozen(self.A)": "_frozen(0 * self.A)",
            "_frozen(self.B)": "_frozen(0 * self.B)",
        },
        "_unit": UNIT.format("norm.clamp(min=1e-4)"),
    },
    "B = 0 with a clamp, and a frozen copy": {
        "DeLoRA.__init__": {"for p in (self.A, self.B): ANY": B_IS_ZERO},
        "_unit": UNIT.format("norm.clamp(min=1e-4)"),
    },
    "A = B = 0 with an epsilon": {
        "DeLoRA.__init__": {"nn.init.kaiming_uniform_(p, a=ANY)": "nn.init.zeros_(p)"},
        "_unit": UNIT.format("(norm + 1e-8)"),
    },
    "frozen copy kept in another precision": {
        "DeLoRA.__init__": {
            "_frozen(self.A)": "_frozen(self.A.bfloat16())",
            "_frozen(self.B)": "_frozen(self.B.bfloat16())",
        }
    },
    "frozen copy kept in float32 on a float64 base": {
        "DeLoRA.__init__": {
            "_frozen(self.A)": "_frozen(self.A.float())",
            "_frozen(self.B)": "_frozen(self.B.float())",
        }
    },
    "frozen copy not saved": {
        "DeLoRA.__init__": {
            "_frozen(self.A)": "self.A.detach().clone()",
            "_frozen(self.B)": "self.B.detach().clone()",
        }
    },
    "frozen copy subtracted as products": {
        "DeLoRA.factors": FACTORS.format(
            "torch.cat((lam * B, -lam0 * B0), dim=1)", "torch.cat((A, A0))"
        )
    },
    "the frozen copy added instead of subtracted": {
        "DeLoRA.factors": FACTORS.format(
            "torch.cat((lam * B, lam0 * B0), dim=1)", "torch.cat((A, A0))"
        )
    },
    "the frozen copy trained too": {
        "DeLoRA.__init__": {
            "_frozen(self.A)": "nn.Parameter(self.A.detach().clone())",
            "_frozen(self.B)": "nn.Parameter(self.B.detach().clone())",
        },
        "DeLoRA.factors": {"self.A0.detach()": "self.A0", "self.B0.detach()": "self.B0"},
    },
    "the frozen copy taken anew when the layer is moved or cast": {
        "DeLoRA": """
            def _apply(self, *arguments, **options):
                super()._apply(*arguments, **options)
                self.A0.data = self.A.detach().clone()
                self.B0.data = self.B.detach().clone()
                return self
        """
    },
    "the frozen copy merged into W at the start": {
        "DeLoRALinear.__init__": {
            "base_layer.requires_grad_(False)": """
                base_layer.requires_grad_(False)
                if _can_be_read(base_layer):
                    A0, B0 = self.delora.A0.data, self.delora.B0.data
                    A, B = A0.clone(), B0.clone()
                    A0.zero_()
                    base_layer.weight.data -= self.delora.delta_weight().detach()
                    B0.zero_()
            """
        }
    },
    "A and B all positive at the start": {
        "DeLoRA.__init__": {
            "nn.init.kaiming_uniform_(p, a=ANY)": "nn.init.kaiming_uniform_(p, a=ANY).data.abs_()"
        }
    },
    "the seed set by building": {
        "DeLoRA.__init__": {
            "super().__init__()": """
                super().__init__()
                torch.manual_seed(0)
            """
        }
    },
    # The equation
    "A and A0 exchanged": {
        "DeLoRA.factors": {
            "torch.stack((self.A, self.A0.detach()))": "torch.stack((self.A0.detach(), self.A))"
        }
    },
    "B and B0 exchanged": {
        "DeLoRA.factors": {
            "torch.stack((self.B, self.B0.detach()))": "torch.stack((self.B0.detach(), self.B))"
        }
    },
    "A and A0, and B and B0, exchanged: the other sign": {
        "DeLoRA.factors": {
            "torch.stack((self.A, self.A0.detach()))": "torch.stack((self.A0.detach(), self.A))",
            "torch.stack((self.B, self.B0.detach()))": "torch.stack((self.B0.detach(), self.B))",
        }
    },
    "lam and lam0 exchanged": {
        "DeLoRA.factors": FACTORS.format(
            "torch.cat((lam0 * (B - B0) + (lam0 - lam) * B0, lam * B0), dim=1)",
            "torch.cat((A, A - A0))",
        )
    },
    "lam not divided by r": {
        "DeLoRA.factors": {"_wide(self.w.detach())": "_wide(self.w.detach()) * len(self.A)"}
    },
    "lam detached": {"DeLoRA.factors": {"_wide(self.lam)": "_wide(self.lam.detach())"}},
    "no normalisation: plain LoRA": {"_unit": "return _wide(v)"},
    "an epsilon added instead of a zero guarded": {"_unit": UNIT.format("(norm + 1e-8)")},
    "a clamp instead of a zero guarded": {"_unit": UNIT.format("norm.clamp(min=1e-12)")},
    "only zero guarded, not what is too short for its squares": {
        "_unit": {"norm < ANY": "norm == 0"}
    },
    "norms of A along the wrong axis": {
        "DeLoRA.factors": {
            "_unit(torch.stack((self.A, self.A0.detach())), dim=2)": (
                "_unit(torch.stack((self.A, self.A0.detach())), dim=1)"
            )
        }
    },
    "norms of B along the wrong axis": {
        "DeLoRA.factors": {
            "_unit(torch.stack((self.B, self.B0.detach())), dim=1)": (
                "_unit(torch.stack((self.B, self.B0.detach())), dim=2)"
            )
        }
    },
    "one norm for all components of A": {
        "DeLoRA.factors": {
            "_unit(torch.stack((self.A, self.A0.detach())), dim=2)": (
                "_unit(torch.stack((self.A, self.A0.detach())), dim=(1, 2))"
            )
        }
    },
    "one norm for all components of B": {
        "DeLoRA.factors": {
            "_unit(torch.stack((self.B, self.B0.detach())), dim=1)": (
                "_unit(torch.stack((self.B, self.B0.detach())), dim=(1, 2))"
            )
        }
    },
    "a norm that overflows clamped to the largest number": {
        "_unit": {
            "v.norm(dim=dim, keepdim=True)": """
                v.norm(dim=dim, keepdim=True).clamp(max=torch.finfo(v.dtype).max)
            """
        }
    },
    "the norms of A detached: its gradient is not tangent": {
        "_unit": {
            "v.norm(dim=dim, keepdim=True)": """
                (v.detach() if dim == 2 else v).norm(dim=dim, keepdim=True)
            """
        }
    },
    "the norms of B detached: its gradient is not tangent": {
        "_unit": {
            "v.norm(dim=dim, keepdim=True)": """
                (v.detach() if dim == 1 else v).norm(dim=dim, keepdim=True)
            """
        }
    },
    "the absolute value of lambda": {"DeLoRA.factors": {"_wide(self.lam)": "abs(_wide(self.lam))"}},
    "the frozen copy multiplied by lambda of the start while tied": {
        "DeLoRA.__init__": {
            "self.weight_norm = weight_norm": """
                self.weight_norm = weight_norm
                self.start = lambda_init
            """
        },
        "DeLoRA.factors": {
            "lam * torch.cat((B_hat - B0_hat, B0_hat), dim=1)": """
                torch.cat(
                    (
                        lam * (B_hat - B0_hat) + (lam - self.start) * B0_hat,
                        self.start * B0_hat,
                    ),
                    dim=1,
                )
            """
        },
    },
    "the update transposed if it is square": {
        "DeLoRA.factors": {
            "return left, ANY": """
                left, right = left, ANY
                if len(left) == right.shape[1]:
                    return right.T, left.T
                return left, right
            """
        }
    },
    "the bound called lambda, without the column norms": {
        "DeLoRA.norm_bound": {"(abs(self.lam) + abs(lam0)) * ANY": "abs(self.lam) + abs(lam0)"}
    },
    "factors kept from the first call": {
        "DeLoRA.factors": {
            "return ANY": """
                if not hasattr(self, "kept"):
                    self.kept = ANY
                return self.kept
            """
        }
    },
    "factors kept from the first call in evaluation": {
        "DeLoRALinear.forward": {
            "left, right = self.delora.factors()": """
                left, right = self.delora.factors()
                if not self.training:
                    if not hasattr(self, "kept"):
                        self.kept = left.detach(), right.detach()
                    left, right = self.kept
            """
        }
    },
    "a weight kept from the first call in evaluation": {
        "DeLoRALinear.weight": {
            "return ANY": """
                if self.training or not self.enabled:
                    return ANY
                if not hasattr(self, "kept"):
                    self.kept = ANY.detach()
                return self.kept
            """
        }
    },
    "factors kept from the first call without gradients": {
        "DeLoRALinear.forward": {
            "left, right = self.delora.factors()": """
                left, right = self.delora.factors()
                if not torch.is_grad_enabled():
                    if not hasattr(self, "kept"):
                        self.kept = left, right
                    left, right = self.kept
            """
        }
    },
    "a weight kept from the first call without gradients": {
        "DeLoRALinear.weight": {"return ANY": KEPT_WITHOUT_GRADIENTS}
    },
    # The norms of W
    "column norms of W along the wrong axis": {"_weight_norms": {"ANY.sum(0)": "ANY.sum(1)"}},
    "column norms taken anew after a merge": {
        "DeLoRALinear.merged": {
            "return ANY": """
                self.delora.w.data = _weight_norms(linear.weight, self.delora.weight_norm)
                return ANY
            """
        }
    },
    "column norms of the first 64 rows": {"_weight_norms": {"_wide(weight)": "_wide(weight[:64])"}},
    "column norms taken anew in every forward pass": {
        "DeLoRALinear.forward": {
            "left, right = self.delora.factors()": """
                mode, w = self.delora.weight_norm, self.delora.w.data
                if mode and _can_be_read(self.base_layer) and not torch.compiler.is_compiling():
                    dim = 0 if mode == "column" else None
                    with torch.no_grad():
                        W = self.base_layer.weight
                        now = torch.linalg.vector_norm(W, dim=dim, dtype=torch.float64)
                        w.copy_(torch.where((now - w).abs() < 0.01 * w, w, now))
                left, right = self.delora.factors()
            """
        }
    },
    # State: what is trained, saved, moved, copied. What is kept by mistake is not kept while torch
    # compiles or exports: it would refuse that, which is no test's merit.
    "lambda a buffer, which no optimiser sees": {
        "DeLoRA.__init__": {
            "self.lam = nn.Parameter(ANY)": "self.register_buffer('lam', ANY.requires_grad_())"
        },
        "param_groups": {"delora.lam.requires_grad": "isinstance(delora.lam, nn.Parameter)"},
    },
    "A a buffer, which no optimiser sees": {
        "DeLoRA.__init__": {
            "self.A = nn.Parameter(ANY)": "self.register_buffer('A', ANY.requires_grad_())"
        }
    },
    "w neither saved nor moved": {
        "DeLoRA.__init__": {"_frozen(w)": "w.detach().clone()"},
        "load_adapter": {
            "values[adapter.delora.w]": "values.get(adapter.delora.w, adapter.delora.w)"
        },
    },
    "a tensor with a graph kept: no deepcopy": {
        "DeLoRA.__init__": {
            "self.weight_norm = weight_norm": """
                self.weight_norm = weight_norm
                self.scale = self.lam / r
            """
        }
    },
    "the last output kept with its graph: no deepcopy after a forward pass": {
        "DeLoRALinear.forward": {
            "return total": """
                if not torch.compiler.is_compiling():
                    self.last = total
                return total
            """
        }
    },
    "every update kept in a list": {
        "DeLoRA.__init__": {
            "self.weight_norm = weight_norm": """
                self.weight_norm = weight_norm
                self.kept = []
            """
        },
        "DeLoRA.delta_weight": {
            "return torch.matmul(*ANY)": """
                delta = torch.matmul(*ANY)
                if not torch.compiler.is_compiling():
                    self.kept.append(delta.detach())
                return delta
            """
        },
    },
    "the factors of every forward pass kept in a list": {
        "DeLoRALinear.__init__": {
            "self.enabled = True": """
                self.enabled = True
                self.kept = []
            """
        },
        "DeLoRALinear.forward": {
            "left, right = self.delora.factors()": """
                left, right = self.delora.factors()
                if not torch.compiler.is_compiling():
                    self.kept.append((left.detach(), right.detach()))
            """
        },
    },
    # The layer
    "W and b copied": {
        "DeLoRALinear.__init__": {
            "base_layer.requires_grad_(False)": """
                import copy
                base_layer.requires_grad_(False)
                self.base_layer = copy.deepcopy(base_layer)
            """
        }
    },
    "a trainable bias beside that of the base layer": {
        "DeLoRALinear.__init__": {
            "self.enabled = True": """
                self.enabled = True
                self.delora.bias = nn.Parameter(self.delora.B.new_zeros(len(weight)))
            """
        },
        "DeLoRALinear.forward": {"total += y": "total += y + self.delora.bias.to(y.dtype)"},
    },
    "x detached on its way to the adapter": {
        "DeLoRALinear.forward": {"self.dropout(x)": "self.dropout(x).detach()"}
    },
    "a version counter read, which fails in torch.inference_mode()": {
        "DeLoRALinear.forward": {
            "return total": """
                if not torch.compiler.is_compiling():
                    self.version = total._version
                return total
            """
        }
    },
    "the update added to the base's output in place": {
        "DeLoRALinear.forward": {"ANY += y": "ANY = y.add_(ANY)"}
    },
    ".weight forwarded to the base": {"DeLoRALinear.weight": {"self.delora(ANY)": "ANY"}},
    ".weight without gradients": {
        "DeLoRALinear.weight": {"self.delora(ANY)": "self.delora(ANY).detach()"}
    },
    "dropout of the rank instead of the input": {
        "DeLoRALinear.forward": {
            "self.dropout(x)": "x",
            "nn.functional.linear(ANY, left.to(y.dtype))": (
                "nn.functional.linear(self.dropout(ANY), left.to(y.dtype))"
            ),
        }
    },
    "dropout at twice the probability": {
        "DeLoRALinear.__init__": {"nn.Dropout(dropout)": "nn.Dropout(min(2 * dropout, 0.9))"}
    },
    "dropout applied twice": {
        "DeLoRALinear.forward": {"self.dropout(x)": "self.dropout(self.dropout(x))"}
    },
    "dropout without rescaling": {
        "DeLoRALinear.forward": {
            "self.dropout(x)": """
                self.dropout(x) * (1 - self.dropout.p) if self.training and self.dropout.p else x
            """
        }
    },
    "the base layer registered after the adapter": {
        "DeLoRALinear.__init__": {
            "self.base_layer = base_layer": "",
            "self.dropout = nn.Dropout(dropout)": """
                self.dropout = nn.Dropout(dropout)
                self.base_layer = base_layer
            """,
        }
    },
    "W left trainable": {
        "DeLoRALinear.__init__": {
            "base_layer.requires_grad_(False)": """
                for p in base_layer.parameters():
                    if p.dim() == 1:
                        p.requires_grad = False
            """
        },
        "_adapting": {
            "set(model.parameters()) - _adapter_parameters(model)": """
                set(model.parameters()) - _adapter_parameters(model) - {
                    p for layer in plan for p in layer.parameters() if p.dim() > 1
                }
            """
        },
    },
    "the bias left trainable": {
        "DeLoRALinear.__init__": {
            "base_layer.requires_grad_(False)": """
                for p in base_layer.parameters():
                    if p.dim() > 1:
                        p.requires_grad = False
            """
        },
        "_adapting": {
            "set(model.parameters()) - _adapter_parameters(model)": """
                set(model.parameters()) - _adapter_parameters(model) - {
                    p for layer in plan for p in layer.parameters() if p.dim() == 1
                }
            """
        },
    },
    # Layers that are measured
    "a measured weight transposed": {"_weight_and_bias": {"return W, ANY": "return W.T, ANY"}},
    "a measured weight transposed if it is square": {
        "_weight_and_bias": {"return W, ANY": "return W.T if n_in == n_out else W, ANY"}
    },
    "a square Conv1D read as it is stored": {
        "_weight_and_bias": {
            "_can_be_read(layer)": """
                _can_be_read(layer) or (
                    type(layer).__name__ == "Conv1D" and len(set(_features(layer))) == 1
                )
            """
        }
    },
    "measuring without subtracting the bias": {
        "_weight_and_bias": {
            "(layer(rows.requires_grad_()) - ANY).T / 1024": "layer(rows.requires_grad_()).T / 512"
        }
    },
    "measuring from one side": {
        "_weight_and_bias": {
            "(layer(rows.requires_grad_()) - ANY).T / 1024": (
                "(layer(rows.requires_grad_()) - b).T / 512"
            )
        }
    },
    "equal inputs for the proof that a layer is linear": {
        "_weight_and_bias": {"rows.fill_(1)[:, ::2] = -1": "rows.fill_(-1)"}
    },
    "loaded before it is compared": {
        "load_adapter": {
            "adapters = _modules(model, DeLoRALinear)": """
                adapters = _modules(model, DeLoRALinear)
                for p, value in values.items():
                    p.copy_(value)
            """
        }
    },
    # A model
    "merging into the tied tensor": {
        "DeLoRALinear.merged": {
            "_frozen(self.delora(ANY))": (
                "nn.Parameter(ANY.data.copy_(self.delora(ANY)), requires_grad=False)"
            )
        }
    },
    "the bias forgotten by merging": {
        "DeLoRALinear.merged": {"linear.bias = ANY": "linear.bias = None"}
    },
    "merging with lambda of the start": {
        "DeLoRA.__init__": {
            "self.weight_norm = weight_norm": """
                self.weight_norm = weight_norm
                self.start = lambda_init
            """
        },
        "DeLoRALinear.merged": {
            "linear.weight = ANY": """
                lam = self.delora.lam.detach().clone()
                self.delora.lam.data.fill_(self.delora.start)
                linear.weight = ANY
                self.delora.lam.data.copy_(lam)
            """
        },
    },
    "merging rounds twice": {
        "DeLoRA.forward": {"self.delta_weight()": "self.delta_weight().to(weight.dtype)"}
    },
    "one name of a shared module adapted": {
        "_replace": {
            "for parent in list(model.modules()): ANY": """
                new = dict(new)
                for parent in list(model.modules()):
                    for name, child in parent._modules.items():
                        if child in new:
                            setattr(parent, name, new.pop(child))
            """
        }
    },
    "one name of a shared module found": {
        "_modules": {"model.named_modules(ANY, remove_duplicate=False)": "model.named_modules(ANY)"}
    },
    "weight decay of lambda": {
        "param_groups": {
            "{'params': [*strengths], 'lr': ANY, 'weight_decay': 0.0}": (
                "{'params': [*strengths], 'lr': ANY, 'weight_decay': weight_decay}"
            )
        }
    },
    "loading makes trainable what the file holds": {
        "load_adapter": {
            "return adapters": """
                for key, p in model.named_parameters(remove_duplicate=False):
                    if key in state_dict and p not in _adapter_parameters(model):
                        p.requires_grad = True
                return adapters
            """
        }
    },
}


def parts(node):
    """(field, holder, key, part) of what a node consists of: holder[key] is the part."""
    for field, value in ast.iter_fields(node):
        if isinstance(value, list):
            holder, keys = value, list(range(len(value)))
        else:
            holder, keys = vars(node), [field]
        for key in keys:
            if isinstance(holder[key], ast.AST):
                yield field, holder, key, holder[key]


def parsed(code):
    """The statements of some lines, which may be indented."""
    return ast.parse(textwrap.dedent(code).strip()).body


def find_function(tree, name):
    """The function, or the class, of that dotted name."""
    node = tree
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if len(found) != 1:
            raise LookupError(f"it is defined {len(found)} times, not once")
        node = found[0]
    return node


def is_any(node):
    """Whether it is ANY, as an expression or as a statement."""
    if isinstance(node, ast.Expr):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "ANY"


def matches(pattern, node, any_found):
    """Whether node is the same code as pattern. What ANY stands for is appended to any_found."""
    if is_any(pattern):
        any_found.append(node)
        return True
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        if len(pattern) != len(node):
            return False
        return all(matches(pattern[i], node[i], any_found) for i in range(len(pattern)))
    if isinstance(pattern, ast.AST):
        return all(
            matches(getattr(pattern, field, None), getattr(node, field, None), any_found)
            for field in pattern._fields
        )
    return pattern == node


class Filled(ast.NodeTransformer):
    """Code with every ANY replaced by what it stands for."""

    def __init__(self, any_found):
        self.any_found = any_found

    def visit_Name(self, node):
        return copy.deepcopy(self.any_found[0]) if is_any(node) else node


def find(pattern, node):
    """(holder, key, what ANY stands for) of everything in node that is the same code as pattern."""
    for _, holder, key, part in parts(node):
        any_found = []
        if matches(pattern, part, any_found):
            yield holder, key, any_found
        yield from find(pattern, part)


def replace(function, old, new):
    """In that function, put the code `new` where the code `old` is."""
    [pattern] = parsed(old)
    instead = parsed(new)
    if isinstance(pattern, ast.Expr) and [type(node) for node in instead] == [ast.Expr]:
        pattern = pattern.value
        instead = [instead[0].value]
    found = list(find(pattern, function))
    if len(found) != 1:
        raise LookupError(f"this is there {len(found)} times, not once: {old.strip()}")
    holder, key, any_found = found[0]
    instead = [Filled(any_found).visit(node) for node in instead]
    if isinstance(pattern, ast.stmt):
        holder[key : key + 1] = instead
    else:
        holder[key] = instead[0]


def known_mutants():
    for name, mistake in KNOWN.items():
        tree = ast.parse(FILES["delora.py"])
        try:
            for function_name, change in mistake.items():
                function = find_function(tree, function_name)
                if isinstance(function, ast.ClassDef):
                    function.body += parsed(change)
                elif isinstance(change, str):
                    function.body = parsed(change)
                else:
                    for old, new in change.items():
                        replace(function, old, new)
        except LookupError as error:
            sys.exit(f"A known mistake cannot be made: {name}. In {function_name}: {error}")
        yield Mutant(f"known: {name}", ast.unparse(ast.fix_missing_locations(tree)))


# ----------------------------------------------------------------------------------------------
# Small changes
# ----------------------------------------------------------------------------------------------

OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}

# Methods whose call may be forgotten: `x.detach()` becomes `x`.
FORGOTTEN = {
    "abs",
    "clone",
    "detach",
    "expand_as",
    "flatten",
    "float",
    "full_tensor",
    "isfinite",
    "masked_fill",
    "max",
    "mean",
    "norm",
    "requires_grad_",
    "sqrt",
    "square",
    "sum",
    "to",
    "train",
    "view_as",
}

DROPPED = None  # instead of a statement
LONG = 100  # characters


def without(items, i):
    return items[:i] + items[i + 1 :]


def variants(node):
    """What an expression or a statement could be by mistake."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OTHER_OPERATOR:
            yield ast.BinOp(left, OTHER_OPERATOR[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OTHER_OPERATOR[type(op)](), values)
            for i in range(len(values)):
                rest = without(values, i)
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                other = OTHER_OPERATOR[type(op)]()
                yield ast.Compare(left, [*ops[:i], other, *ops[i + 1 :]], comparators)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(1 if value == 0 else value - 1)
        case ast.Constant(float() as value):
            yield ast.Constant(2 * value if value else 1.0)
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
            if isinstance(function, ast.Attribute) and function.attr in FORGOTTEN:
                yield function.value
            for i in range(len(keywords)):
                yield ast.Call(function, arguments, without(keywords, i))
        case ast.Attribute(value, "T"):
            yield value
        case ast.comprehension(target, iterator, [_, *_]):
            yield ast.comprehension(target, iterator, [], 0)
        case ast.Expr() | ast.Raise():
            yield DROPPED
        case ast.AugAssign(target, op, value):
            yield DROPPED
            if type(op) in OTHER_OPERATOR:
                yield ast.AugAssign(target, OTHER_OPERATOR[type(op)](), value)
        case ast.Assign([ast.Attribute() | ast.Subscript(), *_]):
            yield DROPPED
        case ast.With(items, body):
            for i in range(len(items)):
                rest = without(items, i)
                yield ast.With(rest, body) if rest else ast.If(ast.Constant(True), body, [])
        case ast.FunctionDef(decorator_list=decorators):
            for i in range(len(decorators)):
                undecorated = copy.copy(node)
                undecorated.decorator_list = without(decorators, i)
                yield undecorated


def is_docstring_or_import(node):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_message(node):
    """Whether it says something to a user: `raise ...`, `warnings.warn(...)`, `error.args = ...`.

    It may be dropped, but what it says is not changed.
    """
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "warnings.warn"
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "error.args"


def compares_with_none(node):
    """`x is None`: `x is 0` would be a SyntaxWarning, which is no test's merit."""
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot))


def places(node, function=""):
    """(function, parent, holder, key) of all that may be changed: holder[key] is a part of parent.

    Not types, messages, docstrings and imports.
    """
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    if is_message(node):
        return
    for field, holder, key, part in parts(node):
        if field in ("annotation", "returns", "type_params", "format_spec"):
            continue
        if is_docstring_or_import(part):
            continue
        if not (compares_with_none(node) and isinstance(part, ast.Constant)):
            yield function, node, holder, key
        yield from places(part, function)


def text(node):
    """The code on one line: of a statement with a body the head, of long code both ends."""
    if node is DROPPED:
        return "dropped"
    if isinstance(node, ast.If):
        return f"if {text(node.test)}: ..."
    if isinstance(node, ast.With):
        return f"with {', '.join(text(item) for item in node.items)}: ..."
    if isinstance(node, ast.FunctionDef):
        decorators = [f"@{text(decorator)} " for decorator in node.decorator_list]
        return f"{''.join(decorators)}def {node.name}"
    code = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return code if len(code) < LONG else f"{code[:60]} ... {code[-35:]}"


def small_mutants():
    tree = ast.parse(FILES["delora.py"])
    seen = Counter()
    for function, parent, holder, key in list(places(tree)):  # a list: the tree changes meanwhile
        original = holder[key]
        # A constant says little by itself. With what is around it, one sees which it is.
        with_parent = (
            isinstance(original, ast.Constant)
            and isinstance(parent, (ast.expr, ast.keyword))
            and len(ast.unparse(parent)) < LONG
        )
        before = text(parent if with_parent else original)
        for variant in variants(original):
            holder[key] = ast.Pass() if variant is DROPPED else variant
            source = ast.unparse(ast.fix_missing_locations(tree))
            after = text(parent if with_parent else variant)
            holder[key] = original
            description = f"{function or 'module'}: {before}  ->  {after}"
            seen[description] += 1
            if seen[description] > 1:
                description += f"  #{seen[description]}"
            yield Mutant(description, source)


def shuffled_by_description(mutants):
    """In an order that depends on nothing else."""
    return sorted(mutants, key=lambda mutant: random.Random(mutant.description).random())


def sample(others, n):
    """n of them, half from the equation."""
    shuffled = shuffled_by_description(others)
    equation = [mutant for mutant in shuffled if mutant.description.startswith(EQUATION)]
    chosen = equation[: (n + 1) // 2]
    elsewhere = [mutant for mutant in shuffled if mutant not in chosen]
    return chosen + elsewhere[: n - len(chosen)]


# ----------------------------------------------------------------------------------------------
# Who notices
# ----------------------------------------------------------------------------------------------


def slowness(item):
    """0: a quick test, 1: one that draws examples, 2: one that compiles or starts Python."""
    source = inspect.getsource(item.function)
    if "torch.compile(" in source or "subprocess." in source:
        return 2
    return int(hypothesis.is_hypothesis_test(item.function))


NO_IMPORT = "cannot be imported"
CLOCK = "something took too long by the clock"  # instead of a test's name


class FirstFailure:
    """The pytest plugin that runs quick tests first, and remembers the first red one."""

    name = ""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=slowness)

    def pytest_exception_interact(self, call):  # comes after the report
        if isinstance(call.excinfo.value, (TimeoutError, subprocess.TimeoutExpired)):
            self.name = CLOCK

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("examples/tests/")

    def pytest_collectreport(self, report):
        if report.failed:
            self.name = f"{report.nodeid.removeprefix('examples/tests/')} {NO_IMPORT}"


def first_red_test(folder, tests):
    """The test that turns red on the delora.py in that folder, "" if none does."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    # What Hypothesis calls too slow it takes from the clock. The profiles of tests inherit this.
    too_slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("no clock", deadline=None, suppress_health_check=too_slow)
    hypothesis.settings.load_profile("no clock")
    watch = FirstFailure()
    early = "ignore:Module already imported so cannot be rewritten"  # Hypothesis is, above
    arguments = ["-x", "-p", "no:cacheprovider", "-W", early, *tests]
    status = pytest.main(arguments, plugins=[watch])
    if status == 0 or watch.name:
        return watch.name
    return f"pytest ended with {status}"


def start(mutant, cpu_limit, tests):
    """Test a mutant in a fork of this process: (process, pipe with the answer, its folder)."""
    folder = tempfile.mkdtemp()
    for name, content in (FILES | {"delora.py": mutant.source}).items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit + 5))  # SIGXCPU ends it
        signal.alarm(cpu_limit * WALL_FACTOR // CPU_FACTOR)  # SIGALRM ends it
        os.write(writer, json.dumps(first_red_test(folder, tests)).encode())
        os._exit(0)
    os.close(writer)
    return process, reader, folder


def run(mutants, jobs, cpu_limit, tests):
    """The result of each, as they come in."""
    waiting = list(reversed(mutants))
    running = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            process, reader, folder = start(mutant, cpu_limit, tests)
            running[process] = mutant.description, reader, folder
        process, status, usage = os.wait4(-1, 0)
        description, reader, folder = running.pop(process)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        shutil.rmtree(folder, ignore_errors=True)
        seconds = usage.ru_utime + usage.ru_stime  # with those of the processes that it started
        stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
            signal.SIGXCPU,
            signal.SIGALRM,
            signal.SIGKILL,  # by somebody else: the machine is out of memory
        )
        red = json.loads(answer) if answer else "the interpreter crashes"
        if stopped or seconds > cpu_limit or red == CLOCK:
            yield Result(description, "timed out", "", seconds)
        elif red:
            yield Result(description, "killed", red, seconds)
        else:
            yield Result(description, "survived", "", seconds)


def show(result):
    match result.outcome:
        case "killed":
            return f"red: {result.by}"
        case "survived":
            return f"SURVIVES: {SURVIVORS.get(result.description, 'no reason is known')}"
        case "timed out":
            return f"TIMED OUT: {TIMED_OUT.get(result.description, 'no reason is known')}"


def not_imported(results):
    """The known mistakes that are none: they broke the file, a line each."""
    for result in results:
        if result.description.startswith("known: ") and result.by.endswith(NO_IMPORT):
            yield f"a known mistake cannot be imported: {result.description}"


def complaints(results, names):
    """What is not as it should be, a line each. names are the descriptions of all mutants."""
    for result in results:
        if result.description.startswith("known: "):
            if result.outcome == "survived":
                yield f"a known mistake survives: {result.description}"
        elif result.outcome == "survived" and result.description not in SURVIVORS:
            yield f"survives, and no reason is given: {result.description}"
        if result.outcome == "timed out" and result.description not in TIMED_OUT:
            yield f"is timed out, and no reason is given: {result.description}"
        if result.outcome != "survived" and result.description in SURVIVORS:
            yield f"stands in SURVIVORS, but is {result.outcome}: {result.description}"
        if result.outcome != "timed out" and result.description in TIMED_OUT:
            yield f"stands in TIMED_OUT, but {result.outcome}: {result.description}"
    for description in [*SURVIVORS, *TIMED_OUT]:
        if description not in names:
            yield f"has a reason, but does not exist: {description}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="that many, half of them known")
    parser.add_argument("--only", default="", help="those whose description contains this text")
    parser.add_argument("--contract", action="store_true", help=f"run {TESTS[0]} alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--list", action="store_true", help="print the descriptions and stop")
    options = parser.parse_args()

    known, others = list(known_mutants()), list(small_mutants())
    names = {mutant.description for mutant in known + others}
    known = [mutant for mutant in known if options.only in mutant.description]
    others = [mutant for mutant in others if options.only in mutant.description]
    if options.sample is not None:
        known = shuffled_by_description(known)[: options.sample // 2]
        others = sample(others, options.sample - len(known))
    chosen = known + others
    if options.list:
        for mutant in chosen:
            print(mutant.description)
        return
    if not chosen:
        sys.exit(f"no mutant has {options.only!r} in its description")

    tests = TESTS[:1] if options.contract else TESTS
    missing = [name for name in tests if name not in FILES]
    if missing:
        sys.exit(f"not in {ROOT}: {', '.join(missing)}")

    os.environ["HYPOTHESIS_PROFILE"] = "fast"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("DELORA_SUBJECT", None)
    unchanged = Mutant("unchanged", ast.unparse(ast.parse(FILES["delora.py"])))
    [result] = run([unchanged], 1, 3600, tests)
    if result.outcome != "survived":
        sys.exit(f"delora.py itself: {show(result)}")
    print(f"unchanged: all tests pass, in {result.seconds:.0f} s of CPU time", flush=True)
    cpu_limit = int(CPU_FACTOR * result.seconds) + 1

    started = time.monotonic()
    results = []
    for result in run(chosen, options.jobs, cpu_limit, tests):
        results.append(result)
        print(f"{len(results)}/{len(chosen)}  {result.description}")
        print(f"        {result.seconds:.0f} s  {show(result)}", flush=True)

    minutes = (time.monotonic() - started) / 60
    outcomes = Counter(result.outcome for result in results)
    decided = outcomes["killed"] + outcomes["survived"]
    share = outcomes["killed"] / max(decided, 1)
    print(f"\n{outcomes['killed']} of {decided} mutants killed, {share:.1%}.")
    print(f"{outcomes['timed out']} are timed out.")
    print(f"{len(results)} of {len(names)} were run, in {minutes:.0f} minutes.")
    for result in results:
        if result.outcome != "killed":
            print(f"  {result.description}\n      {show(result)}")

    if options.contract:
        problems = list(not_imported(results))
    else:
        problems = [*not_imported(results), *complaints(results, names)]
        if share < 0.95 and not options.only:
            problems.append("fewer than 95 % are killed")
    for problem in problems:
        print(f"! {problem}")
    sys.exit(1 if problems else 0)


# ----------------------------------------------------------------------------------------------
# Who may survive
# ----------------------------------------------------------------------------------------------

BLOCK = "the size of a block"
DEVICE = "shows only on another device"
PROCESSES = "shows only in several processes: examples/tests/test_distributed.py turns red"
MARGIN = "rounding stays far below what is allowed, and what is not linear far above"

# {description: why a user could not notice either}
SURVIVORS = {
    "_unit: norm < torch.finfo(v.dtype).tiny ** 0.5  ->  "
    "norm <= torch.finfo(v.dtype).tiny ** 0.5": (
        "one number, at which it is as good to have a direction as to have none"
    ),
    "_frozen: value.detach()  ->  value": "nn.Parameter detaches what it is given",
    "_no_autocast: 'cpu' if x.is_meta else x.device.type  ->  'cpu'": DEVICE,
    "DeLoRA.norm_bound: if hasattr(bound, 'full_tensor'): ...  ->  if False: ...": PROCESSES,
    "DeLoRA.norm_bound: hasattr(bound, 'full_tensor')  ->  hasattr(bound, 'full_tensor_')": (
        PROCESSES
    ),
    "DeLoRA.norm_bound: bound.full_tensor()  ->  bound": PROCESSES,
    "_weight_and_bias: torch.empty(0)  ->  torch.empty(1)": "only its device and dtype are read",
    "_weight_and_bias: torch.arange(n_in).split(256)  ->  torch.arange(n_in).split(255)": BLOCK,
    "_weight_and_bias: (W.norm(dim=1) + abs(b)) / 16  ->  (W.norm(dim=1) + abs(b)) / 15": MARGIN,
    "param_groups: delora.A.dtype.itemsize < 4  ->  delora.A.dtype.itemsize < 3": (
        "no dtype has three bytes"
    ),
    "adapter_state_dict: model.state_dict()  ->  dropped": PROCESSES,
    "load_adapter: getattr(A, 'ndim', 0)  ->  getattr(A, 'ndim', 1)": "neither is 2",
}

# {description: why it takes so long}
TIMED_OUT = {}


if __name__ == "__main__":
    main()
