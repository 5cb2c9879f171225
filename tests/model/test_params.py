from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtshpc.core.errors import ConfigError
from rtshpc.core.load import load_model
from rtshpc.stages.tools import params

PAPER = {(1, "full"): (102.88, 102.88), (2, "pretrained"): (170.06, 68.65), (3, "pretrained"): (230.19, 78.07)}
"""(Modalities, arm) -> total and trained, M: Li et al. 2025, Table 2, to the rounded million."""


def test_the_papers_model_has_the_papers_parameters(capsys) -> None:
    assert params.main(["paper", "--json"]) == 0
    counts = {(len(c["modalities"]), c["arm"]): c for c in json.loads(capsys.readouterr().out)["counts"]}
    assert set(counts) == {*PAPER, (2, "full"), (3, "full")}
    for key, (total, trained) in PAPER.items():
        assert round(counts[key]["total"] / 1e6, 2) == total
        assert round(counts[key]["trainable"] / 1e6, 2) == trained
    assert round(counts[1, "full"]["modules"]["backbone rgb"]["total"] / 1e6, 1) == 50.7
    for entry in counts.values():
        assert entry["total"] == sum(part["total"] for part in entry["modules"].values())


def test_the_table_names_every_part(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert params.main(["tiny"]) == 0
    text = capsys.readouterr().out
    for word in ("fusion", "pyramid", "proposals", "box heads", "mask heads", "backbone nir", "sum"):
        assert word in text


def test_an_unknown_config_is_one_line_with_a_guess() -> None:
    with pytest.raises(ConfigError, match='Did you mean "paper"'):
        params.main(["papper"])


def test_the_table_of_strategies_in_the_documentation_holds_the_counts_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text()
    model = load_model("paper")
    for mixer, words in {"early": "early (", "convolution": "conv", "stacked": "stacked", "cross": "cross"}.items():
        fusion = model.fusion.model_copy(update={"mixer": mixer})
        figures: list[str] = []
        for size in (2, 3):
            chosen = dict(list(params.PAPER_INPUTS.items())[:size])
            arm = "full" if mixer == "early" else "pretrained"
            counted = params.count(model.model_copy(update={"fusion": fusion}), chosen, 1, arm)
            figures += [f"{counted[key] / 1e6:.2f}" for key in ("total", "trainable")]
        row = next(line for line in text.splitlines() if line.startswith(f"| {words}"))
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == figures
    for name in ("mask_rcnn_r50", "mask_rcnn_mvitv2_b", "paper"):
        alone = params.count(load_model(name), {"rgb": 3}, 1, "full")["total"]
        assert f"| `{name}` | {alone / 1e6:.2f} |" in text
