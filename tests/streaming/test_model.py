import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kwslib.config import CRNNConfig
from kwslib.data import corpora
from kwslib.data.features import LogMel
from kwslib.nets import crnn
from kwslib.nets.crnn import CRNN, keyword_score, step_logits
from kwslib.nets.rivals import TimeNetConfig, build
from kwslib.streaming import events, tracks
from kwslib.streaming.model import FIRST_S, StreamingModel, carried_scores, reset_scores
from kwslib.training.prune import Prune
from kwslib.training.quantize import PRECISIONS, WeightInt

# Logits of these nets are of the order of 1. float16 has 11 bits, so its sums agree to about 1e-3;
# dynamic int8 rounds each activation to 1/255 of its range, where a last-bit change can flip a step.
TOLERANCE = {
    "float32": 1e-5,
    "float16": 5e-3,
    "int8": 2e-2,
    "weight-int8": 1e-5,  # rounded weights, exact arithmetic
    "weight-int4": 1e-5,
    "weight-int8-act8": 2e-2,
    "weight-int4-act8": 2e-2,
}
CONVERT = {precision: convert or (lambda m: m) for precision, convert in PRECISIONS.items()}
AUDIO = torch.randn(1, 48_000, generator=torch.Generator().manual_seed(5)) * 0.1


def net(precision="float32", **sizes) -> CRNN:
    torch.manual_seed(1)
    return CONVERT[precision](CRNN(CRNNConfig(**sizes)).eval())


SPARSE = TimeNetConfig((7, 5), (4, 3), (1, 1), hop_ms=60)  # frames of 25 ms that leave 35 ms between them unread


@torch.no_grad()
def time_net(precision="float32", config=TimeNetConfig()) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build(config).train()
    for _ in range(20):  # its normalisation layers learn what they see
        model(LogMel()(torch.randn(8, 16_000) * 0.1))
    return CONVERT[precision](model.eval())


MODELS = {precision: StreamingModel(net(precision)) for precision in CONVERT}
TIME_NETS = {p: StreamingModel(time_net(p)) for p in CONVERT if not p.endswith("act8")}  # rounding those is for CRNNs
SPARSE_NETS = {"float32": StreamingModel(time_net(config=SPARSE))}
EVERY_SECOND = {"float32": StreamingModel(time_net(config=TimeNetConfig((7, 5), (5, 3), (2, 3), hop_ms=20)))}
ALL = [(MODELS, 36, p) for p in MODELS] + [(TIME_NETS, 29, p) for p in TIME_NETS]
ALL += [(SPARSE_NETS, 46, "float32"), (EVERY_SECOND, 24, "float32")]


def feed(streaming, audio, cuts):
    state, scores = streaming.initial_state(len(audio)), []
    for piece in torch.tensor_split(audio, cuts, dim=1):
        new, state = streaming.step(piece, state)
        scores.append(new)
    return torch.cat(scores, dim=1), state


@pytest.mark.parametrize(("models", "steps", "precision"), ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_chunking_gives_the_same_scores(models, steps, precision, data):
    """Chunks from one sample to two seconds."""
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 200), st.integers(1, 32_000)), min_size=1, max_size=40))
    cuts = [c for c in np.cumsum(lengths).tolist() if c < AUDIO.shape[1]]
    whole, _ = feed(models[precision], AUDIO, [])
    pieces, _ = feed(models[precision], AUDIO, cuts)
    assert whole.shape == pieces.shape == (1, steps)
    assert (whole - pieces).abs().max() <= TOLERANCE[precision]


@pytest.mark.parametrize("models", [MODELS, TIME_NETS], ids=["crnn", "timenet"])
def test_single_samples_give_the_same_scores(models):
    whole, _ = feed(models["float32"], AUDIO[:, :16_000], [])
    pieces, _ = feed(models["float32"], AUDIO[:, :16_000], list(range(1, 16_000)))
    assert (whole - pieces).abs().max() <= 1e-5


@pytest.mark.parametrize("precision", CONVERT)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kernel_size": (5, 13), "stride": (4, 12), "gru_num_layers": 1},
        {"cell": "rnn", "attention_size": 0},
        {"cell": "lstm", "separable": True},
    ],
    ids=["gru", "one-layer", "rnn-linear-attention", "lstm-separable"],
)
def test_stream_equals_the_clip_model_on_the_whole_prefix(precision, sizes):
    model = net(precision, **sizes)
    streaming = StreamingModel(model, max_window_length=1000)
    scores, _ = feed(streaming, AUDIO, [])
    times = streaming.step_times_s(0, scores.shape[1])
    front_end = LogMel()
    prefixes = [model(front_end(AUDIO[:, : round(t * 16_000)]).to(streaming.dtype)) for t in times]
    offline = torch.cat([keyword_score(p) for p in prefixes])
    assert (offline - scores[0]).abs().max() <= TOLERANCE[precision]


@torch.no_grad()
def test_a_chain_of_steps_streams_too():
    """Pruned, then in whole numbers: the stream equals the clip model on the whole prefix."""
    model = WeightInt(4)(Prune(0.5, 0.5)(net()))
    streaming = StreamingModel(model, max_window_length=1000)
    scores, _ = feed(streaming, AUDIO, [5_000, 5_001, 30_000])
    times, front_end = streaming.step_times_s(0, scores.shape[1]), LogMel()
    offline = torch.cat([keyword_score(model(front_end(AUDIO[:, : round(t * 16_000)]))) for t in times])
    assert (offline - scores[0]).abs().max() <= 1e-5


@pytest.mark.parametrize(("models", "precision"), [(models, p) for models, _, p in ALL if models is not MODELS])
@torch.no_grad()
def test_a_time_net_on_a_stream_is_the_clip_model_on_each_last_second(models, precision):
    streaming = models[precision]
    (_, stride), (_, kernel) = streaming.model.config.stride, streaming.model.config.kernel_size
    second = (streaming.window - 1) * stride + kernel - 1  # frames; up to 100, where the net reads the last one of them
    scores, _ = feed(streaming, AUDIO, [7_777])
    logmels = LogMel()(AUDIO)
    for step, t in enumerate(streaming.step_times_s(0, scores.shape[1])):
        last = round(t * 100)  # frame
        clip = logmels[:, :, max(0, last - second) : last + 1]
        expected = keyword_score(streaming.model(clip.to(streaming.dtype)))
        assert scores[0, step].item() == pytest.approx(expected.item(), abs=TOLERANCE[precision])


@pytest.mark.slow
@torch.no_grad()
def test_an_hour_neither_drifts_nor_grows():
    model = net(cnn_out_channels=2, kernel_size=(5, 40), stride=(2, 32), hidden_size=6, gru_num_layers=1)
    streaming, state = StreamingModel(model), StreamingModel(model).initial_state()
    generator, found, sizes, samples = torch.Generator().manual_seed(0), [], [], []
    for _ in range(60):
        samples.append(torch.randn(1, 60 * 16_000, generator=generator) * 0.1)
        scores, state = streaming.step(samples[-1], state)
        found.append(scores)
        sizes.append(state.n_bytes)
    assert max(sizes) < 20_000  # frames under the kernel come and go
    logmels = torch.cat([LogMel().frames(part) for part in _overlapping(torch.cat(samples, dim=1))], dim=2)
    offline = keyword_score(step_logits(model, logmels, streaming.window)[0])
    assert (torch.cat(found, dim=1)[0] - offline).abs().max() <= 1e-4


def _overlapping(samples):
    """Parts of a track, silence before it, that have whole frames and all of them."""
    samples = torch.nn.functional.pad(samples, (400, 0))
    return [samples[:, i : i + 160 * 6_000 + 240] for i in range(0, samples.shape[1] - 240, 160 * 6_000)]


def test_attention_sees_its_window_and_no_more():
    """Against the modules of the clip model, windows cut out by a plain loop."""
    model, window = net(), 4
    scores, state = feed(StreamingModel(model, max_window_length=window), AUDIO, [])
    with torch.no_grad():
        hidden, _ = model.gru(model.steps(LogMel()(AUDIO)))
        for step in range(hidden.shape[1]):
            context, _ = model.attention(hidden[:, max(0, step - window + 1) : step + 1])
            assert keyword_score(model.classifier(context)).item() == pytest.approx(scores[0, step].item(), abs=1e-5)
    assert state.outputs.shape[1] == window


def test_one_clip_scores_as_in_the_clip_model():
    clip = AUDIO[:, :16_000]
    scores, _ = feed(MODELS["float32"], clip, [])
    assert scores.shape == (1, 11)
    assert scores[0, -1].item() == pytest.approx(keyword_score(net()(LogMel()(clip))).item(), abs=1e-5)


def test_memory_is_bounded():
    streaming = MODELS["float32"]
    state, sizes = streaming.initial_state(), []
    for i in range(400):
        _, state = streaming.step(AUDIO[:, (i * 997) % 40_000 :][:, :997], state)
        sizes.append(state.n_bytes)
    assert max(sizes[200:]) <= max(sizes[:200]) < 12_000
    assert all(t.numel() == t.untyped_storage().size() // t.element_size() for t in (state.samples, *state.caches))


def test_streams_do_not_touch_each_other_and_reset_is_deterministic():
    streaming = MODELS["float32"]
    alone, _ = feed(streaming, AUDIO, [])
    first, second = streaming.initial_state(), streaming.initial_state()
    mixed = []
    for piece in AUDIO.split(3_000, dim=1):
        new, first = streaming.step(piece, first)
        _, second = streaming.step(torch.randn_like(piece), second)
        mixed.append(new)
    assert torch.equal(torch.cat(mixed, 1), feed(streaming, AUDIO, list(range(3_000, 48_000, 3_000)))[0])
    assert torch.equal(alone, feed(streaming, AUDIO, [])[0])
    both, _ = feed(streaming, torch.cat([AUDIO, AUDIO.flip(1)]), [])
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)


def test_reset_windows_are_clips_of_their_own():
    model, samples = net(), AUDIO[0].numpy()
    times, scores = reset_scores(model, samples, window_s=1.0, step_s=0.25)
    assert times.tolist() == [0.25 * i for i in range(1, 13)]
    last = keyword_score(model(LogMel()(AUDIO[:, -16_000:]))).item()
    assert scores[-1] == pytest.approx(last, abs=1e-5)


def test_glue_marks_the_keywords(folder):
    corpus = corpora.load(str(folder), "go")
    go, stop = (np.flatnonzero(corpus.is_keyword(w))[0] for w in ("go", "stop"))
    track = tracks.glue(corpus, [stop, go, stop, go], "go")
    assert track.keywords_s == [(1.0, 2.0), (3.0, 4.0)]
    assert len(track.samples) == 64_000
    heard = events.ScoredTrack(track.keywords_s, track.seconds, np.zeros(0), np.zeros(0))
    assert heard.other_hours == pytest.approx(1.5 / 3600)  # 0 to 1 s and 2.5 to 3 s
    assert (track.samples[16_000:32_000] * 32768 == corpus.waveforms[go]).all()


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="causal"):
        StreamingModel(net(), framing="centered")
    with pytest.raises(ValueError, match="stride"):
        StreamingModel(net(kernel_size=(5, 6)))
    with pytest.raises(ValueError, match="max_window_length"):
        StreamingModel(net(), max_window_length=0)


@torch.no_grad()
def test_a_model_for_streams_scores_a_clip_by_the_highest_score_on_its_way():
    for config in (TimeNetConfig(), SPARSE, CRNNConfig(2, hidden_size=6)):
        torch.manual_seed(0)
        model = build(config).eval()
        samples = torch.randn(5, 16_000) * 0.1
        logmels = LogMel()(samples).numpy()
        streaming = StreamingModel(model)
        by_hand = streaming.step(samples, streaming.initial_state(len(samples)))[0].amax(1)
        at_the_end = crnn.score(model, logmels)
        model.on_streams = True
        np.testing.assert_allclose(crnn.score(model, logmels), by_hand, atol=1e-4)
        assert (crnn.score(model, logmels) >= at_the_end - 1e-4).all()


@torch.no_grad()
def test_a_stream_says_nothing_before_it_has_heard_as_much_as_a_clip():
    """Its first steps would judge by fewer outputs than all later ones, and took many a beginning for the keyword."""
    for config in (TimeNetConfig(), SPARSE, CRNNConfig(2, hidden_size=6)):
        torch.manual_seed(0)
        model = build(config).eval()
        samples = torch.randn(32_000) * 0.1
        times, scores = carried_scores(StreamingModel(model), samples.numpy())
        assert FIRST_S <= times[0] <= 1.0 and np.allclose(np.diff(times), config.stride[1] / 100)
        assert scores[0] == pytest.approx(crnn.score(model, LogMel()(samples[None, :16_000]).numpy())[0], abs=1e-4)
        (scored,) = events.score_tracks(model, tracks.Tracks([LogMel()(samples[None])[0].numpy()], [[]], [2.0]))
        np.testing.assert_allclose(scored.times_s, times)
        np.testing.assert_allclose(scored.scores, scores, atol=1e-4)
