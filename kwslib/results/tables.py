"""Results as people read them: numbers and tables made from records; beside ours, what the five reports published."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kwslib import paths
from kwslib.config import CRNNConfig
from kwslib.results import records

BAR = 5.5e-5  # the course's bar: 1.1 x the AU-FA-FR of its baseline, 5e-5
COMPACT_BYTES = 20_000  # a larger compact file is not published: the torch file beside it has as much
COSTS = (  # axes of the plot to explore: column, what it says, unit
    ("macs_per_clip", "MACs per clip", 1),
    ("detector_macs_per_clip", "MACs per clip, whole detector", 1),
    ("state_dict_bytes", "torch file, kB", 1e-3),
    ("compact_bytes", "compact file, kB", 1e-3),
    ("latency_ms_per_clip", "latency per clip, ms", 1),
)
QUALITIES = (  # the same, and the ends of its interval; lower is better
    ("au_fa_fr", "AU-FA-FR of test clips, ×1e-5", 1e5, "ci95_low", "ci95_high"),
    ("stream_miss", "missed in test streams, %", 100, "stream_low", "stream_high"),
    ("people_miss", "people: misses at 1 % FA, %", 100, "people_miss_low", "people_miss_high"),
)
COST_LABELS = {  # of the figures: what an axis says, unit
    "macs_per_clip": ("MACs per 1-s clip", 1.0),
    "detector_macs_per_clip": ("MACs per 1-s clip of the whole detector, log-mels included", 1.0),
    "state_dict_bytes": ("size of torch.save(state_dict), kB", 1e-3),
    "weights_bytes": ("weights alone, kB", 1e-3),
    "compact_bytes": ("size of the compact file, kB", 1e-3),
}
QUALITY_LABELS = {  # with the columns of the range that is drawn
    "au_fa_fr": ("test AU-FA-FR, lower is better", "seed_low", "seed_high"),
    "people_miss": ("share of keywords of people missed at 1 % FA", "people_miss_low", "people_miss_high"),
}


def area(value: float) -> str:
    """An AU-FA-FR for people, in units of 1e-5.

    >>> area(3.14159e-5), area(-1e-9)
    ('3.14', '0.00')
    """
    return "–" if pd.isna(value) else f"{round(value * 1e5, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def times(value: float) -> str:
    """A ratio for people.

    >>> times(10.304)
    '10.3×'
    """
    return "–" if pd.isna(value) else f"{value:.1f}×"


def milliseconds(value: float) -> str:
    """A latency for people.

    >>> milliseconds(0.456), milliseconds(float("nan"))
    ('0.46', '–')
    """
    return "–" if pd.isna(value) else f"{value:.2f}"


CLEAR = ("better", "worse")  # verdicts whose interval does not hold 0


def verdict(row: pd.Series) -> str:
    """What an experiment bought over its control, in at most three words.

    >>> verdict(pd.Series({"gain": 2e-5, "gain_low": 1e-6, "gain_high": 3e-5}))
    'better'
    """
    if pd.isna(row["gain"]):
        return ""
    if row["gain_low"] > 0:
        return "better"
    return "worse" if row["gain_high"] < 0 else "no clear difference"


PEOPLE = "people: misses at 1 % FA, %"  # a column of ``display_table`` where there are any
SMOKE = "This was a smoke run: it shows that everything runs. Its figures mean nothing."


def percent(value: float) -> str:
    """A share for people, in percent.

    >>> percent(0.0612)
    '6.1'
    """
    return f"{100 * value:.1f}"


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The results table as people read it, one row per experiment."""
    best = summary["au_fa_fr"].idxmin()
    rows = {}
    for name, row in summary.iterrows():
        mean = area(row["au_fa_fr"])
        gain = f"{area(row['gain'])} ({area(row['gain_low'])} to {area(row['gain_high'])})"
        rows[name] = {
            "AU-FA-FR ×1e5 ↓": f"**{mean}**" if name == best else mean,
            "95 % interval": f"{area(row['ci95_low'])} to {area(row['ci95_high'])}",
            "ratio to baseline ↓": "–" if pd.isna(row["ratio"]) else f"{row['ratio']:.2f}",
            "gain over control ×1e5 ↑": "" if pd.isna(row["gain"]) else gain,
            "MACs per clip ↓": f"{row['macs_per_clip']:,}",
            "fewer MACs ↑": times(row["speed_up"]),
            "size, kB ↓": f"{row['state_dict_bytes'] / 1e3:.1f}",
            "compression ↑": times(row["compression"]),
            "compact file, kB ↓": "–" if pd.isna(row["compact_bytes"]) else f"{row['compact_bytes'] / 1e3:.1f}",
            "compression, compact ↑": times(row["compact_compression"]),
            "ms per clip": milliseconds(row["latency_ms_per_clip"]),
            "ms per step": milliseconds(row["latency_ms_per_step"]),
        }
    table = pd.DataFrame(rows).T.rename_axis("experiment")
    if summary["people_miss"].notna().any():
        miss, low, high = (summary[f"people_miss{end}"].map(percent) for end in ("", "_low", "_high"))
        said = (miss + " (" + low + " to " + high + ")").where(summary["people_miss"].notna(), "–")
        table.insert(2, PEOPLE, said)
    return table


def stream_table(points: pd.DataFrame) -> pd.DataFrame:
    """What models do on streams of test speakers as people read it, one row per experiment, means over seeds.

    Args:
        points: of ``kwslib.results.records.stream_points``.
    """
    rows = {}
    for name, runs in points.groupby("experiment", sort=False):
        rows[name] = {}
        for (stream, state), asked in runs[runs["asked_fa_per_h"].notna()].groupby(["stream", "state"], sort=False):
            found = 100 * (1 - asked["miss_rate"])
            what = f"{stream}, {state}: "
            rows[name][what + "found, %"] = f"{found.mean():.1f} ({found.min():.1f} to {found.max():.1f})"
            rows[name][what + f"FA/h, asked {asked['asked_fa_per_h'].iloc[0]:g}"] = f"{asked['fa_per_h'].mean():.2f}"
            if state == "carried":
                late = asked["latency_s"].median()
                rows[name][what + "latency, ms"] = "–" if pd.isna(late) else f"{1000 * late:.0f}"
        for stream, rest in runs[runs["asked_fa_per_h"].isna()].groupby("stream", sort=False):
            alarms, hours = rest["false_alarms"].mean(), max(rest["other_hours"].mean(), 1e-9)
            rows[name][f"{stream}: FA/h"] = f"{alarms / hours:.2f} (≤ {rest['most_fa_per_h'].max():.1f})"
    return pd.DataFrame(rows).T.fillna("–").rename_axis("experiment")


def decided(points: pd.DataFrame) -> pd.DataFrame:
    """Those with a decision that is made as a detector runs, its state carried on."""
    return points[(points["state"] == "carried") & points["asked_fa_per_h"].notna()]


def val_misses(points: pd.DataFrame) -> pd.Series:
    """Share of the keywords of val streams that each experiment misses at the asked rates: mean of streams, seeds."""
    means = decided(points).groupby(["experiment", "stream"], sort=False)["val_miss_rate"].mean()
    return means.groupby(level="experiment").mean().dropna()


FEWER_MACS, MISSES_FOR_BYTES = 10, 0.02  # what a recommended model needs; what the smallest may miss more than the best


def recommended(found: list[dict], summary: pd.DataFrame, points: pd.DataFrame) -> dict[str, dict]:
    """Which model to take, by purpose: the record of its run. Chosen on val alone, of those with 10 times fewer MACs.

    ``clips``     of those without a decision made on streams, the best AU-FA-FR, mean of the seeds
    ``stream``    of those with one, the fewest keywords missed on val streams, mean of streams and seeds
    ``smallest``  of those that miss at most 2 points more than that one, the fewest bytes of the compact file

    Voices do not tell what people sound like. Where nobody else is in val, the latter two are of those that teachers of
    several kinds taught, if any: people say so (CHANGELOG.md).
    Of its seeds the one that is itself best by the same figure of val: that file is what people get, and test has no
    say. A purpose that nothing serves is left out.
    """
    small = summary.index[summary["speed_up"] >= FEWER_MACS]
    streams = set(points["experiment"]) if len(points) else set()
    areas = summary.loc[[name for name in small if name not in streams], "au_fa_fr_val"].astype(float).dropna()
    of_run = {(r["experiment"], r["seed"]): r["metrics"]["au_fa_fr_val"] for r in found}
    chosen = {"clips": areas.idxmin()} if len(areas) else {}
    missed = val_misses(points) if streams else pd.Series(dtype=float)
    if len(missed := missed[missed.index.isin(small)]):
        of_run |= decided(points).groupby(["experiment", "seed"])["val_miss_rate"].mean().to_dict()
        mixed = {r["experiment"] for r in found if isinstance(r["recipe"]["teacher"], list)}.intersection(missed.index)
        if mixed and found[0]["data"]["corpus"] == "synthetic":
            missed = missed[sorted(mixed)]
        near = missed[missed <= missed.min() + MISSES_FOR_BYTES]
        n_bytes = summary.loc[near.index, "compact_bytes"].astype(float)
        chosen |= {"stream": near.idxmin(), "smallest": n_bytes.idxmin() if n_bytes.notna().any() else near.idxmin()}
    runs = {name: [r for r in found if r["experiment"] == name] for name in chosen.values()}
    return {why: min(runs[name], key=lambda r: of_run[r["experiment"], r["seed"]]) for why, name in chosen.items()}


def finds(record: dict) -> tuple[str, str]:
    """What a run finds in the test part, and at which false alarms: on streams where it has a decision, else in clips.

    >>> finds({"metrics": {"curve": {"fa": [0.0, 0.005, 0.02], "fr": [0.2, 0.01, 0.0]}}})
    ('95.0 %', '1 % of other words')
    """
    points = record["metrics"].get("streams", {}).get("points", ())
    alarms = [f"{point['fa_per_h']:.2f} (≤ {point['most_fa_per_h']:.1f})" for point in points]
    talk = [f", in talk {said}" for point, said in zip(points, alarms, strict=True) if point["stream"] == "sentences"]
    for point, said in zip(points, alarms, strict=True):
        if point["state"] == "carried" and pd.notna(point["asked_fa_per_h"]) and pd.notna(point["miss_rate"]):
            return f"{percent(1 - point['miss_rate'])} %", f"{said} per hour{''.join(talk[:1])}"
    curve = record["metrics"].get("curve", {"fa": [], "fr": []})
    all_missed = max(curve["fr"], default=0)  # where nothing is accepted yet: the share of keywords
    missed = [fr for fa, fr in zip(curve["fa"], curve["fr"], strict=False) if fa <= 0.01 * (1 - all_missed)]
    return (f"{percent(1 - min(missed) / all_missed)} %", "1 % of other words") if all_missed else ("–", "–")


def findings(summary: pd.DataFrame) -> dict[str, list[str]]:
    """What worked and what did not, as sentences that follow from the numbers alone.

    An experiment worked when it is below the reports' bar; of those, the ones that no other one beats in quality
    and MACs get a sentence. A technique worked when its gain over the control is beyond the interval, or, where
    it makes the model smaller than the control, when its loss is not.
    """
    said = summary.apply(verdict, axis=1)
    below = summary["au_fa_fr"] <= BAR
    of_control = summary["control"].map(summary["weights_bytes"])
    smaller = summary["weights_bytes"] < of_control
    front = records.pareto(summary, "macs_per_clip")

    def named(rows: pd.Series, start: str) -> list[str]:
        """One sentence with these experiments and their gains, or none."""
        gains = [f"{name} ({area(row['gain'])})" for name, row in summary[rows].iterrows()]
        return [f"{start} (gain ×1e5): {', '.join(gains)}."] if gains else []

    worked = [
        f"{name}: AU-FA-FR {area(row['au_fa_fr'])}e-5, below the reports' bar of {area(BAR)}e-5"
        + ("." if name == "baseline" else f", with {times(row['speed_up'])} fewer MACs and {times(row['compression'])} "
           "fewer bytes than the baseline.")
        for name, row in summary[below & summary.index.isin(["baseline", *front])].iterrows()
    ]  # fmt: skip
    worked += named(said == "better", "Better than its control, beyond the interval")
    worked += named(smaller & (said == "no clear difference"), "Smaller than its control without a clear loss")
    failed = named(said == "worse", "Worse than its control, beyond the interval")
    failed += named(~smaller & (said == "no clear difference"), "No clear difference from its control")
    above = [f"{name} ({area(row['au_fa_fr'])})" for name, row in summary[~below].iterrows()]
    if above:
        failed.append(f"Above the reports' bar of {area(BAR)}e-5 (AU-FA-FR ×1e5): {', '.join(above)}.")
    return {"worked": worked, "failed": failed}


def over_seeds(curves: Sequence[tuple], last: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Curves that fall in steps, as one: each x of any of them up to ``last``, and least, mean and largest y there.

    Args:
        curves: for each seed (x, y), by rising x; of several y at an x the last counts, before the first x the first.

    >>> x, low, mean, high = over_seeds([([0, 2], [0.8, 0.2]), ([0, 0, 1], [0.9, 0.4, 0.0])], last=3)
    >>> x.tolist(), low.tolist(), mean.round(2).tolist(), high.tolist()
    ([0, 1, 2, 3], [0.4, 0.0, 0.0, 0.0], [0.6, 0.4, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2])
    """
    x = np.unique(np.concatenate([[last], *(at for at, _ in curves)]))
    x = x[x <= last]
    y = np.stack([np.asarray(fell)[np.maximum(np.searchsorted(at, x, "right") - 1, 0)] for at, fell in curves])
    return x, y.min(0), y.mean(0), y.max(0)


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown."""
    table = table.reset_index()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (table.columns, *table.to_numpy())]
    return "\n".join([lines[0], "|---" * len(table.columns) + "|", *lines[1:]])


def front(summary: pd.DataFrame) -> pd.DataFrame:
    """The baseline and what no other experiment beats in both quality and MACs, or quality and bytes."""
    ahead = [*records.pareto(summary, "macs_per_clip"), *records.pareto(summary, "compact_bytes")]
    return summary[summary.index.isin(["baseline", *ahead])]


def published_file(record: dict) -> str:
    """The name of the file of a run that is published for taking: the compact one where it is small."""
    size = record["cost"].get("compact_bytes")
    compact = pd.notna(size) and size <= COMPACT_BYTES
    return f"{paths.label(record['experiment'], record['seed'])}.{'kws' if compact else 'pt'}"


def explored(
    found: list[dict], summary: pd.DataFrame, points: pd.DataFrame, home: str, to_records: str = "records/"
) -> dict:
    """What ``explore.js`` draws, as plain values: a row per experiment, and axes that any of them has.

    Args:
        home, to_records: ways from the page to checkpoints, none if empty, and to records.
    """
    table = summary.assign(stream_miss=None, stream_low=None, stream_high=None)
    if len(points):  # of each run the mean over streams; from there mean and range over seeds
        missed = decided(points).groupby(["experiment", "seed"])["miss_rate"].mean().groupby("experiment")
        table = table.assign(stream_miss=missed.mean(), stream_low=missed.min(), stream_high=missed.max())
    x, y = ([axis for axis in axes if table[axis[0]].notna().any()] for axes in (COSTS, QUALITIES))
    columns = ["note", "technique", "precision", "control", "gain", "gain_low", "gain_high"]
    columns += [key for axis, _, _, *ends in (*x, *y) for key in (axis, *ends)]
    runs: dict[str, list[dict]] = {}
    for r in found:
        runs.setdefault(r["experiment"], []).append(r)
    rows = [
        [name, *map(_plain, row), learned(runs[name]), list(map(published_file, runs[name]))]
        for name, *row in table[columns].itertuples(name=None)
    ]
    given = {"columns": ["name", *columns, "learned", "files"], "rows": rows, "x": x, "y": y}
    return given | {"bar": BAR, "home": home, "records": to_records}


def learned(runs: list[dict], most: int = 20) -> list[list] | None:
    """The learning curve of an experiment: epochs, and the least, mean and largest val AU-FA-FR of the seeds, ×1e5.

    Thinned to ``most`` epochs, the first and the last among them; nothing where nothing was trained.

    >>> learned([{"history": {"val_au_fa_fr": areas}} for areas in ([4e-5, 2e-5, 1e-5], [6e-5, 0, 0])], most=2)
    [[1, 3], [4.0, 0.0], [5.0, 0.5], [6.0, 1.0]]
    """
    areas = [r.get("history", {}).get("val_au_fa_fr", []) for r in runs]
    n = min(map(len, areas))
    if n == 0:
        return None
    kept = np.unique(np.linspace(0, n - 1, most).round().astype(int))
    values = 1e5 * np.array([area[:n] for area in areas])[:, kept]
    return [(kept + 1).tolist(), *(of(values, axis=0).round(2).tolist() for of in (np.min, np.mean, np.max))]


def _plain(value: object) -> object:
    """A value for JSON: nothing where it is not known, of a fraction six digits.

    >>> _plain(float("nan")), _plain(0.123456789), _plain("a"), _plain(7)
    (None, 0.123457, 'a', 7)
    """
    if pd.isna(value):
        return None
    return value if isinstance(value, str) else int(value) if float(value).is_integer() else float(f"{value:.6g}")


# What the five student reports published, as data: shown beside our numbers, never mixed with them. AU-FA-FR is on each
# report's own random 80/20 validation part, best epoch, one run. Speed-up and compression are as printed; ``base``
# names the hidden size of the baseline they refer to.
_COLUMNS = ("row", "setting", "ours", "speed_up", "compression", "base", "au_fa_fr")
_ROWS = (
    ("A1", "dark knowledge, T = 10, KD weight 0.6", "a1-kd", 10.3, 11.7, 64, 6.5e-5),
    ("A2", "dark knowledge, one-linear-layer attention", "a2-kd", 10.2, 12.9, 64, None),
    ("A3", "A1 trained in mixed precision, kept in fp16", "a1-kd-mixed-fp16", 10.3, 19.2, 64, 5.34e-5),
    ("B0", "baseline, fixed permutation", "baseline", 1.0, 1.0, 64, 2.9e-5),
    ("B1", "dark knowledge, 25 runs of tuning", "b1-kd", 5.3, 6.5, 64, 3.7e-5),
    ("B2", "dark knowledge + attention KD, bottleneck", "b2-attention", 5.3, 6.6, 64, 5.2e-5),
    ("B3", "B2 + dynamic int8", "b2-attention-int8", 5.3, 16.0, 64, 5.2e-5),
    ("C1", "mild dark knowledge, the middle student", "c1-kd", None, None, 64, None),
    ("C2", "two-stage dark knowledge", "c2-kd", 10.08, None, 64, None),
    ("C3", "C2 + dynamic int8", "c2-kd-int8", 10.08, 20.35, 64, 5.25e-5),
    ("C5", "pruning 0.3, each gate cut for itself, tuned: 100 times worse", "prune-30-tuned", None, None, 64, None),
    ("D", "dark knowledge, best of nine settings", "d-kl-labels", 4.65, 3.80, 32, 5.5009e-5),
    ("E1", "layer-wise KD, GRU", "e1-layers", 2.059, 2.578, 32, None),
    ("E2", "layer-wise KD, RNN instead of GRU", "e2-layers", 8.507, 7.623, 32, None),
    ("E3", "E2 in fp16", "e2-layers-fp16", 8.507, 12.045, 32, 5.132e-5),
)

# Architectures of the reports: name -> (sizes, parameters, MACs for a
# batch of 128 clips of 1 s without and with the convolution's bias).
ARCHITECTURES = {
    "base": (CRNNConfig(), 70_443, 119_324_672, 119_527_424),
    "base, h32": (CRNNConfig(hidden_size=32), 25_387, 55_382_016, 55_584_768),
    "A1": (CRNNConfig(2, hidden_size=22, gru_num_layers=1), 4_737, 11_579_392, 11_630_080),
    "A2": (CRNNConfig(2, hidden_size=24, gru_num_layers=1, attention_size=0), 4_741, 11_630_592, 11_681_280),
    "B1": (CRNNConfig(4, hidden_size=20), 9_047, 22_617_600, 22_718_976),
    "B2": (CRNNConfig(4, hidden_size=20, attention_size=15), 8_937, 22_469_760, 22_571_136),
    "C-mid": (CRNNConfig(8, hidden_size=40), 34_731, 68_664_320, 68_867_072),
    "C-small": (CRNNConfig(2, stride=(2, 6), hidden_size=16, gru_num_layers=1), 3_117, 11_788_288, 11_852_800),
    "C-prune": (CRNNConfig(8, (5, 16), (2, 6), hidden_size=24), 17_163, 54_334_464, 54_610_944),
    "C-pruned": (CRNNConfig(8, (5, 16), (2, 6), hidden_size=17), 11_157, 42_653_312, 42_929_792),
    "D": (CRNNConfig(3, (7, 20), (7, 12), hidden_size=30), 11_256, 11_888_640, 11_902_080),
    "E1": (CRNNConfig(8, (10, 20), (5, 8), hidden_size=20), 9_291, 26_897_920, 26_976_768),
    "E2": (CRNNConfig(3, stride=(5, 8), hidden_size=20, cell="rnn"), 2_546, 6_510_080, 6_543_872),
}


# What the reports' architectures take on disk: bytes of torch.save(state_dict) of torch 2.11 in float32, float16 and
# dynamic int8, recounted from the architectures, the model free of a profiler's leftovers.
FILE_BYTES = {
    "base": (287_691, 146_827, 84_177), "base, h32": (107_467, 56_715, 37_841), "A1": (23_623, 14_215, 12_941),
    "A2": (23_109, 13_637, 11_657), "B1": (41_867, 23_563, 19_409), "B2": (41_419, 23_371, 19_281),
    "C-mid": (144_651, 75_147, 47_313), "C-small": (17_351, 11_015, 11_341), "D": (50_443, 28_107, 22_225),
    "E1": (42_827, 24_075, 23_249), "E2": (15_947, 10_635, 16_657),
}  # fmt: skip


def beside(summary: pd.DataFrame) -> pd.DataFrame:
    """Each published row that one of our experiments repeats, with our figures next to it.

    Args:
        summary: of ``kwslib.results.records.summary``.
    """
    rows = pd.DataFrame(_ROWS, columns=_COLUMNS).set_index("row")
    rows = rows[rows["ours"].isin(summary.index)]
    found = summary.loc[rows["ours"]]
    out = {"setting": rows["setting"], "hidden units of their baseline (ours: 64)": rows["base"]}
    for name, column in (("speed_up", "speed_up"), ("compression", "compression"), ("AU-FA-FR", "au_fa_fr")):
        out |= {f"{name}, published": rows[column], f"{name}, ours": found[column].to_numpy()}
    return pd.DataFrame(out)
