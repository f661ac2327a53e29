"""The table of conformance in examples/README.md says what a run says, tick by tick; needs peft."""

import importlib.metadata
import re
from pathlib import Path

import conformance
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_column_of_peft_in_the_readme_is_what_a_run_gives():
    """A tick, a dash, or a case, whichever."""
    pytest.importorskip("peft")
    tests = conformance.properties()
    failures = conformance.run("examples/conformance.py:PeftDeLoRA", tests, "fast")
    rows = [line.strip("| ").split(" | ") for line in README.splitlines()]
    table = {row[2]: row for row in rows if len(row) > 4 and re.fullmatch(r"P\d+b?", row[0])}
    assert len(table) == len(tests)
    for test, tier in tests.items():
        number, _, words = test.removeprefix("test_p").partition("_")
        row = table[words.replace("_", " ")]
        assert row[:2] == [f"P{number}", str(tier)]
        shown = {"✓": "", "–": None}.get(row[4], "a case")
        measured = failures[test] and "a case"
        assert shown == measured, row


def test_a_failure_is_told_in_words():
    failure = """E       Failing test case: test_x(
E           case=Case(n_in=1, n_out=2, r=3, dtype=torch.float16, lengths=(-4,), mode=(None, False)),
E           c=2,
E           d=0,
E       )
"""
    words = "W 2 × 1, r = 3, float16, lengths 1e-4, w = 1, untied, a_i times 1e2"
    assert conformance.in_words(failure) == words


def test_without_peft_one_line_says_so(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["conformance.py"])
    words = "^conformance.py compares with PEFT, which is not installed: pip install peft$"
    with pytest.raises(SystemExit, match=words):
        conformance.main()
