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
