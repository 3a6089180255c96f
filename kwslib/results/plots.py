"""Figures from records and arrays, in one style, saved as SVG. Knows no torch.

Every function returns the figure, so that a notebook shows it; ``save`` writes it.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kwslib import paths
from kwslib.results.records import pareto
from kwslib.results.tables import COST_LABELS, QUALITY_LABELS, over_seeds, verdict

STYLE = {
    "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 10, "axes.grid": True, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False,
    "svg.hashsalt": "kwslib", "svg.fonttype": "path",  # the same figure gives the same file
}  # fmt: skip
LOOKS = {  # colour and marker of each precision, as in explore.js; told apart by eyes that see no red or no green
    "float32": ("#0072b2", "o"), "float16": ("#c98a00", "s"), "int8": ("#009e73", "D"),
    "weight-int8": ("#a8508a", "^"), "weight-int4": ("#d55e00", "v"),
    "weight-int8-act8": ("#3f97cf", ">"), "weight-int4-act8": ("#333333", "<"),
}  # fmt: skip
DASHES = ("-", "--", "-.", ":")  # of lines, beside the colours
VERDICTS = {"better": ("#0072b2", "o"), "worse": ("#d55e00", "X"), "no clear difference": ("#777777", ".")}
MOST_LABELS = 20  # points of a plot that all get their names; of more, only the front


def _figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **kwargs
) -> tuple[Figure, np.ndarray]:
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    plt.close(figure)  # shown by being returned, not twice
    return figure, axes


def _line(i: int) -> dict:
    """Colour and style of the line with that number: whoever sees no colours reads the dashes."""
    return {"color": [*LOOKS.values()][i % len(LOOKS)][0], "ls": DASHES[i % len(DASHES)]}


def save(figure: Figure, study: str, name: str, records: Sequence[dict] = ()) -> Path:
    """Write ``reports/<study>/figures/<name>.svg``; the file's description names its records."""
    path = paths.reports(study) / "figures" / f"{name}.svg"
    drawn_from = ", ".join(paths.label(r["experiment"], r["seed"]) for r in records) or "the arrays of its notebook"
    drawn = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": f"drawn from {drawn_from}"})
    paths.write_atomically(path, drawn.getvalue())
    return path


def metric_cost(summary: pd.DataFrame, cost: str, bar: float | None = None, quality: str = "au_fa_fr") -> Figure:
    """Quality against a cost, one point per experiment that has it, with its range, the bars and the Pareto front.

    Args:
        summary: of ``kwslib.results.records.summary``.
        cost: a key of ``COST_LABELS``.
        bar: of the reports to stay below, if there is one; drawn as a line, as is 1.1 x our baseline.
        quality: a key of ``QUALITY_LABELS``; the range of AU-FA-FR is that of the seeds, of people the 95 % interval.
    """
    (label, scale), (said, *ends) = COST_LABELS[cost], QUALITY_LABELS[quality]
    summary = summary[summary[quality].notna()]
    figure, ((ax,),) = _figure(size=(9.0, 5.2))
    x = summary[cost].to_numpy(float) * scale
    floor = _floor(summary[quality].to_numpy(float))
    shown, low, high = (np.maximum(summary[column].to_numpy(float), floor) for column in (quality, *ends))
    for i, precision in enumerate(summary["precision"]):
        colour, marker = LOOKS[precision]
        spread = np.maximum([[shown[i] - low[i]], [high[i] - shown[i]]], 0)  # an interval of few may miss the mean
        ax.errorbar(x[i], shown[i], spread, fmt=marker, color=colour, capsize=3, markersize=7, alpha=0.9)
    line = summary.loc[pareto(summary, cost, quality)]
    ax.plot(line[cost] * scale, np.maximum(line[quality].astype(float), floor), color="0.55", lw=1, zorder=0)
    bars = {} if bar is None else {f"the reports' bar, {bar:.1e}": bar}
    if "baseline" in summary.index:
        bars["1.1 × the baseline here"] = 1.1 * float(summary.loc["baseline", quality])
    for text, height in bars.items():
        ax.axhline(height or floor, color="#b03030", ls="--" if height == bar else ":", lw=1, label=text)
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel=said)
    ax.margins(x=0.3, y=0.15)
    for precision in [p for p in LOOKS if p in set(summary["precision"])]:
        ax.plot([], [], LOOKS[precision][1], color=LOOKS[precision][0], label=precision)
    ax.plot([], [], color="0.55", lw=1, label="Pareto front")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    names = list(summary.index)
    if len(names) > MOST_LABELS:  # names on all of many points can be read by nobody
        named = {"baseline", *pareto(summary, cost, quality)}
        names = [name if name in named else "" for name in names]
    _label_points(ax, x, shown, np.stack([low, high], axis=1), names)
    return figure


def _floor(values: np.ndarray) -> float:
    """Where a perfect 0 is drawn on a log axis: well below the smallest other value."""
    positive = values[values > 0]
    return float(positive.min() / 3) if len(positive) else 1e-7


def _label_points(ax, x: np.ndarray, y: np.ndarray, ranges: np.ndarray, names: list[str]) -> None:
    """Write every name at the nearest place around its point that is still free of names and points."""
    ax.figure.draw_without_rendering()  # settles limits and layout
    pixel = ax.figure.dpi / 72  # of one typographic point
    points = ax.transData.transform(np.column_stack([x, y])) / pixel
    low, high = (ax.transData.transform(np.column_stack([x, ranges[:, i]]))[:, 1] / pixel for i in (0, 1))
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in points]
    taken += [(px - 2, bottom, px + 2, top) for (px, _), bottom, top in zip(points, low, high, strict=True)]
    places = [
        (side * dx, dy, side)
        for dy in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45)
        for dx in (9, 14)
        for side in (1, -1)
    ]
    for i in np.argsort(-points[:, 1]):
        if not names[i]:
            continue
        width = 5.2 * len(names[i])
        for dx, dy, side in places:
            left = points[i, 0] + dx - (width if side < 0 else 0)
            box = (left, points[i, 1] + dy - 4.5, left + width, points[i, 1] + dy + 4.5)
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        arrow = {"arrowstyle": "-", "color": "0.7", "lw": 0.6, "shrinkA": 0} if dy else None
        where = {"xytext": (dx, dy), "textcoords": "offset points"}
        where |= {"ha": "left" if side > 0 else "right", "va": "center"}
        name = ax.annotate(names[i], (x[i], y[i]), fontsize=8, arrowprops=arrow, **where)
        name.set_in_layout(False)  # the layout is settled, the pixels above must stay true


def learning_curves(records: Sequence[dict], experiments: Sequence[str]) -> Figure:
    """Val AU-FA-FR by epoch, the mean of the seeds and their range."""
    figure, ((ax,),) = _figure()
    for i, name in enumerate(experiments):
        runs = [r["history"]["val_au_fa_fr"] for r in records if r["experiment"] == name and r["history"]]
        if not runs:
            continue
        values = np.maximum(np.array(runs), 1e-7)  # a perfect 0 has no logarithm
        epochs = np.arange(1, values.shape[1] + 1)
        (line,) = ax.plot(epochs, values.mean(0), label=name, lw=1.5, **_line(i))
        ax.fill_between(epochs, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), lw=0)
    ax.set(yscale="log", xlabel="epoch", ylabel="val AU-FA-FR, lower is better")
    ax.legend(frameon=False, fontsize=8)
    return figure


def fa_fr_curves(records: Sequence[dict], experiments: Sequence[str]) -> Figure:
    """FR against FA on test, mean and range of the seeds: the area below it is the metric."""
    figure, ((ax,),) = _figure(size=(7.5, 4.0))
    runs = {name: [r["metrics"]["curve"] for r in records if r["experiment"] == name] for name in experiments}
    curves = {name: [(curve["fa"], curve["fr"]) for curve in seeds] for name, seeds in runs.items()}
    fa, fr = (max((max(run[key]) for seeds in runs.values() for run in seeds), default=1.0) for key in ("fa", "fr"))
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set(yscale="log", xlabel="FA: false acceptances / all clips", ylabel="FR: false rejections / all clips")
    _falling(ax, curves, fa, 0.01 * (1 - fr), "1 % of other words")  # at the first threshold all keywords are rejected
    return figure


def _falling(ax, curves: dict[str, list[tuple]], last: float, asked: float, said: str) -> None:
    """For each name the mean of its seeds, whose steps fall, and their range; names at the ends; what is asked.

    Args:
        curves: name -> for each seed (x, y), by rising x.
        last: x where the figure ends.
        asked, said: x of the rate that is asked, and its name.
    """
    bands = {name: over_seeds(seeds, last) for name, seeds in curves.items() if seeds}
    floor = _floor(np.concatenate([[0], *(values for _, *band in bands.values() for values in band)]))
    for i, (x, *band) in enumerate(bands.values()):
        low, mean, high = np.maximum(band, floor)
        marks = {"marker": [*LOOKS.values()][i % len(LOOKS)][1], "ms": 5, "markevery": 0.12}
        ax.step(x, mean, where="post", lw=1.5, **_line(i), **marks)
        ax.fill_between(x, low, high, step="post", color=_line(i)["color"], alpha=0.15, lw=0)
    ax.axvline(asked, color="#b03030", ls="--", lw=1)
    beside = {"textcoords": "offset points", "fontsize": 8, "annotation_clip": False}
    where = {"xycoords": ax.get_xaxis_transform(), "xytext": (3, 4), "va": "bottom", "color": "#b03030"}
    ax.annotate(f"asked: {said}", (asked, 0), **beside, **where)
    ax.set(xlim=(0, last), ylim=(floor, None))
    ax.figure.draw_without_rendering()  # settles where the lines end; their names stand above each other
    taken = -np.inf
    for y, name, i in sorted((max(mean[-1], floor), name, i) for i, (name, (*_, mean, _)) in enumerate(bands.items())):
        height = ax.transData.transform((last, y))[1] * 72 / ax.figure.dpi
        taken = max(height, taken + 11)
        arrow = {"arrowstyle": "-", "lw": 1.2, "relpos": (0, 0.5), "shrinkB": 0, **_line(i)}
        ax.annotate(name, (last, y), xytext=(22, taken - height), va="center", arrowprops=arrow, **beside)


def gains(summary: pd.DataFrame) -> Figure:
    """What each clip model gained over its control, with the interval of the difference: the best first, by technique.

    The axis is linear in the middle, where most are, and logarithmic outside.
    """
    rows = summary[summary["gain"].notna() & (summary["technique"] != "stream")].sort_values("gain")
    groups = sorted(rows.groupby("technique"), key=lambda group: group[1]["gain"].median(), reverse=True)
    heights = [len(group) + 1.5 for _, group in groups] or [1]
    height = min(0.8 + 0.3 * sum(heights), 13.5)
    figure, axes = _figure(len(heights), 1, size=(8.5, height), sharex=True, height_ratios=heights)
    for ax, (technique, group) in zip(axes[:, 0], groups, strict=False):
        for i, (_, row) in enumerate(group.iterrows()):
            (colour, marker), gain = VERDICTS[verdict(row)], 1e5 * row["gain"]
            spread = np.maximum([[gain - 1e5 * row["gain_low"]], [1e5 * row["gain_high"] - gain]], 0)
            ax.errorbar(gain, i, xerr=spread, fmt=marker, color=colour, ms=5, elinewidth=1)
        ax.axvline(0, color="0.4", lw=1)
        ax.set_xscale("symlog", linthresh=max(1e5 * float(rows["gain"].abs().median()), 1e-3))
        ax.xaxis.set_major_formatter("{x:g}")
        names = [f"{name} against {row.control}" for name, row in group.iterrows()]
        ax.set_yticks(range(len(group)), names, fontsize=6.5 if len(rows) > 40 else 8)
        ax.set(ylim=(-0.8, len(group) - 0.2))
        ax.set_title(technique, fontsize=9, loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("AU-FA-FR ×1e5 of the control minus its own; right of 0 is better")
    for word, (colour, marker) in VERDICTS.items():
        axes[0, 0].plot([], [], marker, color=colour, label=word)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure


def pruning(curves: dict[str, pd.DataFrame], bar: float) -> Figure:
    """AU-FA-FR against the share of units that was cut: how much goes for nothing, and what tuning brings back.

    Args:
        curves: way of pruning -> summary rows (``au_fa_fr, seed_low, seed_high``), indexed by share, 0 to 1.
        bar: of the reports, drawn as a line.
    """
    figure, ((ax,),) = _figure()
    for i, (name, rows) in enumerate(curves.items()):
        low, middle, high = (
            rows[column].astype(float).clip(lower=1e-7) for column in ("seed_low", "au_fa_fr", "seed_high")
        )
        ax.plot(100 * rows.index, middle, marker="o", ms=4, lw=1.5, **_line(i), label=name)
        ax.fill_between(100 * rows.index, low, high, color=_line(i)["color"], alpha=0.15, lw=0)
    ax.axhline(bar, color="#b03030", ls="--", lw=1, label=f"the reports' bar, {bar:.1e}")
    ax.set(yscale="log", xlabel="units and channels cut, %", ylabel="test AU-FA-FR, lower is better")
    ax.legend(frameon=False, fontsize=8)
    return figure


def latency(table: pd.DataFrame) -> Figure:
    """Milliseconds of each runtime and precision: a marker per model, filled for a clip, open for a step.

    Args:
        table: of ``kwslib.streaming.export.latency_ms``; whiskers are its quartiles.
    """
    figure, ((ax,),) = _figure(size=(7.4, 3.6))
    kinds, models = table.index.droplevel([0, 1]).unique()[::-1].tolist(), table.index.unique("model").tolist()
    for (model, unit), rows in table.groupby(level=["model", "unit"], sort=False):
        i, (colour, marker) = models.index(model), [*LOOKS.values()][models.index(model)]
        y = [kinds.index(kind[2:]) + 0.22 * (len(models) / 2 - 0.5 - i) for kind in rows.index]
        spread = (rows["median"] - rows["q25"], rows["q75"] - rows["median"])
        looks = {"color": colour, "marker": marker, "mfc": colour if unit == "clip" else "white", "ls": "none", "ms": 5}
        ax.errorbar(rows["median"], y, xerr=spread, **looks, elinewidth=1, label=f"{model}, one {unit}")
    ax.set(xscale="log", xlabel="ms, median and quartiles", yticks=range(len(kinds)))
    ax.set_yticklabels([", ".join(kind) for kind in kinds])
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def sweep(trials: pd.DataFrame) -> Figure:
    """Val area against MACs, one point per trial of ``kwslib.lab.sweep.table``, with the Pareto front."""
    figure, ((ax,),) = _figure()
    floor = _floor(trials["val_au_fa_fr"].to_numpy())
    for stopped, label, colour in ((True, "stopped early", "0.7"), (False, "trained to the end", LOOKS["float32"][0])):
        rows = trials[trials["stopped_early"] == stopped]
        ax.plot(rows["macs_per_clip"], rows["val_au_fa_fr"].clip(lower=floor), "o", color=colour, label=label)
    front = trials[trials["front"]].sort_values("macs_per_clip")
    ax.plot(front["macs_per_clip"], front["val_au_fa_fr"].clip(lower=floor), color="0.55", lw=1, label="Pareto front")
    ax.set(yscale="log", xlabel=COST_LABELS["macs_per_clip"][0], ylabel="val AU-FA-FR, lower is better")
    ax.legend(frameon=False, fontsize=8)
    return figure


def heat_maps(tables: Sequence[pd.DataFrame], titles: Sequence[str], x_label: str, y_label: str) -> Figure:
    """AU-FA-FR ×1e5 over two settings, index and columns of each table; one picture per table, of the same colours."""
    figure, axes = _figure(1, len(tables), size=(4.2 * len(tables), 3.2))
    values = [table.to_numpy(float) * 1e5 for table in tables]
    lowest, highest = min(v.min() for v in values), max(v.max() for v in values)
    for ax, table, value, title in zip(axes[0], tables, values, titles, strict=True):
        ax.imshow(value, cmap="viridis_r", vmin=lowest, vmax=highest, aspect="auto")
        for (row, column), number in np.ndenumerate(value):
            dark = number > (lowest + highest) / 2
            ax.text(column, row, f"{number:.2f}", ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(table.shape[1]), [f"{v:g}" for v in table.columns])
        ax.set_yticks(range(table.shape[0]), [f"{v:g}" for v in table.index])
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.set_title(f"AU-FA-FR ×1e5, {title}", fontsize=9)
        ax.grid(False)
    return figure


def pictures(arrays: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Figure:
    """Log-mel pictures, (F, T) each, low frequencies at the bottom."""
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    figure, axes = _figure(rows, columns, size=(2.6 * columns, 2.1 * rows))
    low, high = np.percentile(np.concatenate([np.ravel(a) for a in arrays]).astype(float), [5, 100])
    for ax, array, title in zip(axes.flat, arrays, titles, strict=False):
        ax.imshow(array, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high)
        ax.set_title(title, fontsize=8)
        ax.grid(False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    axes[-1, 0].set(xlabel="time, 1 s", ylabel="mel bins")
    return figure


def attention_maps(maps: dict[str, np.ndarray], titles: Sequence[str], step_s: float) -> Figure:
    """Attention weights, (clips, S) of each model, with a title for each clip; steps are ``step_s`` seconds apart."""
    figure, axes = _figure(1, len(titles), size=(3.0 * len(titles), 2.6), sharey=True)
    for i, (ax, title) in enumerate(zip(axes[0], titles, strict=True)):
        for name, weights in maps.items():
            ax.plot(np.arange(weights.shape[1]) * step_s, weights[i], marker=".", label=name)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("s")
    axes[0, 0].set_ylabel("attention weight")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure


def stream_track(
    track: Any, curves: dict[str, tuple[np.ndarray, np.ndarray]], threshold: float, events_s: Sequence[float] = ()
) -> Figure:
    """A track with the score over it: waveform above, probability of the keyword below.

    Args:
        track: a ``kwslib.streaming.tracks.Track``; its keyword clips are shaded.
        curves: name -> (times in seconds, probabilities).
        events_s: when it was detected, marked above.
    """
    figure, axes = _figure(2, 1, size=(9.0, 4.2), sharex=True, height_ratios=(1, 2))
    wave, ax = axes[:, 0]
    thinned = track.samples[:: max(1, len(track.samples) // 6000)]
    wave.plot(np.linspace(0, track.seconds, len(thinned)), thinned, lw=0.4, color="0.4", rasterized=True)
    wave.set_yticks([])
    for name, (times, probabilities) in curves.items():
        ax.plot(times, probabilities, lw=1.3, label=name)
    for plot in (wave, ax):
        for start, end in track.keywords_s:
            plot.axvspan(start, end, color="#3a8f5c", alpha=0.18, lw=0)
    ax.axhline(threshold, color="#b03030", ls="--", lw=1)
    if len(events_s):
        ax.plot(events_s, [1.0] * len(events_s), "v", color="#b03030", ms=9, label="detected", zorder=3)
    ax.set(xlabel="s (shaded: the keyword clip)", ylabel="P(keyword)", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def trade_off(
    points: dict[str, list[tuple[np.ndarray, np.ndarray]]], hours: float, most_fa_per_h: float, asked_fa_per_h: float
) -> Figure:
    """Miss rate against false alarms per hour (detection error trade-off), mean and range of the seeds.

    Args:
        points: name -> for each seed (false alarms per hour, miss rates), by falling threshold.
        hours: of stream without keyword; below one alarm in that time the rate is not known.
        most_fa_per_h: where the figure ends.
        asked_fa_per_h: what the decisions were made for; marked.
    """
    figure, ((ax,),) = _figure(size=(8.5, 4.4))
    percent = {name: [(fa, 100 * np.asarray(miss)) for fa, miss in seeds] for name, seeds in points.items()}
    ax.axvspan(0, 1 / hours, color="0.5", alpha=0.12, lw=0)
    ax.set_xscale("symlog", linthresh=max(0.25, 1 / hours))
    ax.set(yscale="log", ylim=(1, 105), ylabel="keywords missed, %; 0 at the lower edge",
           xlabel=f"false alarms per hour (shaded: fewer than one in the {hours:.1f} h heard)")  # fmt: skip
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    _falling(ax, percent, most_fa_per_h, asked_fa_per_h, f"{asked_fa_per_h:g} per hour")
    return figure


def reliability(says: dict[str, tuple[np.ndarray, np.ndarray]], bins: int = 10) -> Figure:
    """How often the keyword is there where a model gives it a probability: on the diagonal it means what it says.

    Below: how many keywords and other seconds there are of each probability.

    Args:
        says: name -> (probabilities, whether it is the keyword), each (N,).
    """
    figure, ((ax,), (below,)) = _figure(2, size=(4.6, 5.0), sharex=True, height_ratios=(3, 1))
    ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
    for i, (name, (share, is_keyword)) in enumerate(says.items()):
        which = np.minimum((share * bins).astype(int), bins - 1)
        counts, *_ = below.hist(share, bins, range=(0, 1), histtype="step", lw=1.5, **_line(i))
        filled = np.flatnonzero(counts >= 5)  # of fewer, nothing can be said
        x, y = ([of[which == b].mean() for b in filled] for of in (share, is_keyword))
        ax.plot(x, y, marker="o", ms=4, lw=1.5, **_line(i), label=name)
    ax.set(ylabel="share of keywords there", xlim=(0, 1), ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=8)
    below.set(xlabel="probability that is given", ylabel="seconds", yscale="symlog", ylim=(0, None))
    return figure
