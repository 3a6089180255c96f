import matplotlib.pyplot as plt
import pandas as pd

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
