"""What examples/README.md and README say of the experiments: each number is that of the runs.

A reading is a sentence with gaps, and a function for what stands in them. After all readings of a
section are found in it, no number with a decimal point, a per cent sign or a degree sign may be
left over. Of README its table of results is compared, and the sentences listed below.
"""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import ablation
import common
import forgetting
import ladder
import pytest
import rates
import robustness
import speed
import start
import strength
import width
from common import FULL, LORA, OURS, PEFT_DELORA, PEFT_DORA, over_seeds

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = {}
for path in sorted(common.RESULTS.glob("*.json")):
    FOUND[path.stem] = json.loads(path.read_text(encoding="utf-8"))


def section(name):
    """The part of examples/README.md that has that figure."""
    sections = re.split(r"^(?=#{1,3} )", EXAMPLES, flags=re.MULTILINE)
    return next(part for part in sections if f"results/{name}.svg" in part)


def sentences(text):
    """Text without code, tables, pictures and line breaks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\||!\[|#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", text)
    return " ".join(text.split())


def mean(name, key, **which):
    return statistics.fmean(over_seeds(FOUND[name]["runs"], key, **which))


def best(name, **which):
    """The lowest mean loss on the new text over all settings that match which."""
    runs = [run for run in FOUND[name]["runs"] if all(run[k] == v for k, v in which.items())]
    means = []
    for run in runs:
        setting = {key: run[key] for key in ("lr", "strength") if key in run}
        means.append(mean(name, "new", **(which | setting)))
    return min(means)


def at(method, exponent, key="new"):
    """The mean over seeds in robustness.py, at that power of ten."""
    return mean("robustness", key, method=method, lr=10**exponent)


def decades(name, method):
    """The mean width of the range of good rates, near the method's own best."""
    runs = [run for run in FOUND[name]["runs"] if run["method"] == method]
    tried = sorted({run["lr"] for run in runs})
    widths = []
    for losses in robustness.by_seed(runs, method, tried):
        widths.append(robustness.width(tried, losses, min(losses) + common.NEAR)[0])
    return statistics.fmean(widths)


def decades_for_the_same_loss(method):
    """Likewise, near the best loss that any adapter reaches."""
    runs = FOUND["robustness"]["runs"]
    tried = sorted({run["lr"] for run in runs})
    bests = []
    for adapter in (LORA, PEFT_DORA, PEFT_DELORA, OURS):
        by_seed = robustness.by_seed(runs, adapter, tried)
        bests.append(statistics.fmean(min(losses) for losses in by_seed))
    widths = []
    for losses in robustness.by_seed(runs, method, tried):
        widths.append(robustness.width(tried, losses, min(bests) + common.NEAR)[0])
    return statistics.fmean(widths)


ROBUSTNESS = (
    (
        "At 1e-1 LoRA's loss is {:.2f} at a distance of {:.0f}, where ‖W‖ is {:.0f}",
        lambda: (at(LORA, -1), at(LORA, -1, "moved"), FOUND["robustness"]["norm"]),
    ),
    (
        "DoRA's is {:.2f} at a distance of {:.0f}",
        lambda: (at(PEFT_DORA, -1), at(PEFT_DORA, -1, "moved")),
    ),
    (
        "To stay nearer helps at 3.2e-2, {:.2f} against LoRA's {:.2f}",
        lambda: (at(PEFT_DORA, -1.5), at(LORA, -1.5)),
    ),
    (
        "DeLoRA's is {:.2f} at a distance of {:.0f}",
        lambda: (at(OURS, -1), at(OURS, -1, "moved")),
    ),
    (
        "LoRA reaches {:.3f}, DoRA {:.3f}, DeLoRA {:.3f}, full fine-tuning {:.3f} and PEFT's "
        "DeLoRA {:.3f}",
        lambda: [
            best("robustness", method=method)
            for method in (LORA, PEFT_DORA, OURS, FULL, PEFT_DELORA)
        ],
    ),
    (
        "{:.2f} decades for LoRA, {:.2f} for DoRA and {:.2f} for DeLoRA",
        lambda: [decades("robustness", method) for method in (LORA, PEFT_DORA, OURS)],
    ),
    (
        "{:.2f}, {:.2f} and {:.2f}",
        lambda: [decades_for_the_same_loss(method) for method in (LORA, PEFT_DORA, OURS)],
    ),
    (
        "{:.3f} against {:.3f} at 3.2e-3, {:.3f} against {:.3f} at 1e-3 and {:.3f} against {:.3f} "
        "at 3.2e-4",
        lambda: [at(m, lr) for lr in (-2.5, -3, -3.5) for m in (OURS, LORA)],
    ),
    (
        "from 1e-2 to 1 grows a hundredfold, a_i becomes {:.0f} times as long and b_i {:.0f} times",
        lambda: [at(OURS, 0, key) / at(OURS, -2, key) for key in ("length_a", "length_b")],
    ),
    (
        "by nearly a right angle ({:.0f}° and {:.0f}°)",
        lambda: [at(OURS, 0, key) for key in ("turned_a", "turned_b")],
    ),
    (
        "PEFT's DeLoRA has the widest, {:.2f}",
        lambda: [decades("robustness", PEFT_DELORA)],
    ),
    (
        "has the widest, {:.2f}",
        lambda: [decades_for_the_same_loss(FULL)],
    ),
)
ABLATION = (
    (
        "from {:.2f} to {:.2f} decades",
        lambda: [decades("ablation", row) for row in (LORA, "+ normalised, λ")],
    ),
    (
        "by column to {:.2f} and by Frobenius norm to {:.2f}",
        lambda: [decades("ablation", row) for row in ("+ w, by column", "+ w, Frobenius")],
    ),
    (
        "best losses are {:.3f}, {:.3f} and {:.3f}",
        lambda: [
            best("ablation", method=row)
            for row in ("+ w, by column", "by column, λ untied", ablation.FIXED)
        ],
    ),
    (
        "Without the frozen copy it is {:.3f}",
        lambda: [best("ablation", method=ablation.ZERO_B)],
    ),
    (
        "LoRA's best is the lowest, {:.3f}, then come {:.3f} without w, {:.3f} by column and "
        "{:.3f} by Frobenius norm",
        lambda: [
            best("ablation", method=row)
            for row in (LORA, "+ normalised, λ", "+ w, by column", "+ w, Frobenius")
        ],
    ),
)


def moved_at_start(which, lr, step):
    runs = over_seeds(FOUND["start"]["runs"], "moved", start=which, lr=lr)
    return statistics.fmean(run[step] for run in runs)


def loss_at_start(which, lr, step):
    runs = over_seeds(FOUND["start"]["runs"], "loss", start=which, lr=lr)
    return statistics.fmean(run[step] for run in runs)


START = (
    (
        "At a rate of 1e-5 the first step from B = 0 goes as far ({:.1f}) as at 1e-2 ({:.1f})",
        lambda: [moved_at_start(start.CLAMPED, lr, 1) for lr in (1e-5, 1e-2)],
    ),
    (
        "With the frozen copy it goes {:.4f} far at 1e-5 and {:.1f} at 1e-2, where its loss rises "
        "too, to {:.2f}",
        lambda: [
            *(moved_at_start(start.FROZEN_COPY, lr, 1) for lr in (1e-5, 1e-2)),
            loss_at_start(start.FROZEN_COPY, 1e-2, 1),
        ],
    ),
    (
        "after 50 steps at 1e-5 the loss is {:.3f} from B = 0 and {:.3f} with the frozen copy, at "
        "1e-2 {:.3f} and {:.3f}",
        lambda: [
            loss_at_start(which, lr, 50)
            for lr in (1e-5, 1e-2)
            for which in (start.CLAMPED, start.FROZEN_COPY)
        ],
    ),
    (
        "the loss is {:.2f} after that step, from {:.2f}",
        lambda: [loss_at_start(start.CLAMPED, 1e-5, n) for n in (1, 0)],
    ),
)


def prolonged(key, method, step=None):
    """The mean over seeds in forgetting.py after so many steps, or at the method's best stop."""
    found = FOUND["forgetting"]
    steps = found["runs"][0]["step"]
    n = forgetting.best_stop(found, method) if step is None else steps.index(step)
    return statistics.fmean(common.per_step(found, key, method=method)[n])


def growth(method):
    """Of the distance from step 175 to the end, in per cent."""
    return 100 * (prolonged("moved", method, 1250) / prolonged("moved", method, 175) - 1)


PROLONGED = common.each(FOUND["forgetting"]["runs"], "method")
FORGETTING = (
    (
        "by {:.0f} % with λ at 1e-3, the paper's rate for this figure, and by {:.0f} % with λ at "
        "half the rate of A and B; LoRA's by {:.0f} %, DoRA's by {:.0f} %, that of full "
        "fine-tuning by {:.0f} %, that of PEFT's DeLoRA by {:.0f} %",
        lambda: [growth(m) for m in (forgetting.SLOW, OURS, LORA, PEFT_DORA, FULL, PEFT_DELORA)],
    ),
    (
        "λ itself is {:.1f} at the end in the one and {:.1f} in the other",
        lambda: [prolonged("strength", m, 1250) for m in (forgetting.SLOW, OURS)],
    ),
    (
        "between {:.2f} and {:.2f} on the new text, from {:.2f}",
        lambda: [
            min(prolonged("new", m) for m in PROLONGED),
            max(prolonged("new", m) for m in PROLONGED),
            prolonged("new", OURS, 0),
        ],
    ),
    (
        "full fine-tuning has forgotten least, {:.2f} on the old text from {:.2f}, after five "
        "steps, the first moment that was measured; LoRA is at {:.2f}, DoRA at {:.2f}, PEFT's "
        "DeLoRA at {:.2f} and DeLoRA at {:.2f}",
        lambda: [
            prolonged("old", FULL),
            prolonged("old", FULL, 0),
            *(prolonged("old", m) for m in (LORA, PEFT_DORA, PEFT_DELORA, OURS)),
        ],
    ),
    (
        "At the end every method is worse on the new text than before training, PEFT's DeLoRA "
        "hardly, {:.2f}",
        lambda: [min(prolonged("new", m, 1250) for m in PROLONGED)],
    ),
    (
        "It has also forgotten least, {:.2f}, with DeLoRA with λ at 1e-3 beside it, {:.2f}; then "
        "DeLoRA, {:.2f}; then DoRA and LoRA, {:.2f} and {:.2f}, and full fine-tuning, {:.2f}",
        lambda: [
            prolonged("old", m, 1250)
            for m in (PEFT_DELORA, forgetting.SLOW, OURS, PEFT_DORA, LORA, FULL)
        ],
    ),
)


def trade(key, method, lam, lr=None):
    """The mean over seeds in strength.py; at the better of the two rates if none is given."""
    if lr is None:
        return min(trade(key, method, lam, lr) for lr in strength.RATES)
    return mean("strength", key, method=method, strength=lam, lr=lr)


STRENGTH = (
    (
        "from 4 to 30 at a rate of 1e-2 takes the new text from {:.3f} to {:.3f} and the old from "
        "{:.3f} to {:.3f}",
        lambda: [
            trade(key, start.FROZEN_COPY, lam, 1e-2) for key in ("new", "old") for lam in (4, 30)
        ],
    ),
    (
        "the same within the seeds on the new text, {:.3f} and {:.3f}, but 30 forgets more, {:.3f} "
        "against {:.3f} on the old",
        lambda: [
            *(trade("new", start.FROZEN_COPY, lam, strength.RATES[1]) for lam in (15, 30)),
            *(trade("old", start.FROZEN_COPY, lam, strength.RATES[1]) for lam in (30, 15)),
        ],
    ),
    (
        "LoRA's best of three rates is {:.3f}, DeLoRA's best of eight pairs of λ and rate {:.3f}: "
        "LoRA leads by {:.3f}, and by {:.3f} if λ stays 15",
        lambda: [
            best("strength", method=LORA),
            best("strength", method=start.FROZEN_COPY),
            best("strength", method=start.FROZEN_COPY) - best("strength", method=LORA),
            best("strength", method=start.FROZEN_COPY, strength=15) - best("strength", method=LORA),
        ],
    ),
    (
        "both have forgotten the same, {:.3f} and {:.3f} on the old text",
        lambda: [
            mean("strength", "old", method=LORA, lr=1e-2),
            trade("old", start.FROZEN_COPY, 30, 1e-2),
        ],
    ),
    (
        "a λ of 45, in the grid of the ladder below, has {:.3f} there and {:.3f} at 3.2e-2",
        lambda: [rung(OURS, lr, 45) for lr in ladder.RATES[:2]],
    ),
    (
        "{:.3f} against {:.3f} at λ = 4, {:.3f} against {:.3f} at 8, {:.3f} against {:.3f} at 15 "
        "and {:.3f} against {:.3f} at 30",
        lambda: [
            trade("new", which, lam)
            for lam in strength.STRENGTHS
            for which in (start.CLAMPED, start.FROZEN_COPY)
        ],
    ),
)


def turned(key, lr, decay, step):
    """The mean over seeds in turning.py after that step, or of it."""
    runs = over_seeds(FOUND["turning"]["runs"], key, lr=lr, decay=decay)
    n = step if key == "length" else step - 1
    return statistics.fmean(run[n] for run in runs)


TURNING_RATES = (1e-1, 1e-2, 1e-3)
TURNING = (
    (
        "At a rate of 1e-1 the rows are {:.1f} times as long after 150 steps, at 1e-2 {:.1f} times",
        lambda: [turned("length", lr, 0, 150) / turned("length", lr, 0, 0) for lr in (1e-1, 1e-2)],
    ),
    (
        "The first step turned them by {:.1f}° and {:.1f}°, the last by {:.2f}° and {:.2f}°",
        lambda: [turned("angle", lr, 0, step) for step in (1, 150) for lr in (1e-1, 1e-2)],
    ),
    (
        "length explains a factor of {:.1f}",
        lambda: [turned("length", 1e-1, 0, 150) / turned("length", 1e-2, 0, 150)],
    ),
    (
        "at 1e-3, where the rows hardly grow, from {:.2f} to {:.2f}, and the angle halves after "
        "the warm-up, from {:.2f}° to {:.2f}°",
        lambda: [
            *(turned("length", 1e-3, 0, n) for n in (0, 150)),
            *(turned("angle", 1e-3, 0, n) for n in (9, 150)),
        ],
    ),
    (
        "A decay of 1 leaves the rows at {:.1f} instead of {:.1f} at 1e-1, and the last step "
        "turns them by {:.1f}° instead of {:.2f}°",
        lambda: [turned(key, 1e-1, d, 150) for key in ("length", "angle") for d in (1, 0)],
    ),
    (
        "the loss rises from {:.3f} to {:.3f}, and at 1e-2 from {:.3f} to {:.3f}. At 1e-3 it falls "
        "from {:.3f} to {:.3f}",
        lambda: [
            mean("turning", "new", lr=lr, decay=decay) for lr in TURNING_RATES for decay in (0, 1)
        ],
    ),
    (
        "torch's default costs at most {:.3f}",
        lambda: [
            max(
                mean("turning", "new", lr=lr, decay=0.01) - mean("turning", "new", lr=lr, decay=0)
                for lr in TURNING_RATES
            )
        ],
    ),
)


def swept(sweep, rate):
    return mean("rates", "new", sweep=sweep, rate=rate)


def range_of_strengths(rate):
    runs = over_seeds(FOUND["rates"]["runs"], "strengths", sweep=rates.STRENGTH_ALONE, rate=rate)
    every = [lam for layers in runs for lam in layers]
    return min(every), max(every)


def gain_of_learning():
    fixed = swept(rates.STRENGTH_ALONE, 0)
    return max(fixed - swept(rates.STRENGTH_ALONE, rate) for rate in rates.RATES)


BOTH_THEN_ANGLES = (rates.BOTH, rates.ANGLES_ALONE)
RATES_READINGS = (
    (
        "the loss stays between {:.3f} and {:.3f}",
        lambda: [
            end(swept(rates.STRENGTH_ALONE, rate) for rate in (0, *rates.RATES))
            for end in (min, max)
        ],
    ),
    (
        "at a rate of 1 it ends between {:.0f} and {:.0f}, at 10 between {:.0f} and {:.0f}",
        lambda: (*range_of_strengths(1), *range_of_strengths(10)),
    ),
    (
        "at most {:.3f} over a λ that is fixed",
        lambda: [gain_of_learning()],
    ),
    (
        "The rate of A and B is the one to choose: {:.3f} at 1e-3, {:.3f} at 3.2e-2, {:.3f} at 10",
        lambda: [swept(rates.ANGLES_ALONE, rate) for rate in (1e-3, rates.RATES[2], 10)],
    ),
    (
        "{:.3f} instead of {:.3f} at 1, {:.3f} instead of {:.3f} at 10",
        lambda: [swept(sweep, rate) for rate in (1, 10) for sweep in BOTH_THEN_ANGLES],
    ),
)


def early(key, lr, warm_up=1, step=1, wide=common.WIDTH):
    """The mean over seeds in width.py after so many steps."""
    runs = over_seeds(FOUND["width"]["runs"], key, width=wide, lr=lr, warm_up=warm_up)
    return statistics.fmean(run[step - 1] for run in runs)


WIDTH_READINGS = (
    (
        "goes {:.2f} of full strength at width 128, {:.2f} at 768 and {:.2f} at 4096",
        lambda: [early("share", 1e-2, wide=wide) for wide in width.WIDTHS],
    ),
    (
        "to be back at about {:.2f}, its loss before training",
        lambda: [loss_at_start(start.FROZEN_COPY, 1e-2, 0)],
    ),
    (
        "At 3.2e-2 the first step of the small model without a warm-up takes the loss from {:.2f} "
        "to {:.2f}, and the second to {:.2f}; with one, the first step takes it to {:.2f}",
        lambda: [
            loss_at_start(start.FROZEN_COPY, 1e-2, 0),
            *(early("loss", width.RATES[2], step=step) for step in (1, 2)),
            early("loss", width.RATES[2], width.WARM_UP),
        ],
    ),
    (
        "After 50 steps it is {:.3f} without and {:.3f} with a warm-up, at 1e-2 {:.3f} and {:.3f}",
        lambda: [
            early("loss", lr, warm_up, 50)
            for lr in (width.RATES[2], 1e-2)
            for warm_up in (1, width.WARM_UP)
        ],
    ),
)


def rung_losses():
    """The best mean loss of each rung, from the first to the last."""
    runs = FOUND["ladder"]["runs"]
    return [mean("ladder", "new", **ladder.best(runs, rung)) for rung in ladder.RUNGS]


def rung(name, lr, lam):
    return mean("ladder", "new", rung=name, lr=lr, strength=lam)


LADDER = (
    (
        "from {:.3f} over {:.3f}, {:.3f} and {:.3f} to {:.3f}",
        rung_losses,
    ),
    (
        "the rank by most ({:.3f})",
        lambda: [max(a - b for a, b in itertools.pairwise(rung_losses()))],
    ),
    (
        "at λ = 15 and 3.2e-2 the relaxed one has {:.3f}, DeLoRA {:.3f}, and at 1e-1 it has "
        "{:.3f}, DeLoRA {:.3f}",
        lambda: [rung(name, lr, 15) for lr in ladder.RATES[1:] for name in ("+ relaxed", OURS)],
    ),
    (
        "a λ of 45 at 1e-1 is too large for DeLoRA too, {:.3f}",
        lambda: [rung(OURS, 1e-1, 45)],
    ),
)


def on_gpu(key, compiled, methods):
    """Of the stack in speed-cuda-bfloat16.json: the median ratio, or MiB at the peak."""
    found = {}
    for row in FOUND["speed-cuda-bfloat16"]["stack"]["rows"]:
        if row["compiled"] == compiled:
            found[row["name"]] = row["ratio"][0] if key == "ratio" else row[key]
    return [found[method] for method in methods]


FOUR = (OURS, LORA, common.PEFT_LORA, PEFT_DELORA)
COMPILED = (
    "takes {:.2f} times as long as the frozen one, with LoRA {:.2f}, with PEFT's LoRA {:.2f} and "
    "with PEFT's DeLoRA {:.2f}",
    lambda: on_gpu("ratio", True, FOUR),
)
EAGER = (
    "Eager it takes {:.2f}, where LoRA takes {:.2f} and PEFT's two {:.2f} and {:.2f}",
    lambda: on_gpu("ratio", False, FOUR),
)
PEAK = (
    "DeLoRA has {:.0f} MiB beyond the parameters, LoRA {:.0f}, PEFT's LoRA {:.0f} and PEFT's "
    "DeLoRA {:.0f}",
    lambda: on_gpu("peak", True, FOUR),
)


def beside_the_others(few):
    """The lowest and the highest ratio of DeLoRA's time to another adapter's on a CPU."""
    ratios = []
    for row in FOUND["speed"]["steps"]:
        if (row["shape"][0] < speed.MANY) == few:
            ratios += [row["ours"][m][0] for m in (LORA, common.PEFT_LORA, PEFT_DELORA)]
    return min(ratios), max(ratios)


ON_CPU = (
    "From 256 tokens on DeLoRA takes {:.2f} to {:.2f} times as long as the other adapters, with "
    "16 tokens or one {:.2f} to {:.2f} times",
    lambda: (*beside_the_others(False), *beside_the_others(True)),
)
KEPT = (
    "It keeps {:.2f} MiB for backward, LoRA {:.2f}, PEFT's DeLoRA {:.2f}",
    lambda: [FOUND["speed"]["kept"][method] for method in (OURS, LORA, PEFT_DELORA)],
)


def by_layer(key):
    """A list of three seeds for each of the 24 layers."""
    runs = FOUND["learned"]["runs"]
    return {layer: [run[key][layer] for run in runs] for layer in runs[0][key]}


def extreme(end):
    """The lowest or highest mean λ, and its layer in words."""
    means = {layer: statistics.fmean(seeds) for layer, seeds in by_layer("strength").items()}
    layer = end(means, key=means.get)
    _, block, leaf = layer.split(".")
    return means[layer], f"{leaf} of block {block}"


def lengths(leaf, block):
    return FOUND["learned"]["runs"][0]["norms"][f"blocks.{block}.{leaf}"][2]


def shares_of_bound():
    moved, bound = by_layer("moved"), by_layer("bound")
    return [
        statistics.fmean(100 * a / b for a, b in zip(moved[layer], bound[layer], strict=True))
        for layer in moved
    ]


LEARNED = (
    (
        "from {:.1f} ({}) to {:.1f} ({})",
        lambda: (*extreme(min), *extreme(max)),
    ),
    (
        "the three seeds of a layer are at most {:.1f} apart",
        lambda: [max(max(seeds) - min(seeds) for seeds in by_layer("strength").values())],
    ),
    (
        "The median column of W is {:.2f} long in down of block 3 and {:.2f} in up of block 0",
        lambda: [lengths("down", 3), lengths("up", 0)],
    ),
    (
        "‖ΔW‖ uses {:.0f} % to {:.0f} % of its bound",
        lambda: [end(shares_of_bound()) for end in (min, max)],
    ),
)
READINGS = {
    "robustness": ROBUSTNESS,
    "turning": TURNING,
    "rates": RATES_READINGS,
    "strength": STRENGTH,
    "learned": LEARNED,
    "forgetting": FORGETTING,
    "start": START,
    "width": WIDTH_READINGS,
    "ablation": ABLATION,
    "ladder": LADDER,
    "speed": (ON_CPU, KEPT, COMPILED, EAGER, PEAK),
}


@pytest.mark.parametrize("name", READINGS)
def test_the_numbers_of_a_reading_are_those_of_the_runs(name):
    text = sentences(section(name))
    for sentence, numbers in READINGS[name]:
        said = sentence.format(*numbers())
        assert said in text
        text = text.replace(said, "", 1)
    text = re.sub(r"\b0\.05\b", "", text)  # the range whose width is reported: a setting
    left = re.findall(r"(?<![\d.])\d+\.\d+(?![\de]|\.\d)|\d+ %|\d+°", text)
    assert not left, text


IN_README = (
    (
        "After one step of AdamW at 1e-2 `turned` is {:.2f} at width 128, {:.2f} at 768 and {:.2f} "
        "at 4096",
        lambda: [early("share", 1e-2, wide=wide) for wide in (common.WIDTH, 768, 4096)],
    ),
    (
        "LoRA leads by {:.3f}, or by {:.3f} if λ is tuned as LoRA's rate is",
        lambda: [
            best("strength", method=start.FROZEN_COPY, strength=15) - best("strength", method=LORA),
            best("strength", method=start.FROZEN_COPY) - best("strength", method=LORA),
        ],
    ),
    (
        "the best loss is {:.3f} instead of {:.3f}",
        lambda: [best("robustness", method=method) for method in (PEFT_DELORA, OURS)],
    ),
    (
        "an adapted layer costs {} times what plain LoRA costs",
        lambda: [speed.median(FOUND["speed"]["steps"], "ours", LORA)],
    ),
    (
        "with one token {:.2f} times",
        lambda: [beside_the_others(True)[1]],
    ),
    (
        "compiled, takes {:.2f} times as long as the frozen one, and with LoRA {:.2f}; eager "
        "{:.2f} and {:.2f}",
        lambda: on_gpu("ratio", True, FOUR[:2]) + on_gpu("ratio", False, FOUR[:2]),
    ),
    (
        "4 or 12 at width 768 (RoBERTa, Table 9) and 8 at 4096 (Llama-2-7B, App. B): {} to {:.2f} "
        "times √in",
        lambda: [math.ceil(100 * 8 / 4096**0.5) / 100, 12 / 768**0.5],
    ),
)


@pytest.mark.parametrize("sentence", range(len(IN_README)))
def test_the_numbers_of_readme_are_those_of_the_runs(sentence):
    words, numbers = IN_README[sentence]
    assert words.format(*numbers()) in " ".join(README.split())


COLUMNS = (LORA, PEFT_DORA, FULL, PEFT_DELORA, OURS)


def best_rate(method):
    runs = FOUND["robustness"]["runs"]
    tried = sorted({run["lr"] for run in runs})
    return min(tried, key=lambda lr: mean("robustness", "new", method=method, lr=lr))


def ten_times(method, key):
    """That number at ten times the method's best rate."""
    runs = FOUND["robustness"]["runs"]
    tried = sorted({run["lr"] for run in runs})
    lr = tried[tried.index(best_rate(method)) + 2]  # two half decades
    return mean("robustness", key, method=method, lr=lr)


ROWS = {
    "lowest loss on the new text, from {:.2f}": (
        lambda: [FOUND["robustness"]["before"]["new"]],
        lambda method: f"{best('robustness', method=method):.3f}",
    ),
    "at the learning rate": (
        lambda: [],
        lambda method: f"{best_rate(method):.1e}".replace(".0e-0", "e-").replace("e-0", "e-"),
    ),
    "decades of rates within 0.05 of it": (
        lambda: [],
        lambda method: f"{decades('robustness', method):.2f}",
    ),
    "decades within 0.05 of the best adapter": (
        lambda: [],
        lambda method: f"{decades_for_the_same_loss(method):.2f}",
    ),
    "loss at ten times that rate": (
        lambda: [],
        lambda method: f"{ten_times(method, 'new'):.2f}",
    ),
    "‖W' - W‖ there, where ‖W‖ is {:.0f}": (
        lambda: [FOUND["robustness"]["norm"]],
        lambda method: f"{ten_times(method, 'moved'):.0f}",
    ),
    "loss on the old text after training far too long, from {:.2f}": (
        lambda: [prolonged("old", OURS, 0)],
        lambda method: f"{prolonged('old', method, 1250):.2f}",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_results_is_that_of_the_runs(row):
    numbers, cell = ROWS[row]
    cells = [row.format(*numbers()), *(cell(method) for method in COLUMNS)]
    assert f"| {' | '.join(cells)} |" in README
