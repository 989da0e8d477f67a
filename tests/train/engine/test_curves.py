import json
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from gridcap.train.engine.curves import plot_curves
from gridcap.train.engine.log import RunLog, read_rows

STEPS = [
    {"step": s, "epoch": 1 + s // 50, "loss": 5 - s / 40, "learning_rate": 0.01, "grad_norm": 1.0}
    for s in range(0, 100, 20)
]
EPOCHS = [{"epoch": e, "step": 50 * e, "train_loss": 5 - e, "seconds": 1.0, "data_wait": 0.1} for e in (1, 2)]
SCORES = [
    {"val_loss": 4.0, "val_perplexity": 50.0, "val_cider": 0.2},
    {"val_loss": 3.5, "val_perplexity": 33.0, "val_cider": 0.4},
]
VALIDATED = [row | scores for row, scores in zip(EPOCHS, SCORES, strict=True)]
REWARDS = {"reward": 0.9, "baseline": 0.8, "advantage": 0.2}


@pytest.fixture
def figures(monkeypatch):
    """Return the list of all saved figures."""
    saved, real = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def draw(figures, path, epochs, steps):
    """Plot, and return the points by panel title and label."""
    plot_curves(epochs, steps, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        panels = figures[-1].axes
        assert picture.width > 400 * len(panels)
    return {
        axis.get_title(): {
            line.get_label(): list(zip(*line.get_data(), strict=True))
            for line in axis.lines
            if len(line.get_xdata()) != 2 or line.get_linestyle() != ":"  # the marker of the best epoch
        }
        for axis in panels
    }


def test_cross_entropy(tmp_path, figures):
    panels = draw(figures, tmp_path / "curves.png", VALIDATED, STEPS)
    assert list(panels) == ["loss (nats per token)", "validation CIDEr", "validation perplexity", "learning rate"]
    assert panels["loss (nats per token)"] == {
        "every 20th step": [(row["step"], row["loss"]) for row in STEPS],
        "training": [(50, 4), (100, 3)],
        "validation": [(50, 4.0), (100, 3.5)],
    }
    assert list(panels["validation CIDEr"].values()) == [[(50, 0.2), (100, 0.4)]]
    assert list(panels["validation perplexity"].values()) == [[(50, 50.0), (100, 33.0)]]
    assert list(panels["learning rate"].values()) == [[(row["step"], 0.01) for row in STEPS]]


def test_scst_plots_reward_and_initial_validation(tmp_path, figures):
    initial = {"epoch": 0, "step": 0} | SCORES[0]
    plain = [{k: v for k, v in row.items() if k != "train_loss"} | REWARDS for row in VALIDATED]
    steps = [{k: v for k, v in row.items() if k != "loss"} | REWARDS for row in STEPS]
    panels = draw(figures, tmp_path / "curves.png", [initial, *plain], steps)
    assert list(panels) == ["reward", "validation CIDEr", "validation perplexity", "learning rate"]
    assert panels["reward"] == {
        "every 20th step": [(row["step"], 0.9) for row in STEPS],
        "epoch": [(50, 0.9), (100, 0.9)],
    }
    assert list(panels["validation CIDEr"].values()) == [[(0, 0.2), (50, 0.2), (100, 0.4)]]


def test_without_validation(tmp_path, figures):
    panels = draw(figures, tmp_path / "curves.png", EPOCHS, STEPS)
    assert list(panels) == ["loss (nats per token)", "learning rate"]
    assert set(panels["loss (nats per token)"]) == {"every 20th step", "training"}


def test_only_panels_with_several_lines_have_a_legend(tmp_path, figures):
    plot_curves(VALIDATED, STEPS, tmp_path / "curves.png")
    legends = {axis.get_title(): axis.get_legend() is not None for axis in figures[-1].axes}
    assert legends.pop("loss (nats per token)")
    assert not any(legends.values())


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_non_finite_values_leave_a_gap(tmp_path, figures, value):
    rows = [VALIDATED[0] | {"val_perplexity": value}, VALIDATED[1]]
    draw(figures, tmp_path / "curves.png", rows, [STEPS[0] | {"loss": value}, *STEPS[1:]])


def test_run_without_step_rows(tmp_path, figures):
    panels = draw(figures, tmp_path / "curves.png", EPOCHS, [])
    assert panels["loss (nats per token)"] == {"training": [(50, 4), (100, 3)]}


def test_plot_from_log_files_replaces_an_existing_image(tmp_path, figures):
    log = RunLog(tmp_path, [], 0)
    for row in STEPS:
        log.log_step(row)
    log.log_epoch(VALIDATED)
    log.close()
    (tmp_path / "curves.png").write_bytes(b"an existing image")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    panels = draw(figures, tmp_path / "curves.png", rows, read_rows(tmp_path / "steps.jsonl"))
    assert len(panels["loss (nats per token)"]["every 20th step"]) == len(STEPS)
    assert [path.name for path in tmp_path.glob("*.png*")] == ["curves.png"], "no temporary file is left"
