"""Is the contract right? It must pass every right layer of subjects.py, and no wrong one.

    pytest -m slow examples/tests/test_subjects.py    all the right ones, every eighth wrong one
    PYTHONPATH=examples python examples/tests/test_subjects.py    all the wrong ones, as a table

Each layer is tested in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import conformance
import pytest
import subjects

ROOT = Path(__file__).resolve().parent.parent.parent
TIME_LIMIT = 1800  # seconds, for one layer

pytestmark = pytest.mark.slow


def run_contract(subject, profile, *options):
    """The finished process of test_delora.py on a class of subjects.py, in the tier it names."""
    environment = os.environ | {
        "DELORA_SUBJECT": f"examples/tests/subjects.py:{subject.__name__}",
        "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_PROFILE": profile,
    }
    environment.pop("DELORA_QUALITY", None)
    if subject.tier == 2:
        environment["DELORA_QUALITY"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "test_delora.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


def red_tests(subject, profile, *options):
    """The names of the tests that turn red, each once, in the contract's order."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = run_contract(subject, profile, f"--junitxml={report}", *options)
        if run.returncode not in (0, 1):  # 1: some test failed
            raise RuntimeError(f"{subject.__name__}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        cases = ElementTree.parse(report).findall(".//testcase")
    names = []
    for case in cases:
        name = case.get("name").partition("[")[0]
        red = case.find("failure") is not None or case.find("error") is not None
        if red and name not in names:
            names.append(name)
    return names


# Of the wrong layers every eighth one, up to the first red test. The script runs all, to the end.
SAMPLE = subjects.WRONG[::8]


@pytest.fixture(scope="module")
def red():
    """{layer: the tests that turn red on it}, two layers at a time."""
    with ThreadPoolExecutor(2) as pool:
        right = [pool.submit(red_tests, subject, "quick") for subject in subjects.RIGHT]
        wrong = [pool.submit(red_tests, subject, "quick", "-x") for subject in SAMPLE]
        found = [run.result() for run in (*right, *wrong)]
    return dict(zip((*subjects.RIGHT, *SAMPLE), found, strict=True))


@pytest.mark.parametrize("subject", subjects.RIGHT)
def test_a_right_layer_passes(red, subject):
    """All that is wrong with the textbook is zero divided by zero."""
    allowed = []
    if subject is subjects.Textbook:
        allowed = ["test_p4_a_zero_component_adds_nothing"]
    assert red[subject] == allowed


@pytest.mark.parametrize("subject", SAMPLE)
def test_a_wrong_layer_is_noticed_as_the_table_of_conformance_says(red, subject):
    [first] = red[subject]
    table = conformance.__doc__.partition(f"    {in_words(first)}\n")[2]
    under = [line.strip(" *") for line in table.partition("\n    P")[0].splitlines()]
    assert mistake(subject) in under


def in_words(test):
    number, _, words = test.removeprefix("test_p").partition("_")
    return f"P{number} {words.replace('_', ' ')}"


def mistake(subject):
    """What it is, in a few words."""
    return subject.__doc__.partition(":")[0].rstrip(".")


def main():
    """Print the table in the docstring of conformance.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of wrong layers")
    options = parser.parse_args()
    chosen = subjects.WRONG
    if options.only:
        chosen = [subject for subject in chosen if subject.__name__ in options.only]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(red_tests, subject, "fast") for subject in chosen]
        red = {subject: run.result() for subject, run in zip(chosen, runs, strict=True)}
    first_red = [names[0] for names in red.values() if names]
    order = [test for test in conformance.properties() if test in first_red]
    for test in order:
        print(f"    {in_words(test)}")
        for subject, names in red.items():
            if names and names[0] == test:
                star = " *" if len(names) == 1 else ""
                print(f"        {mistake(subject)}{star}")
    unnoticed = [subject.__name__ for subject, names in red.items() if not names]
    if unnoticed:
        sys.exit(f"not noticed: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
