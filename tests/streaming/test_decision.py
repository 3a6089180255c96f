"""From scores to decisions, against hand counts, closed formulas and scikit-learn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import LogisticRegression

from kwslib.config import CRNNConfig, FeatureConfig, describe
from kwslib.data import corpora
from kwslib.lab.study import open_study
from kwslib.nets.crnn import CRNN
from kwslib.streaming import events, tracks
from kwslib.streaming.decision import (
    Decide,
    Decision,
    closest,
    compare,
    fitted_probability,
    highest_scores,
    measure,
    read_decision,
    with_room,
)
from kwslib.streaming.events import ScoredTrack
from kwslib.streaming.tracks import StreamSpec
from kwslib.training import checkpoints

TIMES = np.arange(1, 101) / 10  # ten seconds, ten scores in each
KEYWORDS = [(2.0, 3.0), (6.0, 7.0)]


def test_events_as_they_come_are_those_of_the_whole_track():
    scores = np.random.default_rng(0).normal(size=100)
    decision = Decision(threshold=0.8, smoothing_steps=3, refractory_s=0.5)
    live = [t for t, _, fires in decision.watch(zip(TIMES, scores, strict=True)) if fires]
    (smooth,) = decision.smooth([ScoredTrack([], 10.0, TIMES, scores)])
    assert live == events.event_times(smooth, 0.8, 0.5) and live


def test_a_threshold_may_be_given_as_a_probability():
    decision = Decision(scale=2.0, offset=-3.0).at_probability(0.9)
    assert decision.probability(decision.threshold) == pytest.approx(0.9)
    assert Decision().at_probability(0.0).threshold == -np.inf and Decision().at_probability(1.0).threshold == np.inf
    with pytest.raises(ValueError, match="from 0 to 1, not 1.5"):
        Decision().at_probability(1.5)


def test_ways_to_score_are_compared_with_one_decision_and_smoothed_as_long():
    decision = Decision(threshold=1.0, smoothing_steps=2, refractory_s=0.5)
    still, once, lasting = np.zeros(100), np.zeros(100), np.zeros(100)
    once[24], lasting[24:26] = 1.9, 1.1  # at 2.5 s; and until 2.6 s
    tenths = [ScoredTrack(KEYWORDS[:1], 10.0, TIMES, scores) for scores in (still, once, lasting)]
    fifths = [ScoredTrack(KEYWORDS[:1], 10.0, TIMES[::2], scores[::2]) for scores in (still, once, lasting)]
    late = [ScoredTrack([(8.0, 9.0)], *track[1:]) for track in tenths]  # the keyword is elsewhere
    compared = compare(decision, {"steps of 0.1 s": tenths, "of 0.2 s": fifths, "late": late})
    assert compared.table.to_dict("index") == {
        "steps of 0.1 s": {"found": 1, "keywords": 3, "false alarms": 0},
        "of 0.2 s": {"found": 2, "keywords": 3, "false alarms": 0},  # of one step each: two would last too long
        "late": {"found": 0, "keywords": 3, "false alarms": 1},
    }
    assert compared.track == 1 and compared.events_s == []
    assert compared.threshold == decision.probability(1.0)
    times, shares = compared.curves["steps of 0.1 s"]
    assert times is TIMES and shares[24] == shares[25] == decision.probability(0.95)


def test_each_keyword_and_each_other_second_counts_by_its_highest_score():
    scores = np.zeros(100)
    for t, value in ((0.5, 1.0), (2.4, 5.0), (3.4, 6.0), (4.0, 2.0), (7.4, 3.0), (9.2, 4.0)):
        scores[round(10 * t) - 1] = value
    highest, is_keyword = highest_scores([ScoredTrack(KEYWORDS, 10.0, TIMES, scores)])
    # seconds from 0, 1; keyword 2 to 3.5; from 3.5, 4.5; keyword 6 to 7.5; from 7.5, 8.5
    assert highest.tolist() == [1.0, 0.0, 6.0, 2.0, 0.0, 3.0, 0.0, 4.0]
    assert is_keyword.tolist() == [False, False, True, False, False, True, False, False]


def test_probabilities_are_those_of_a_logistic_regression():
    rng = np.random.default_rng(0)
    is_keyword = rng.random(5000) < 0.05
    scores = rng.normal(np.where(is_keyword, 6.0, 1.0), 2.0)
    scale, offset = fitted_probability(scores, is_keyword)
    fitted = LogisticRegression(C=np.inf).fit(scores[:, None], is_keyword)
    assert scale == pytest.approx(fitted.coef_[0, 0], rel=0.03)
    assert offset == pytest.approx(fitted.intercept_[0], rel=0.03)
    share = Decision(scale=scale, offset=offset).probability(scores)
    assert share.mean() == pytest.approx(is_keyword.mean(), rel=0.05)


def test_probabilities_stay_finite_where_nothing_overlaps_and_where_all_is_wrong():
    scores = np.array([-3.0, -2.0, 2.0, 3.0])
    for is_keyword in (scores > 0, scores < 0, scores > 9):
        scale, offset = fitted_probability(scores, is_keyword)
        assert np.isfinite([scale, offset]).all() and scale > 0


def test_smoothing_is_taken_where_it_helps():
    rng = np.random.default_rng(0)
    noisy = rng.normal(0, 1, 600)
    keywords = [(10.0 * i + 2, 10.0 * i + 3) for i in range(6)]
    times = np.arange(1, 601) / 10
    for start, end in keywords:
        noisy[(times > start + 0.3) & (times <= end)] += 2.2
    assert closest([ScoredTrack(keywords, 60.0, times, noisy)], fa_per_h=0.0).smoothing_steps > 1
    clean = np.where(noisy > 90, 0, 0.0)
    for start, _ in keywords:
        clean[np.searchsorted(times, start + 0.5)] = 5.0
    assert closest([ScoredTrack(keywords, 60.0, times, clean)], fa_per_h=0.0).smoothing_steps == 1


def test_where_there_is_room_the_threshold_is_in_the_middle_between_alarms_and_misses():
    scores = np.zeros(600)
    times = np.arange(1, 601) / 10
    keywords = [(10.0 * i + 2, 10.0 * i + 3) for i in range(6)]
    for (start, _), peak in zip(keywords, (9.0, 9.0, 9.0, 8.0, 6.0, 1.0), strict=True):
        scores[np.searchsorted(times, start + 0.5)] = peak
    scores[75] = 2.0  # the only alarm: thresholds above 2 have none
    tracks = [ScoredTrack(keywords, 60.0, times, scores)]
    for share, threshold in ((None, 2.0), (5 / 6, (2 + 6) / 2), (0.5, (2 + 9) / 2), (1.0, 2.0)):  # the 1.0 are below
        made = with_room(tracks, closest(tracks, fa_per_h=0.0), share)
        assert made.threshold == pytest.approx(threshold) and made.least_found == share
        assert events.count(made.smooth(tracks), [made.threshold])["fa_per_h"].iloc[0] == 0


def test_talk_is_a_condition_of_every_decision():
    """Of two tracks, the one without keywords allows fewer alarms: the threshold is above its peaks, too."""
    times = np.arange(0.1, 60, 0.1)
    words, speech = np.zeros(len(times)), np.zeros(len(times))
    words[100], words[300] = 9.0, 2.0  # the keyword; a false peak
    speech[[50, 200, 400]] = 5.0, 4.0, 3.0
    tracks = [ScoredTrack([(9.8, 10.3)], 60.0, times, words)]
    alone = closest(tracks, fa_per_h=0.0)
    assert 2.0 < alone.threshold < 2.1
    for rate, above in ((0.0, 5.0), (60.0, 4.0), (120.0, 3.0), (200.0, 2.0)):
        made = closest(tracks, 0.0, [([ScoredTrack([], 60.0, times, speech)], rate)])
        assert above < made.threshold < above + 0.1


@pytest.fixture
def measured(folder):
    corpus = corpora.load(str(folder), "go")
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=6)).eval()
    common = {"minutes": 2, "words_per_minute": 20, "keyword_share": 0.3}
    specs = [StreamSpec(**common, seed=i, name=name, fa_per_h=(i + 1) * 30.0) for i, name in enumerate("ab")]
    step = Decide((*specs, StreamSpec(minutes=1, words_per_minute=0, name="noise")), ("b",))
    rows = range(len(corpus.clips))
    val, test = (
        {spec.name: tracks.prepare(corpus, rows, "go", spec) for spec in specs}
        for specs in (step.made_on, step.streams)
    )
    return model, val, measure(model, step, val, test)


def test_what_is_measured_is_what_is_counted(measured):
    model, val, (decision, found) = measured
    json.dumps(found, allow_nan=False)
    kinds = [(p["stream"], p["state"], p["asked_fa_per_h"]) for p in found["points"]]
    assert kinds[:3] == [("a", "carried", 30.0), ("b", "carried", 60.0), ("b", "reset", 60.0)]
    assert kinds[3:] == [("b", "carried", None), ("noise", "carried", None)]
    heard = decision.smooth(events.score_tracks(model, val["a"]))
    row = events.count(heard, [decision.threshold]).iloc[0]
    assert row["fa_per_h"] <= 30.0
    # val and test are the same clips here, so the decision keeps its promise on both
    assert found["points"][0]["false_alarms"] == row["false_alarms"] and found["points"][0]["found"] == row["found"]
    assert set(found["curves"]) == {"a, carried", "b, carried", "b, reset"}


def test_a_decision_is_as_quiet_as_asked_on_recordings_of_ones_own(folder, tmp_path):
    torch.manual_seed(0)
    model, corpus = CRNN(CRNNConfig(2, hidden_size=6)).eval(), corpora.load(str(folder), "go")
    (tmp_path / "talk").mkdir()
    noise = np.random.default_rng(1).standard_normal(120 * 16_000) * 0.1
    soundfile.write(tmp_path / "talk" / "all.wav", noise, 16_000)
    talk = replace(tracks.recordings(tmp_path / "talk"), fa_per_h=60.0)
    words = StreamSpec(minutes=1, words_per_minute=20, keyword_share=0.3, name="a", fa_per_h=30.0)
    rows = range(len(corpus.clips))
    heard = {
        part: {spec.name: tracks.prepare(corpus, rows, "go", spec, part) for spec in (words, talk)}
        for part in ("val", "test")
    }
    free, _ = measure(model, Decide((words,), ()), *heard.values())
    bound, found = measure(model, Decide((words, talk), ()), *heard.values())
    on_talk = [
        events.count(made.smooth(events.score_tracks(model, heard["val"]["recordings"])), [made.threshold]).iloc[0]
        for made in (free, bound)
    ]
    assert on_talk[0]["fa_per_h"] > 60.0 >= on_talk[1]["fa_per_h"] and bound.threshold > free.threshold
    assert [(p["stream"], p["asked_fa_per_h"]) for p in found["points"]] == [("a", 30.0), ("recordings", None)]


def test_a_decision_travels_with_the_checkpoint(measured, tmp_path):
    model, _, (decision, _) = measured
    described = {
        "keyword": "go",
        "threshold": 0.0,
        "features": describe(FeatureConfig()),
        "model": describe(model.config),
    }
    described["decision"] = vars(decision)
    checkpoints.save(tmp_path / "m.pt", model, described)
    assert read_decision(checkpoints.load(tmp_path / "m.pt")[1]) == decision
    compact = read_decision(checkpoints.load(tmp_path / "m.kws")[1])
    assert compact.threshold == pytest.approx(decision.threshold, rel=1e-5)
    assert compact.smoothing_steps == decision.smoothing_steps
    assert read_decision({}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": "high"},
        {"threshold": "1.5"},
        {"threshold": float("nan")},
        {"threshold": 10**400},
        {"offset": True},
        {"scale": 0.0},
        {"smoothing_steps": 0},
        {"volume": 11},
        [1],
    ],
)
def test_a_damaged_decision_is_named(wrong):
    with pytest.raises(ValueError, match="makes no sense"):
        read_decision({"decision": wrong})


def test_a_decision_that_cannot_be_made_is_refused_before_any_training():
    rated = StreamSpec(name="a", fa_per_h=1.0)
    for streams_, reset, message in (
        ((replace(rated, name=""),), (), "a name of its own"),
        ((rated, rated), (), "a name of its own"),
        ((replace(rated, fa_per_h=None),), (), "needs a stream with keywords that says fa_per_h"),
        ((rated,), ("b",), "not all have a rate"),
        ((replace(rated, keyword_share=0.0),), (), "needs a stream with keywords"),
    ):
        with pytest.raises(ValueError, match=message):
            Decide(streams_, reset)


def test_val_and_test_streams_share_neither_noise_nor_times(folder):
    study = open_study(str(folder), "go", "speaker", "smoke")
    spec = StreamSpec(minutes=1, words_per_minute=30, keyword_share=0.3, name="a")
    val, test = (study.tracks(part, [spec])["a"] for part in ("val", "test"))
    assert val.keywords_s != test.keywords_s
    assert (np.abs(val.logmels[0] - test.logmels[0]).max(0) > 0.1).mean() > 0.99
