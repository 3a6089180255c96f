"""Events, what is found and what is a false alarm: counted by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from kwslib.config import CRNNConfig
from kwslib.data import corpora
from kwslib.nets.crnn import CRNN
from kwslib.streaming import events, tracks
from kwslib.streaming.decision import calibrate
from kwslib.streaming.events import ScoredTrack
from kwslib.streaming.tracks import StreamSpec


@pytest.fixture
def corpus(folder):
    return corpora.load(str(folder), "go")


@torch.no_grad()
def test_reset_scores_are_those_of_the_clip_model_on_the_last_second(corpus):
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=6)).eval()
    prepared = tracks.prepare(corpus, range(len(corpus.clips)), "go", StreamSpec(minutes=0.1))
    (said,) = events.score_tracks(model, prepared, reset_steps=2)
    for number in (0, 7, len(said.scores) - 1):
        window = torch.from_numpy(np.array(prepared.logmels[0][:, 16 * number : 16 * number + 101]))
        logits = model(window[None])[0]
        assert said.scores[number] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
        assert said.times_s[number] == pytest.approx(0.16 * number + 1.0)
    quiet = [said._replace(keywords_s=[])]  # its highest score is the first that no longer counts
    threshold = calibrate(quiet, 0.0)
    assert threshold == pytest.approx(said.scores.max())
    assert events.count(quiet, [threshold])["false_alarms"].iloc[0] == 0


TIMES = np.arange(1, 101) / 10  # ten seconds, ten scores in each
KEYWORDS = [(2.0, 3.0), (6.0, 7.0)]


def scored(**peaks):
    scores = np.zeros(100)
    for t, value in peaks.items():
        scores[round(float(t[1:].replace("_", ".")) * 10) - 1] = value
    return [ScoredTrack(KEYWORDS, 10.0, TIMES, scores)]


def test_what_is_found_counted_by_hand():
    tracks = scored(s2_5=3.0, s2_9=5.0, s3_4=4.0, s5_0=2.0, s9_0=1.0)
    table = events.count(tracks, [4.5, 2.5, 1.5, 0.5])
    assert list(table["found"]) == [1, 1, 1, 1]
    assert list(table["false_alarms"]) == [0, 0, 1, 2]
    assert list(table["miss_rate"]) == [0.5] * 4
    np.testing.assert_allclose(table["other_hours"], (2 + 2.5 + 2.5) / 3600)
    np.testing.assert_allclose(table["fa_per_h"], np.array([0, 0, 1, 2]) / (7 / 3600))
    np.testing.assert_allclose(table["latency_s"], [-0.1, -0.5, -0.5, -0.5])


def test_events_of_the_few_high_scores_are_those_of_all():
    rng = np.random.default_rng(0)
    track = ScoredTrack([], 10.0, TIMES, rng.normal(size=100))
    for threshold in (-1.0, 0.0, 1.0):
        expected = [t for t, _ in events.detect(TIMES, track.scores, threshold, 0.5)]
        assert events.event_times(track, threshold, 0.5) == expected


def test_the_trade_off_reaches_from_no_alarm_to_many_and_never_rises():
    rng = np.random.default_rng(0)
    curve = events.det([ScoredTrack(KEYWORDS, 10.0, TIMES, rng.normal(size=100)) for _ in range(20)])
    assert curve["fa_per_h"].iloc[0] == 0 and curve["fa_per_h"].iloc[-1] > 500
    assert (np.diff(curve["fa_per_h"]) >= 0).all() and (np.diff(curve["least_miss_rate"]) <= 0).all()
    for row in curve.sample(5, random_state=0).itertuples():
        assert row.least_miss_rate == curve.loc[curve["fa_per_h"] <= row.fa_per_h, "miss_rate"][: row.Index + 1].min()


def test_the_calibrated_threshold_is_the_lowest_that_keeps_the_rate():
    tracks = scored(s2_5=3.0, s4_0=2.5, s4_2=2.0, s5_0=1.0, s9_0=1.5)  # 4.0 and 4.2 are one alarm
    per_alarm = 3600 / 7
    for allowed, lowest in ((0, 2.5), (1, 1.5), (2, 1.0), (3, 0.0)):
        threshold = calibrate(tracks, allowed * per_alarm + 1)
        assert threshold == pytest.approx(lowest) and threshold > lowest
        assert events.count(tracks, [threshold])["false_alarms"].iloc[0] == allowed


def test_no_alarm_at_all_still_allows_some():
    assert events.most_fa_per_h(0, 1.0) == pytest.approx(-np.log(0.05))
    rate = events.most_fa_per_h(4, 2.0)
    assert stats.poisson.cdf(4, rate * 2.0) == pytest.approx(0.05)


def test_events_are_counted_by_hand():
    keywords = [(1.0, 2.0), (5.0, 6.0), (9.0, 10.0)]
    when = [0.5, 1.5, 2.4, 5.9, 8.0]  # alarm, found, the same one again, found, alarm
    assert events.count_events(when, keywords) == (2, 2)
    assert events.count_events(when, keywords, tolerance_s=0.0) == (2, 3)
    assert events.count_events([], keywords) == (0, 0)
    assert events.count_events([1.5, 2.4, 2.45], [(1.0, 2.0), (2.0, 3.0)]) == (2, 0)  # neighbours: one each
