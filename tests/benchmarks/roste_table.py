"""The cells of the RoSTE comparison as Markdown: scores, the order of the methods, and the errors behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from roste_plan import METHODS, ORDER, SETTINGS, SIXTEEN
from spread import spread

Line = dict[str, Any]

SCORES = {
    "ppl": "wikitext2 ppl",
    "summary_loss": "summary loss",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
NAMES = {
    "base": "16-bit base",
    "sft": "16-bit SFT",
    "rtn": "RTN of that SFT",
    "gptq": "GPTQ-style of that SFT",
    "ste": "STE, no rotation",
    "hadamard": "STE, every rotation",
    "adaptive": "STE, adaptive (RoSTE)",
}
NOTES = """\
Loss: nats per token of the first reference; ROUGE: greedy, best reference, in percent; ±: standard deviation of the seeds.
W4 is asymmetric with c = 0.95, A and KV asymmetric per token (and head), as published. The checkpoint was made from a file
in 4-bit blocks of 32 with zero points: its weights lie on such a grid, which rounding without a rotation partly finds again
(with groups of 32 and zero points it would change nothing), and which a rotation leaves. So weight-only columns favour
`no rotation` more than a checkpoint in 16 bits would."""

COMPARED = ("summary_loss", "ppl", "rougeL")
"""Scores by which methods are put in order."""

CLAIMS = (("ste", "rtn"), ("ste", "gptq"), ("adaptive", "ste"), ("adaptive", "hadamard"))
"""(better, worse) in the paper."""


def table(lines: Sequence[Line]) -> str:
    """Return everything as Markdown; empty without lines."""
    if not lines:
        return ""
    config = lines[0]["config"]
    tokens = 512 * config["batch"]
    grid = f"groups of {config['group_size']}" if config["group_size"] else "per output channel"
    head = (
        f"{config['model']}; W4 {grid}; {config['steps']} steps of {tokens} tokens; {config['documents']} summaries, "
        f"{config['ppl_tokens']} tokens of wikitext2; learning rates (16-bit, through the grid): {config['lr']}; "
        f"commits {', '.join(sorted({line['commit'] for line in lines}))}."
    )
    parts = [
        head,
        "",
        "Summary loss / ROUGE-L:",
        "",
        summary(lines),
        "",
        *_scores(lines),
        "",
        *_order(lines),
        "",
        *_errors(lines),
        "",
        NOTES,
    ]
    return "\n".join(parts)


def summary(lines: Sequence[Line]) -> str:
    """Return summary loss and ROUGE-L of every method at every setting as a table; empty without lines."""
    if not lines:
        return ""
    cells = {
        (setting, scope, method): " / ".join(
            spread([line[key] for line in found], 1 + (key == "summary_loss")) for key in ("summary_loss", "rougeL")
        )
        for setting, scope, method, found in groups(lines)
    }
    rows = [f"| trained | method | {' | '.join(SETTINGS)} |", f"|---|---|{'--:|' * len(SETTINGS)}"]
    for scope in ("full", "qv"):
        for method in METHODS:
            values = [cells.get((setting, scope, method), "") for setting in SETTINGS]
            rows.append(f"| {scope} | {NAMES[method]} | {' | '.join(values)} |")
    return "\n".join(rows)


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, str, str, list[Line]]]:
    """Yield (setting, scope, method, its seeds) in the order of the table, of those that there are."""
    keys = [(SIXTEEN, "-", "base"), *((SIXTEEN, scope, "sft") for scope in ("full", "qv"))]
    keys += [(setting, scope, method) for setting, scope in sorted(ORDER) for method in METHODS]
    for key in keys:
        if found := [line for line in lines if (line["setting"], line["scope"], line["method"]) == key]:
            yield *key, found


def _scores(lines: Sequence[Line]) -> Iterator[str]:
    yield f"| setting | trained | method | {' | '.join(SCORES.values())} | seeds |"
    yield f"|---|---|---|{'--:|' * (len(SCORES) + 1)}"
    for setting, scope, method, found in groups(lines):
        cells = [spread([line[key] for line in found]) for key in SCORES]
        yield f"| {setting} | {scope} | {NAMES[method]} | {' | '.join(cells)} | {len(found)} |"


def _order(lines: Sequence[Line]) -> Iterator[str]:
    """Compare every pair that the paper orders, on the seeds that both have, and count over all settings and scopes."""
    means = {tuple(key): {line["seed"]: line for line in found} for *key, found in groups(lines)}
    yield f"| setting | trained | the paper's order | {' | '.join(SCORES[key] for key in COMPARED)} |"
    yield f"|---|---|---|{'---|' * len(COMPARED)}"
    gains = {
        (setting, scope, better, worse): [
            [_gain(means[setting, scope, better][seed], means[setting, scope, worse][seed], key) for key in COMPARED]
            for seed in sorted(means[setting, scope, better].keys() & means[setting, scope, worse].keys())
        ]
        for setting, scope in sorted(ORDER)
        for better, worse in CLAIMS
        if (setting, scope, better) in means and (setting, scope, worse) in means
    }
    for (setting, scope, better, worse), of_seeds in gains.items():
        if of_seeds:
            cells = [_verdict(column) for column in zip(*of_seeds, strict=True)]
            yield f"| {setting} | {scope} | {NAMES[better]} above {NAMES[worse]} | {' | '.join(cells)} |"
    for claim in CLAIMS:
        if everywhere := [
            row for (*_, better, worse), rows in gains.items() if (better, worse) == claim for row in rows
        ]:
            cells = [_verdict(column) for column in zip(*everywhere, strict=True)]
            yield f"| all | all | {NAMES[claim[0]]} above {NAMES[claim[1]]} | {' | '.join(cells)} |"


def _gain(first: Line, second: Line, key: str) -> float:
    return (first[key] - second[key]) * (1 if key.startswith("rouge") else -1)


def _verdict(gains: Sequence[float]) -> str:
    holds = sum(gain > 0 for gain in gains)
    return f"{'yes' if holds == len(gains) else 'no' if not holds else 'mixed'} ({holds} of {len(gains)})"


def _errors(lines: Sequence[Line]) -> Iterator[str]:
    """The errors of the base model without -> with every rotation, mean over the layers, and what was chosen."""
    measured = [found[0] for _, _, method, found in groups(lines) if method == "adaptive"]
    yield "| setting | trained | linear | delta_w | delta_x | delta_G | delta_y |"
    yield "|---|---|---|---|---|---|---|"
    chosen = []
    for line in measured:
        for kind, bases in line["errors"].items():
            pairs = [
                f"{bases['I'][d]:.4f} -> {bases['H'][d]:.4f}" for d in ("delta_w", "delta_x", "delta_g", "delta_y")
            ]
            yield f"| {line['setting']} | {line['scope']} | {kind} | {' | '.join(pairs)} |"
        rotated = line["rotated"]
        counts = ", ".join(
            f"{name} in {len(rotated[key])} layers"
            for name, key in (("R2", "values"), ("R3", "attention"), ("R4", "down"))
        )
        chosen.append(f"{line['setting']} {line['scope']}: R1 {'on' if rotated['residual'] else 'off'}, {counts}")
    if chosen:
        yield ""
        yield f"Chosen by adaptive (seed {measured[0]['seed']}): {'; '.join(chosen)}."
