"""PocketSphinx beside our detectors: asked once, counted as ours are."""

import numpy as np
import pytest

from kwslib.streaming import events
from kwslib.streaming.tracks import Track

pytest.importorskip("pocketsphinx")


def test_words_that_it_does_not_know_are_refused():
    with pytest.raises(events.NoSphinx, match="does not know how 'xqzzy' sounds"):
        events.sphinx([], "xqzzy", [1e-20])


def test_it_is_counted_as_our_detectors_are():
    noise = np.random.default_rng(0).normal(0, 0.01, 3 * 16_000).astype(np.float32)
    table = events.sphinx([Track(noise, [(1.0, 2.0)])], "sheila", [1e-50, 1.0])
    assert list(table["threshold"]) == [1e-50, 1.0] and list(table["keywords"]) == [1, 1]
    assert (table["miss_rate"].diff().dropna() >= 0).all() and (table["real_time_factor"] > 0).all()
