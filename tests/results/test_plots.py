import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from kwslib.results import plots


def test_a_bar_stands_at_its_height_however_far_from_the_points():
    rows = {"baseline": (3e-3, 3e-3, 3e-3, 9e5, "float32"), "small": (2e-3, 1e-3, 3e-3, 9e4, "int8")}
    columns = ["au_fa_fr", "seed_low", "seed_high", "macs_per_clip", "precision"]
    figure = plots.metric_cost(pd.DataFrame(rows, index=columns).T, "macs_per_clip", 5.5e-5)
    (ax,) = figure.axes
    heights = {line.get_label(): line.get_ydata()[0] for line in ax.lines if len(line.get_ydata())}
    assert heights["the reports' bar, 5.5e-05"] == 5.5e-5
    assert heights["1.1 × the baseline here"] == 1.1 * 3e-3
    assert ax.get_ylim()[0] < 5.5e-5
    plt.close(figure)


def test_people_have_points_where_they_were_asked():
    rows = {"baseline": (0.2, 0.1, 0.3, 9e5, "float32"), "small": (0.0, 0.0, 0.1, 9e4, "int8")}
    rows["not-asked"] = (float("nan"),) * 3 + (5e4, "int8")
    columns = ["people_miss", "people_miss_low", "people_miss_high", "macs_per_clip", "precision"]
    summary = pd.DataFrame(rows, index=columns).T
    (ax,) = plots.metric_cost(summary, "macs_per_clip", quality="people_miss").axes
    heights = {line.get_label(): line.get_ydata()[0] for line in ax.lines if len(line.get_ydata())}
    assert heights["1.1 × the baseline here"] == 1.1 * 0.2 and not any("bar" in label for label in heights)
    assert {text.get_text() for text in ax.texts} == {"baseline", "small"}


def test_gains_stand_sorted_in_groups_and_stream_models_elsewhere():
    rows = {f"{technique[:1]}{i}": (gain, gain - 1e-5, gain + 1e-5, technique, "baseline")
            for technique in ("distilled", "pruned") for i, gain in enumerate((3e-5, -4e-3, 1e-7))}  # fmt: skip
    rows |= {"s": (1e-5, 0, 2e-5, "stream", "baseline"), "baseline": (float("nan"),) * 3 + ("plain", None)}
    table = pd.DataFrame(rows, index=["gain", "gain_low", "gain_high", "technique", "control"]).T
    figure = plots.gains(table)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["distilled", "pruned"]
    names = [[label.get_text().partition(" against ")[0] for label in ax.get_yticklabels()] for ax in figure.axes]
    assert names == [["d1", "d2", "d0"], ["p1", "p2", "p0"]]  # from below
    assert plots.gains(table.loc[["baseline"]]).axes
    many = pd.concat([table.rename(index=lambda name, i=i: f"{name}{i}") for i in range(40)])
    assert 110 * plots.gains(many).get_size_inches()[1] < 1600


def test_misses_have_a_log_axis_and_zeros_stand_at_its_end():
    lines = {"a": [([0.0, 2.0, 30.0], [0.5, 0.02, 0.001])], "b": [([0.0, 1.0, 50.0], [0.3, 0.0, 0.0])]}
    (ax,) = plots.trade_off(lines | {"all failed": []}, 3.0, 20.0, 0.5).axes
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] == pytest.approx(2.0 / 3)
    assert min(ax.lines[1].get_ydata()) == ax.get_ylim()[0]
    looks = [(line.get_linestyle(), line.get_marker()) for line in ax.lines[:2]]
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]  # whoever sees no colours tells them apart


def test_seeds_are_a_mean_in_their_range_named_where_it_ends_and_the_asked_rate_is_marked():
    seeds = [([0.0, 2.0], [0.5, 0.1]), ([0.0, 1.0, 30.0], [0.3, 0.2, 0.0])]
    near = [([0.0, 3.0], [0.4, 0.151])]
    (ax,) = plots.trade_off({"far": [([0.0], [1.0])], "of two": seeds, "near": near}, 3.0, 20.0, 0.5).axes
    mean, band = ax.lines[1], ax.collections[1].get_paths()[0].vertices
    assert dict(zip(mean.get_xdata(), mean.get_ydata(), strict=True)) == pytest.approx({0: 40, 1: 35, 2: 15, 20: 15})
    corners = {(0, 30), (0, 50), (1, 50), (1, 20), (2, 10), (2, 20), (20, 10), (20, 20)}
    assert {(x, round(y)) for x, y in band} >= corners
    (asked,) = [line for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[-1]]
    assert asked.get_xdata()[0] == 0.5
    names = {text.get_text(): text for text in ax.texts}
    assert set(names) == {"asked: 0.5 per hour", "far", "of two", "near"}
    ax.figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(names[name]) for name in ("far", "of two", "near")), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 for below, above in itertools.pairwise(boxes))  # none is written over another


def test_the_curve_of_clips_marks_one_percent_of_the_other_words():
    curve = {"fa": [0.0, 0.0, 0.004, 0.2, 0.8], "fr": [0.2, 0.1, 0.05, 0.0, 0.0]}
    (ax,) = plots.fa_fr_curves([{"experiment": "baseline", "seed": 0, "metrics": {"curve": curve}}], ["baseline"]).axes
    drawn = dict(zip(ax.lines[0].get_xdata(), ax.lines[0].get_ydata(), strict=True))
    assert drawn[0.0] == 0.1 and drawn[0.004] == 0.05 and drawn[0.2] == ax.get_ylim()[0]
    assert ax.lines[1].get_xdata()[0] == pytest.approx(0.01 * 0.8)  # four fifths are other words
    assert plots.fa_fr_curves([], ["baseline"]).axes


def test_runtimes_stand_on_one_log_axis_and_a_step_is_told_from_a_clip():
    kinds = itertools.product(("baseline", "small"), ("clip", "step"), ("torch", "ONNX Runtime"), ("float32",))
    index = pd.MultiIndex.from_tuples(kinds, names=["model", "unit", "runtime", "precision"])
    table = pd.DataFrame({"median": range(1, 9), "q25": 0.9, "q75": 9.0}, index=index)
    (ax,) = plots.latency(table.drop(("small", "step", "torch", "float32"))).axes
    assert ax.get_xscale() == "log" and len(ax.containers) == 4
    points = {bars.get_label(): bars[0] for bars in ax.containers}
    names = [label.get_text() for label in ax.get_yticklabels()]
    at = points["small, one step"]
    assert list(at.get_xdata()) == [8] and names[round(at.get_ydata()[0])] == "ONNX Runtime, float32"
    assert list(points["baseline, one clip"].get_xdata()) == [1, 2]
    fills = {label: line.get_markerfacecolor() == "white" for label, line in points.items()}
    assert {label for label, hollow in fills.items() if hollow} == {"baseline, one step", "small, one step"}


def test_a_probability_is_shown_with_how_often_it_was_given():
    rng = np.random.default_rng(0)
    share = np.concatenate([rng.uniform(0.01, 0.09, 50), rng.uniform(0.51, 0.59, 8), [0.95] * 3, [1.0]])
    is_keyword = np.concatenate([np.zeros(50), [1, 0] * 4, np.ones(4)]).astype(bool)
    ax, below = plots.reliability({"said": (share, is_keyword)}).axes
    assert list(ax.lines[1].get_ydata()) == [0.0, 0.5]  # of four nothing can be said
    (steps,) = below.patches
    assert set(steps.get_xy()[:, 1]) == {0, 50, 8, 4}
