import io
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from kwslib import audio, metrics
from kwslib.cli import detectors, main, models
from kwslib.config import CRNNConfig
from kwslib.data import corpora, features
from kwslib.lab import workers
from kwslib.lab.run import Experiment
from kwslib.lab.study import open_study
from kwslib.nets import crnn
from kwslib.nets.crnn import CRNN
from kwslib.training import checkpoints
from kwslib.training.loop import Training


@pytest.fixture
def trained(folder):
    study = open_study(str(folder), "go", "speaker", "smoke")
    workers.run(
        study,
        [Experiment("baseline", student=CRNNConfig(2, hidden_size=6), training=Training(epochs=60, batch_size=16))],
    )
    return study


def run(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_score(trained, folder, capsys):
    files = [folder / "go" / "s00_nohash_0.wav", folder / "stop" / "s03_nohash_1.flac"]
    rows = json.loads(run(capsys, "score", "--checkpoint", trained.checkpoint("baseline"), *files, "--json"))
    assert [row["file"] for row in rows] == [str(f) for f in files]
    clips = trained.corpus.clips["clip"].tolist()
    index = [clips.index(f"{f.parent.name}/{f.name}") for f in files]
    logits = crnn.score(trained.model("baseline"), trained.logmels[index]).astype(float)
    np.testing.assert_allclose([row["score"] for row in rows], 1 / (1 + np.exp(-logits)), atol=1e-4)


@pytest.fixture
def plain(tmp_path):
    """A checkpoint without training: a plain state dict."""
    torch.save(CRNN(CRNNConfig(2, hidden_size=6)).state_dict(), tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def test_files_that_cannot_be_read_are_named_and_the_others_scored(plain, tmp_path, capsys):
    for name in ("a.wav", "c.wav"):
        soundfile.write(tmp_path / name, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000)
    (tmp_path / "b.wav").write_bytes(b"not audio")
    given = [str(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav", "")]
    assert main(["score", "--checkpoint", str(plain), *given, "--json"]) == 2
    said = capsys.readouterr()
    assert [row["file"] for row in json.loads(said.out)] == [given[0], given[2]]
    reasons = said.err.splitlines()[-2:]
    assert reasons[0].startswith(f"kws score: cannot read {given[1]}") and "is a folder: give its files" in reasons[1]
    assert main(["score", "--checkpoint", str(plain), given[1], "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == []


def test_a_narrow_terminal_gets_everything_too(plain, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "é.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000)
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert main(["score", "--checkpoint", str(plain), str(tmp_path / "é.wav")]) == 0
    assert b"\\xe9.wav  0." in written.getvalue()
    assert detectors._bar(0.5, width=4) == "##--"


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("sweep.db", "Could not parse"),
        ("nothing://user:secret@localhost/kws", "nothing"),
        ("mysql+oursql://user:secret@localhost/kws", "oursql"),  # a driver that is not installed
        ("sqlite:////none/x.db", "unable to open"),
        ("sqlite://", "each worker would have its own"),
        ("sqlite:///README", "not a database"),
    ],
)
def test_a_database_that_cannot_work_is_refused_before_the_corpus_is_read(
    tmp_path, monkeypatch, capsys, storage, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("no database " * 100)
    assert main(["sweep", "--corpus", "/none", "--storage", storage]) == 2  # there is no such corpus
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("kws sweep: trials cannot be kept in ") and reason in said and "secret" not in said


def test_cost(trained, capsys):
    values = json.loads(run(capsys, "cost", "--checkpoint", trained.checkpoint("baseline"), "--json"))
    wanted = "params macs_per_clip thop_macs_batch128 thop_macs_batch128_with_bias macs_per_second state_dict_bytes"
    assert set(wanted.split()) | {"weights_bytes"} <= set(values)
    assert values["weights_bytes"] == 4 * values["params"]
    assert values.pop("log_mel_macs_per_second") == 100 * 11_635
    record = trained.results().records[0]
    assert values.items() <= record["cost"].items()


def test_evaluate(trained, folder, capsys):
    out = run(capsys, "evaluate", "--checkpoint", trained.checkpoint("baseline"), "--corpus", folder, "--keyword", "go",
              "--json")  # fmt: skip
    values = json.loads(out)
    assert (values["n_keyword"], values["n_other"]) == (24, 48)
    p = 24 / 72
    assert values["roc_auc"] == pytest.approx(1 - values["au_fa_fr"] / (p * (1 - p)))
    low, high = values["au_fa_fr_ci95"]
    assert low <= values["au_fa_fr"] <= high


def test_stream(trained, tmp_path, capsys):
    track = np.concatenate([audio.read(f) for f in sorted((tmp_path / "tones" / "go").glob("*"))[:3]])
    soundfile.write(tmp_path / "t.wav", track, 16_000)
    checkpoint = trained.checkpoint("baseline")
    lines = run(capsys, "stream", "--checkpoint", checkpoint, "--wav", tmp_path / "t.wav", "--json", "--threshold", "0")
    rows = [json.loads(line) for line in lines.splitlines()]
    steps, events = [r for r in rows if "event" not in r], [r for r in rows if "event" in r]
    n_frames = (len(track) - 0) // 160 + 1
    assert len(steps) == (n_frames - 20) // 8 + 1 - 10  # in the first second nothing is said
    assert [r["t_s"] for r in steps[:3]] == [0.99, 1.07, 1.15]
    assert all(0 <= r["score"] <= 1 for r in steps)
    assert [e["t_s"] for e in events] == [0.99, 2.03]  # threshold 0: one event per refractory second
    clip_end = features.LogMel()(features.from_int16(audio.to_int16(track[None, :16_000])))
    assert steps[0]["score"] == pytest.approx(
        1 / (1 + np.exp(-crnn.score(trained.model("baseline"), clip_end.numpy())[0])), abs=1e-3
    )


def test_a_pipe_gives_what_the_file_gives(trained, folder, tmp_path, capsys, monkeypatch):
    wav = folder / "go" / "s00_nohash_0.wav"
    samples = audio.read(wav)
    checkpoint = trained.checkpoint("baseline")
    of_file = run(capsys, "stream", "--checkpoint", checkpoint, "--wav", wav, "--json")
    raw = io.BytesIO(np.rint(samples * 32768).astype("<i2").tobytes())
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=raw))
    of_pipe = run(capsys, "stream", "--checkpoint", checkpoint, "--stdin", "--json")
    pairs = zip(map(json.loads, of_file.splitlines()), map(json.loads, of_pipe.splitlines()), strict=True)
    for row, same in pairs:  # the chunks differ, so the last digits may
        assert same.pop("score") == pytest.approx(row.pop("score"), abs=1e-6) and same == row


def test_ctrl_c_ends_a_stream_without_a_traceback(trained, folder, capsys, monkeypatch):
    def interrupted(path):
        yield np.zeros(16_000, np.float32)
        raise KeyboardInterrupt

    monkeypatch.setattr("kwslib.streaming.listen.from_file", interrupted)
    out = run(capsys, "stream", "--checkpoint", trained.checkpoint("baseline"), "--wav", "x.wav", "--json")
    assert [json.loads(line)["t_s"] for line in out.splitlines()] == [0.99]


def test_events_are_all_that_a_pipe_gets(trained, folder, tmp_path, capsys):
    track = np.concatenate([audio.read(f) for f in sorted((folder / "go").glob("*"))[:3]])
    soundfile.write(tmp_path / "t.wav", track, 16_000)
    command = "stream", "--checkpoint", trained.checkpoint("baseline"), "--wav", tmp_path / "t.wav", "--threshold", "0"
    lines = run(capsys, *command).splitlines()
    assert [line.split()[:4] for line in lines] == [[t, "s", "go", "detected,"] for t in ("0.99", "2.03")]
    events = [json.loads(line) for line in run(capsys, *command, "--events", "--json").splitlines()]
    assert [event["t_s"] for event in events] == [0.99, 2.03] and {e["event"] for e in events} == {"detected"}


def test_export_to_each_format(trained, tmp_path, capsys):
    checkpoint = trained.checkpoint("baseline")
    for suffix in (".onnx", ".ts", ".kws"):
        out = run(capsys, "export", "--checkpoint", checkpoint, "--out", tmp_path / f"d{suffix}", "--json")
        about = json.loads(out)
        assert about["bytes"] == (tmp_path / f"d{suffix}").stat().st_size and about["keyword"] == "go"
    assert (tmp_path / "d.kws").read_bytes() == checkpoint.with_suffix(".kws").read_bytes()
    costs = [run(capsys, "cost", "--checkpoint", file, "--json") for file in (checkpoint, tmp_path / "d.kws")]
    assert costs[0] == costs[1]


def test_without_a_checkpoint_the_recommended_one_is_taken(tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000)
    rows = {(row["keyword"], row["purpose"]): row for row in json.loads(run(capsys, "models", "--json"))}
    for options, row in (
        (["score", tmp_path / "a.wav"], rows["happy", "clips"]),
        (["stream", "--wav", tmp_path / "a.wav"], rows["happy", "stream"]),
        (["export", "--out", tmp_path / "a.kws"], rows["happy", "smallest"]),
        (["cost", "--keyword", "sheila"], rows["sheila", "stream"]),
    ):
        assert main([*map(str, options), "--json"]) == 0
        said = capsys.readouterr()
        assert f"taken: {row['file'].rpartition('/')[2]} of {row['study']}, recommended for" in said.err
        named = ["--checkpoint", row["file"], *[o for o in options if o not in ("--keyword", "sheila")]]
        assert said.out == run(capsys, options[0], *named[:2], *named[3:], "--json")
    assert (tmp_path / "a.kws").stat().st_size == rows["happy", "smallest"]["bytes"]
    assert main(["cost", "--keyword", "jarvis"]) == 2
    assert "no published model for 'jarvis', only for happy, sheila: name a file" in capsys.readouterr().err
    assert main(["cost", "--keyword", "happy", "--checkpoint", "a.pt"]) == 2
    assert "give one of them" in capsys.readouterr().err
    monkeypatch.setattr(models, "HOME", tmp_path)
    assert main(["cost"]) == 2 and "--checkpoint is needed" in capsys.readouterr().err
    assert main(["models"]) == 2 and "they come with the repository" in capsys.readouterr().err


def test_models_are_listed_for_people(capsys):
    text = run(capsys, "models")
    assert text.startswith("speech_commands_part-happy-speaker: each file chosen on val")  # people first
    for purpose in ("clips", "stream", "smallest"):
        assert f"  happy, {purpose} " in text and f"  sheila, {purpose} " in text
    assert ".venv/bin/kws stream --keyword happy --mic" in text and "per hour" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--checkpoint", "GOOD", "--out", "d.tflite"], "as .onnx or .ts, not as .tflite"),
        (["stream", "--checkpoint", "GOOD", "--stdin", "--rate", "5"], "5 Hz is no sample rate"),
        (["stream", "--checkpoint", "GOOD", "--stdin", "--channels", "0"], "0 is no number of channels"),
        (["score", "--checkpoint", "none.pt", "x.wav"], "no checkpoint at none.pt"),
        (["score", "--checkpoint", "GOOD", "none.wav"], "cannot read none.wav"),
        (["stream", "--checkpoint", "GOOD", "--wav", "none.wav"], "cannot read none.wav"),
        (["evaluate", "--checkpoint", "GOOD", "--corpus", "none", "--keyword", "go"], "no corpus at"),
        (["evaluate", "--checkpoint", "GOOD", "--corpus", "FOLDER", "--keyword", "xyz"], "'xyz' is not in"),
        (["evaluate", "--checkpoint", "PLAIN", "--corpus", "FOLDER"], "does not say its keyword"),
        (["corpus", "none"], "no corpus at"),
        (["reproduce", "--profile", "fast"], "unknown profile 'fast'"),
        (["reproduce", "--corpus", "/none"], "no corpus at /none"),
        (["table", "nothing"], "no records in"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(trained, folder, plain, capsys, arguments, message):
    places = {"GOOD": str(trained.checkpoint("baseline")), "FOLDER": str(folder), "PLAIN": str(plain)}
    assert main([places.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert message in last and last.startswith("kws ") and "Traceback" not in error


def test_a_reader_that_has_seen_enough_is_no_error(trained, folder):
    command = [sys.executable, "-m", "kwslib", "stream", "--checkpoint", trained.checkpoint("baseline"), "--wav",
               folder / "go" / "s00_nohash_0.wav"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert said.startswith(b"an event begins at") and said.count(b"\n") == 1 and process.wait(60) == 0


def test_of_one_speaker_the_interval_is_over_clips(trained, folder, capsys):
    for file in folder.glob("*/s*"):
        if not file.name.startswith("s00"):
            file.unlink()
    checkpoint = trained.checkpoint("baseline")
    out = run(capsys, "evaluate", "--checkpoint", checkpoint, "--corpus", folder, "--keyword", "go", "--json")
    assert json.loads(out)["interval_over"] == "clips"


def test_recordings_without_the_keyword_give_a_false_accept_rate(trained, folder, capsys):
    shutil.rmtree(folder / "go")
    checkpoint = trained.checkpoint("baseline")
    values = json.loads(run(capsys, "evaluate", "--checkpoint", checkpoint, "--corpus", folder, "--json"))
    assert set(values) == {"n_keyword", "n_other", "threshold", "fa_rate"}
    assert (values["n_keyword"], values["n_other"]) == (0, 48)
    threshold = json.loads(checkpoint.with_suffix(".json").read_text())["threshold"]
    assert values["threshold"] == pytest.approx(1 / (1 + np.exp(-threshold)))  # a probability, as everywhere
    corpus = corpora.load(str(folder), None)
    scores = crnn.score(trained.model("baseline"), features.logmels(corpus))
    assert values["fa_rate"] == np.mean([score >= threshold for score in scores])
    half = run(capsys, "evaluate", "--checkpoint", checkpoint, "--corpus", folder, "--threshold", "0.5", "--json")
    assert json.loads(half)["fa_rate"] == np.mean([score >= 0 for score in scores])


def test_the_threshold_of_a_checkpoint_keeps_99_percent_of_the_val_keywords(trained):
    rows = trained.split.val[trained.labels[trained.split.val] == 1]
    scores = crnn.score(trained.model("baseline"), trained.logmels[rows])
    threshold = json.loads(trained.checkpoint("baseline").with_suffix(".json").read_text())["threshold"]
    assert np.mean(scores >= threshold) >= 0.99 and threshold == scores.min()


def test_of_nothing_but_keywords_the_miss_rate_remains(trained, folder, capsys):
    for word in ("stop", "zoom in"):
        shutil.rmtree(folder / word)
    checkpoint = trained.checkpoint("baseline")
    values = json.loads(run(capsys, "evaluate", "--checkpoint", checkpoint, "--corpus", folder, "--json"))
    assert set(values) == {"n_keyword", "n_other", "threshold", "miss_rate"} and 0 <= values["miss_rate"] <= 1


def test_a_checkpoint_without_its_description_is_announced_as_foreign(trained, folder, tmp_path, capsys):
    shutil.copy(trained.checkpoint("baseline"), tmp_path / "alone.pt")
    assert main(["score", "--checkpoint", str(tmp_path / "alone.pt"), str(folder / "go" / "s00_nohash_0.wav")]) == 0
    assert "has no description beside it: taken for a published state dict, centered" in capsys.readouterr().err
    (tmp_path / "alone.json").write_text('{"accuracy": 0.97}')  # somebody else's notes are no description
    assert main(["cost", "--checkpoint", str(tmp_path / "alone.pt")]) == 0


def test_corpus(folder, capsys):
    (folder / "go" / "s01_nohash_9.wav").write_bytes(b"not audio")
    values = json.loads(run(capsys, "corpus", folder, "--json"))
    assert (values["clips"], values["words"], values["speakers"], values["files left out"]) == (72, 3, 12, 1)
    assert values["hours"] == 0.02 and len(values["fingerprint"]) == 64
    assert values["left_out"][0]["clip"] == "go/s01_nohash_9.wav"
    text = run(capsys, "corpus", folder)
    assert "clips           72" in text and "left out: go/s01_nohash_9.wav: cannot read" in text


def test_a_published_state_dict_is_scored_with_centered_framing(folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=6)).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    out = run(capsys, "evaluate", "--checkpoint", tmp_path / "theirs.pt", "--corpus", folder, "--keyword", "go",
              "--json")  # fmt: skip
    corpus = corpora.load(str(folder), "go")
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, win_length=400, hop_length=160, n_mels=40)
    logmels = torch.log(mel(features.from_int16(corpus.waveforms)).clamp(1e-9, 1e9))
    expected = metrics.au_fa_fr(crnn.score(model, logmels.numpy()), corpus.is_keyword("go"))
    assert json.loads(out)["au_fa_fr"] == pytest.approx(expected, rel=1e-9)
    assert json.loads(run(capsys, "cost", "--checkpoint", tmp_path / "theirs.pt", "--json"))["params"] == sum(
        p.numel() for p in model.parameters()
    )


def test_python_m_kwslib_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "kwslib", "name", "--keyword", "Zoom In"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "synthetic-zoom-in-speaker"
    assert subprocess.run([sys.executable, "-m", "kwslib", "score"], capture_output=True).returncode == 2


def test_misses_and_false_alarms_on_a_stream(trained, folder, tmp_path, capsys):
    (tmp_path / "spec.json").write_text(json.dumps({"minutes": 1, "words_per_minute": 20, "keyword_share": 0.5}))
    checkpoint = trained.checkpoint("baseline")
    on_a_stream = (
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--corpus",
        folder,
        "--stream",
        tmp_path / "spec.json",
        "--json",
    )
    found = json.loads(run(capsys, *on_a_stream, "--threshold", "0"))
    assert found["keywords"] > 5 and found["miss_rate"] < 0.5 and found["fa_per_h"] > 500
    none = json.loads(run(capsys, *on_a_stream, "--threshold", "1"))
    assert none["found"] == none["false_alarms"] == 0 and none["most_fa_per_h"] == pytest.approx(
        -np.log(0.05) / none["other_hours"], rel=1e-2
    )


def test_false_alarms_among_negatives_can_be_listened_to(trained, folder, tmp_path, capsys):
    talk = tmp_path / "talk"
    (talk / "anna").mkdir(parents=True)
    track = np.concatenate([audio.read(f) for f in sorted((folder / "stop").glob("*"))[:3]])
    soundfile.write(talk / "anna" / "one.wav", track, 16_000)
    soundfile.write(talk / "two.flac", track[:8000], 16_000)
    (talk / "broken.wav").write_bytes(b"RIFF")
    command = "evaluate", "--checkpoint", trained.checkpoint("baseline"), "--negatives", talk, "--cut", tmp_path / "cut"
    found = json.loads(run(capsys, *command, "--threshold", "0", "--json"))
    assert [m["t_s"] for m in found["moments"] if m["file"] == "anna/one.wav"] == [0.99, 2.03]
    assert found["hours"] * 3600 == pytest.approx(2.9) and found["recordings"] == 2
    assert found["fa_per_h"] == pytest.approx(found["false_alarms"] / (2.9 / 3600))
    assert [row["file"] for row in found["left_out"]] == ["broken.wav"]
    assert len(audio.read(tmp_path / "cut" / "one-0.99s.wav")) == 31_840  # it begins where the recording does
    said = run(capsys, *command, "--threshold", "1")
    assert "false_alarms" in said and "anna" not in said
    assert (
        main(["evaluate", "--checkpoint", str(trained.checkpoint("baseline")), "--negatives", str(tmp_path / "no")])
        == 2
    )


def test_a_stream_decides_as_its_checkpoint_says(trained, folder, tmp_path, capsys):
    checkpoint = trained.checkpoint("baseline")
    model, sidecar = checkpoints.load(checkpoint)
    decision = {"threshold": -50.0, "smoothing_steps": 2, "scale": 0.5, "offset": 1.0, "fa_per_h": 0.5, "hours": 4.0}
    checkpoints.save(tmp_path / "decided.pt", model, sidecar | {"decision": decision})
    wav = tmp_path / "three.wav"
    soundfile.write(wav, np.concatenate([audio.read(f) for f in sorted((folder / "go").glob("*"))[:3]]), 16_000)
    plain = [
        json.loads(s) for s in run(capsys, "stream", "--checkpoint", checkpoint, "--wav", wav, "--json").splitlines()
    ]
    for file in ("decided.pt", "decided.kws"):
        assert main(["stream", "--checkpoint", str(tmp_path / file), "--wav", str(wav), "--json"]) == 0
        said = capsys.readouterr()
        assert file.endswith("kws") or "at most 0.5 false alarms per hour on 4 h of val streams" in said.err
        rows = [json.loads(line) for line in said.out.splitlines()]
        assert [r["t_s"] for r in rows if "event" in r] == [0.99, 2.03]  # everything is above so low a threshold
        scores = np.log([r["score"] / (1 - r["score"]) for r in plain if "event" not in r])
        mean = (scores[1:] + scores[:-1]) / 2
        found = [r["score"] for r in rows if "event" not in r][1:]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-(0.5 * mean + 1))), atol=1e-4)
