import itertools
import json
import random
import shutil

import numpy as np
import pytest
import soundfile

from kwslib import paths
from kwslib.config import SAMPLE_RATE
from kwslib.data import corpora, splits
from kwslib.data.splits import SplitError

NAMES = [f"{word}/s{speaker:03d}_nohash_{take}.wav" for word in "abc" for speaker in range(50) for take in range(3)]


@pytest.mark.parametrize("split", ["speaker", "random"])
def test_a_split_is_a_function_of_the_names_alone(split):
    shuffled = random.Random(1).sample(NAMES, len(NAMES))
    assert splits.assign(NAMES, split).equals(splits.assign(shuffled, split))


def test_speaker_split_shares_no_speaker_and_has_the_wanted_sizes():
    table = splits.assign(NAMES, "speaker")
    speakers = table.groupby("subset")["clip"].agg(lambda clips: set(map(corpora.speaker_of, clips)))
    assert not any(a & b for a, b in itertools.combinations(speakers, 2))
    shares = table["subset"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.02)
    assert shares["val"] == pytest.approx(0.2, abs=0.02)


def test_random_split_is_80_20_and_val_is_test(folder):
    corpus = corpora.load(str(folder), "go")
    split = splits.load(corpus, "go", "random")
    assert len(split.train) / 72 == pytest.approx(0.8, abs=0.02)
    assert (split.val == split.test).all()
    leaks = splits.leaks(corpus, split)
    assert leaks.loc["train / test", "shared speakers"] > 0


@pytest.mark.parametrize(("clips", "in_test"), [(1, 0), (2, 1), (3, 1), (5, 1), (10, 2), (11, 2), (24, 5)])
def test_random_split_divides_each_word(clips, in_test):
    rare = [f"rare/{i}.wav" for i in range(clips)]
    table = splits.assign(NAMES + rare, "random")
    subset = table.set_index("clip")["subset"]
    assert (subset[rare] == "test").sum() == in_test
    assert (subset[NAMES] == "train").groupby([name[0] for name in NAMES]).mean().to_list() == [0.8] * 3
    assert subset[rare].equals(splits.assign(rare, "random").set_index("clip")["subset"][rare])


def test_the_recorded_split_is_reused_and_covers_every_clip_once(folder):
    corpus = corpora.load(str(folder), "go")
    first = splits.load(corpus, "go", "speaker")
    assert sorted(np.concatenate([first.train, first.val, first.test])) == list(range(72))
    before = paths.split_csv("tones", "speaker").read_bytes()
    again = splits.load(corpus, "stop", "speaker")
    assert (again.train == first.train).all() and again.sha256 == first.sha256
    assert paths.split_csv("tones", "speaker").read_bytes() == before
    assert (splits.leaks(corpus, first)["shared speakers"] == 0).all()
    assert splits.counts(corpus, first, "go")["speakers of the keyword"].min() >= 2


def tampered(corpus, change):
    splits.load(corpus, "go", "speaker")
    path = paths.split_csv("tones", "speaker")
    text = change(path.read_text())
    path.write_text(text)
    return path, text


def test_an_edited_split_is_refused(folder):
    corpus = corpora.load(str(folder), "go")
    tampered(corpus, lambda text: text.replace(",train", ",test", 1))
    with pytest.raises(SplitError, match="changed after it was recorded"):
        splits.load(corpus, "go", "speaker")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",train", ",test", 1), "is in two subsets"),
        (lambda text: text.replace(",train", ",dev", 1), "unknown subset"),
        (lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "does not fit the corpus.*1 clips are new"),
        (lambda text: text + text.splitlines()[1] + "\n", "names a clip twice"),
        (lambda text: "nonsense", "cannot be read"),
    ],
)
def test_a_split_that_leaks_or_does_not_fit_is_refused_even_with_a_matching_digest(folder, change, message):
    corpus = corpora.load(str(folder), "go")
    path, text = tampered(corpus, change)
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(meta | {"sha256": splits._digest(text)}))
    with pytest.raises(SplitError, match=message):
        splits.load(corpus, "go", "speaker")


def test_a_corpus_that_grew_no_longer_fits_its_split(folder):
    splits.load(corpora.load(str(folder), "go"), "go", "speaker")
    samples, _ = soundfile.read(folder / "go" / "s00_nohash_0.wav")
    soundfile.write(folder / "go" / "s99_nohash_0.wav", 0.5 * samples, SAMPLE_RATE)
    with pytest.raises(SplitError, match="1 clips are new, 0 are gone"):
        splits.load(corpora.load(str(folder), "go"), "go", "speaker")


def change(file):
    samples, _ = soundfile.read(file)
    soundfile.write(file, 0.5 * samples, SAMPLE_RATE)


@pytest.mark.parametrize("fewer", [True, False])
def test_two_folders_of_the_same_name_do_not_share_a_split(folder, tmp_path, fewer):
    other = shutil.copytree(folder, tmp_path / "bob" / "tones")
    file = other / "go" / "s00_nohash_0.wav"
    file.unlink() if fewer else change(file)
    splits.load(corpora.load(str(folder), "go"), "go", "speaker")
    before = {file: file.read_bytes() for file in paths.split_csv("tones", "speaker").parent.iterdir()}
    what = "0 clips are new, 1 are gone" if fewer else "sound different"
    with pytest.raises(SplitError, match=f"{what}. It was made for {folder}: rename one of the two, or set KWS_HOME"):
        splits.load(corpora.load(str(other), "go"), "go", "speaker")
    shutil.rmtree(paths.data())
    with pytest.raises(SplitError, match=f"{what}. If another folder called tones made it, rename one of the two"):
        splits.load(corpora.load(str(other), "go"), "go", "speaker")
    assert before == {file: file.read_bytes() for file in before}
    assert not any(str(tmp_path).encode() in content for content in before.values())


def test_a_folder_that_moved_keeps_its_split_and_one_that_changed_is_told_so(folder, tmp_path):
    splits.load(corpora.load(str(folder), "go"), "go", "speaker")
    (tmp_path / "else").mkdir()
    moved = folder.rename(tmp_path / "else" / "tones")
    splits.load(corpora.load(str(moved), "go"), "go", "speaker")
    shutil.rmtree(paths.data())
    splits.load(corpora.load(str(moved), "go"), "go", "speaker")
    change(moved / "go" / "s00_nohash_0.wav")
    with pytest.raises(SplitError, match="sound different. This folder was changed since: restore it, or delete"):
        splits.load(corpora.load(str(moved), "go"), "go", "speaker")


def test_a_split_recorded_without_a_fingerprint_stays_valid(folder):
    corpus = corpora.load(str(folder), "go")
    splits.load(corpus, "go", "speaker")
    file = paths.split_csv("tones", "speaker").with_suffix(".json")
    meta = json.loads(file.read_text())
    assert meta.pop("corpus_fingerprint") == corpus.fingerprint
    paths.write_json(file, meta)
    splits.load(corpus, "go", "speaker")


def test_a_keyword_of_one_speaker_is_refused(folder):
    (folder / "rare").mkdir()
    soundfile.write(folder / "rare" / "s00_nohash_0.wav", np.random.default_rng(0).normal(size=8000) * 0.1, SAMPLE_RATE)
    with pytest.raises(SplitError, match="speakers of 'rare', at least 2 are needed"):
        splits.load(corpora.load(str(folder), "rare"), "rare", "speaker")


def test_a_split_that_is_not_usable_is_not_recorded(folder, tmp_path):
    """Who records more afterwards, as the message says, is not told that the split does not fit."""
    late = [file for file in folder.glob("go/*") if file.name > "s03"]
    for file in late:
        file.rename(tmp_path / file.name)
    with pytest.raises(SplitError, match="part of the speaker split of tones has . speakers of 'go'.* record more"):
        splits.load(corpora.load(str(folder), "go"), "go", "speaker")
    assert not list(paths.split_csv("tones", "speaker").parent.glob("*"))
    for file in late:
        (tmp_path / file.name).rename(file)
    assert len(splits.load(corpora.load(str(folder), "go"), "go", "speaker").test)


def test_speakers_with_folders_are_kept_apart(folder):
    for file in sorted(folder.glob("[!_]*/*")):  # the same names for all speakers
        speaker, _, take = file.name.split("_")
        (file.parent / speaker).mkdir(exist_ok=True)
        file.rename(file.parent / speaker / f"take_{take}")
    copy = shutil.copytree(folder, folder.with_name("speech_commands_v0.01"))
    for root in (folder, copy):
        corpus = corpora.load(str(root), "go")
        table = splits.assign(corpus.planned, "speaker", corpus.subset_of)
        assert (table.groupby(table["clip"].str.split("/").str[1])["subset"].nunique() == 1).all()
    corpus = corpora.load(str(folder), "go")
    split = splits.load(corpus, "go", "speaker")
    assert (splits.leaks(corpus, split)["shared speakers"] == 0).all()
    assert "has never heard" in splits.meaning_of_leaks(corpus, split)
    by_clip = splits.load(corpus, "go", "random")
    assert "speakers who also speak in training" in splits.meaning_of_leaks(corpus, by_clip)


def only_one_speaker(folder):
    for file in folder.glob("*/s*"):
        if not file.name.startswith("s00"):
            file.unlink()
    for take in range(2, 20):
        for word, hertz in (("go", 300), ("stop", 700)):
            samples = 0.3 * np.sin(2 * np.pi * hertz * np.arange(9_000 + 100 * take) / SAMPLE_RATE)
            soundfile.write(folder / word / f"s00_nohash_{take}.wav", samples, SAMPLE_RATE)


def test_one_speaker_can_only_be_split_by_clip(folder):
    only_one_speaker(folder)
    corpus = corpora.load(str(folder), "go")
    with pytest.raises(SplitError, match="the name before the first _ .* or use SPLIT=random"):
        splits.load(corpus, "go", "speaker")
    split = splits.load(corpus, "go", "random")
    assert splits.leaks(corpus, split).loc["train / test", "clips of known speakers"] == 1
    assert "100.0% of the test clips are by speakers who also speak in training" in splits.meaning_of_leaks(
        corpus, split
    )


def test_the_leak_check_counts_what_a_plain_loop_counts(folder):
    corpus = corpora.load(str(folder), "go")
    split = splits.load(corpus, "go", "random")
    speaker = corpus.clips["speaker"]
    known = [any(speaker[i] == speaker[j] for j in split.train) for i in split.test]
    found = splits.leaks(corpus, split).loc["train / test"]
    assert found["clips of known speakers"] == pytest.approx(np.mean(known))
    assert found["identical recordings"] == 0
    by_speaker = splits.load(corpus, "go", "speaker")
    assert "has never heard" in splits.meaning_of_leaks(corpus, by_speaker)


def test_names_without_speakers_are_pointed_out(folder):
    for word in folder.glob("[!_]*"):  # the same numbers in every folder
        for i, file in enumerate(sorted(word.iterdir())):
            file.rename(file.with_name(f"{i}{file.suffix}"))
    corpus = corpora.load(str(folder), "go")
    assert "tell no speakers" in splits.meaning_of_leaks(corpus, splits.load(corpus, "go", "speaker"))
    assert "unknown" in corpus.summary()["speakers"]


def test_a_folder_with_nothing_but_the_keyword_is_refused(folder):
    for word in ("stop", "zoom in"):
        shutil.rmtree(folder / word)
    with pytest.raises(SplitError, match="no other words than 'go'"):
        splits.load(corpora.load(str(folder), "go"), "go", "speaker")


def test_unknown_split_is_named(folder):
    with pytest.raises(SplitError, match="choose one of speaker, random"):
        splits.load(corpora.load(str(folder), "go"), "go", "speakers")
