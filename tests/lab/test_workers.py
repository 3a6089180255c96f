import dataclasses
import json
import os

import kills
import numpy as np
import pytest
import torch

from kwslib import config, paths
from kwslib.config import CRNNConfig
from kwslib.data import corpora
from kwslib.data.augment import WITHOUT_MASKS, Augmentation
from kwslib.lab import reproduce, workers
from kwslib.lab.run import Experiment
from kwslib.lab.study import ExperimentError, open_study
from kwslib.lab.verify import rescore
from kwslib.lab.workers import run
from kwslib.nets import crnn
from kwslib.nets.losses import Labels, SoftTargets
from kwslib.nets.rivals import SeparableConfig
from kwslib.results import page, records, tables, tracking
from kwslib.streaming.model import StreamingModel
from kwslib.training import checkpoints
from kwslib.training.loop import Training
from kwslib.training.prune import Prune
from kwslib.training.quantize import DynamicInt8, Half
from kwslib.training.tune import QAT

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)
QUICK = Training(epochs=40, batch_size=16)  # the smoke profile makes 2 of them
BASELINE = Experiment("baseline", student=TINY, training=QUICK)
STUDENT = Experiment(
    "student",
    student=TINY,
    teacher="baseline",
    losses=(Labels(0.4), SoftTargets(0.6, 10.0)),
    training=QUICK,
    control="baseline",
)
HALF = Experiment("student-fp16", start="student", after=(Half(),), control="student")
INT8 = Experiment("student-int8", start="student", after=(DynamicInt8(),), control="student")


@pytest.fixture
def study(folder):
    return open_study(str(folder), "go", "speaker", "smoke", seeds=2)


def stable(study, name, seed=0) -> dict:
    """A record without what may differ between equal runs."""
    record = json.loads(records.path(study.name, name, seed).read_text())
    assert record["run"]["latency_ms_per_step"] > 0
    record.pop("run")
    return record


def nothing_to_do(take):
    """In place of training."""
    assert not take(1), "trained again"
    return ()


def test_nothing_is_its_own_control_or_teacher():
    with pytest.raises(ValueError, match="its own control"):
        dataclasses.replace(BASELINE, control="baseline")
    with pytest.raises(ValueError, match="its own control, teacher"):
        dataclasses.replace(STUDENT, teacher="student")


def test_a_study_from_recipes_to_report(study, monkeypatch):
    results = run(study, [BASELINE, STUDENT, HALF, INT8])  # needs are met within one call, wave by wave
    assert list(results.summary.index) == ["baseline", "student", "student-fp16", "student-int8"]
    assert len(results.records) == 8
    assert results["student-int8"].macs_per_clip == results["student"].macs_per_clip
    assert results["student-fp16"].weights_bytes * 2 == results["student"].weights_bytes
    record = results.records[0]
    assert record["epochs"] == len(record["history"]["loss"]) == 2
    assert record["data"]["split_sha256"] == study.split.sha256
    assert record["metrics"]["n_keyword"] + record["metrics"]["n_other"] == record["data"]["n_test"]
    log = tracking.csv_path(study.name, "baseline", 0).read_text().splitlines()
    assert len(log) == 3 and log[0].startswith("epoch,loss,labels_0,val_au_fa_fr")
    assert not list(paths.checkpoints(study.name).glob("*.resume"))

    before = {f: f.read_bytes() for f in paths.checkpoints(study.name).iterdir()}
    monkeypatch.setattr(workers, "_in_parallel", nothing_to_do)
    run(study, [BASELINE, STUDENT, HALF, INT8])
    assert before == {f: f.read_bytes() for f in paths.checkpoints(study.name).iterdir()}

    shown = page.write(study.name).read_text()
    assert "student-int8" in shown and "http" not in shown.replace("http://www.w3.org", "")
    table = (paths.reports(study.name) / "results.csv").read_text().splitlines()
    assert (
        table[0].startswith("experiment,seed,au_fa_fr,au_fa_fr_as_is,au_fa_fr_val,ci95_low,ci95_high")
        and len(table) == 9
    )


def test_one_process_or_four_and_any_order_give_the_same_bytes(study, home, monkeypatch):
    other = dataclasses.replace(BASELINE, name="other", training=dataclasses.replace(QUICK, learning_rate=1e-3))
    expected = None
    for processes, order in (
        (2, [BASELINE, other, STUDENT]),
        (1, [other, BASELINE, STUDENT]),
        (4, [STUDENT, other, BASELINE]),
    ):
        monkeypatch.setattr(workers, "cpu_count", lambda processes=processes: processes)
        run(study, order)
        found = {name: digest for name, digest in kills.stable(home).items() if name.startswith("checkpoints")}
        expected = expected or found
        assert found == expected and len(found) == 3 * 2 * 3  # experiments, seeds, files
        for file in [*paths.checkpoints(study.name).iterdir(), *records.folder(study.name).iterdir()]:
            file.unlink()


def test_a_changed_recipe_trains_again_and_so_does_what_learnt_from_it(study):
    run(study, [BASELINE, STUDENT])
    before = stable(study, "student")["identity"]
    louder = Experiment("baseline", student=TINY, training=QUICK, augmentation=Augmentation(time_mask=0))
    run(study, [louder, STUDENT])
    assert stable(study, "student")["identity"] != before


def test_fewer_seeds_of_a_new_recipe_are_not_averaged_with_more_of_an_old_one(study, folder):
    run(study, [BASELINE, STUDENT])
    fewer = open_study(str(folder), "go", "speaker", "smoke", seeds=1)
    assert len(run(fewer, [BASELINE]).records) == 4  # the same recipe: the second seed still counts
    warmer = dataclasses.replace(STUDENT, losses=(Labels(0.4), SoftTargets(0.6, 2.0)))
    left = [(r["experiment"], r["seed"]) for r in run(fewer, [BASELINE, warmer]).records]
    assert left == [("baseline", 0), ("baseline", 1), ("student", 0)]
    other_teacher = dataclasses.replace(BASELINE, augmentation=Augmentation(time_mask=0))
    left = [(r["experiment"], r["seed"]) for r in run(fewer, [other_teacher, STUDENT]).records]
    assert left == [("baseline", 0), ("student", 0)]


def test_a_run_that_was_killed_before_it_was_timed_is_timed_not_trained_again(study, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(workers, "take_time", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
        run(study, [BASELINE])
    assert json.loads(records.path(study.name, "baseline", 0).read_text())["run"]["latency_ms_per_clip"] is None
    assert "–" in tables.display_table(study.results().summary).loc["baseline", "ms per clip"]
    monkeypatch.setattr(workers, "_in_parallel", nothing_to_do)
    run(study, [BASELINE])
    assert stable(study, "baseline", 1)


def test_a_changed_note_or_control_trains_nothing(study, monkeypatch):
    run(study, [BASELINE])
    monkeypatch.setattr(workers, "_in_parallel", nothing_to_do)
    run(study, [Experiment("baseline", student=TINY, training=QUICK, note="new words")])
    assert stable(study, "baseline")["note"] == "new words"


@pytest.mark.parametrize("damage", ["record", "checkpoint", "sidecar"])
def test_a_damaged_file_is_made_anew_with_the_same_content(study, damage):
    run(study, [BASELINE])
    checkpoint = study.checkpoint("baseline")
    file = {
        "record": records.path(study.name, "baseline", 0),
        "checkpoint": checkpoint,
        "sidecar": checkpoint.with_suffix(".json"),
    }[damage]
    before = checkpoint.read_bytes()
    file.write_bytes(file.read_bytes()[:50])
    run(study, [BASELINE])
    assert checkpoint.read_bytes() == before
    study.model("baseline")


def test_one_failing_run_keeps_the_others_and_is_reported(study):
    broken = Experiment("broken", student=CRNNConfig(kernel_size=(5, 200)), training=QUICK)  # longer than a clip
    depends = Experiment("depends", start="broken", after=(Half(),))
    with pytest.raises(
        ExperimentError, match="4 runs failed, the others .*depends-seed1: needs broken-seed1, which failed"
    ):
        run(study, [broken, depends, BASELINE])
    assert len(study.results().records) == 2


def test_a_pruned_model_is_tuned_with_the_losses_and_the_teacher_of_its_experiment(study):
    pruned = Experiment("pruned", start="student", after=(Prune(0.5),))
    tuned = Experiment(
        "tuned",
        start="student",
        after=(Prune(0.5, training=QUICK, rounds=2), Half()),
        teacher="baseline",
        losses=(Labels(0.4), SoftTargets(0.6, 4.0)),
        control="pruned",
    )
    results = run(study, [BASELINE, STUDENT, pruned, tuned])
    assert study.model("pruned").config.hidden_size == study.model("tuned").config.hidden_size == 3
    assert results["pruned"].macs_per_clip == results["tuned"].macs_per_clip < results["student"].macs_per_clip
    record = stable(study, "tuned")
    assert record["precision"] == "float16" and record["history"]["epoch"] == [1, 2, 3, 4]  # 2 rounds of 2 epochs
    assert "softtargets_1" in record["history"] and stable(study, "pruned")["history"] == {}
    assert not list(paths.checkpoints(study.name).glob("*.resume"))
    assert not tracking.csv_path(study.name, "pruned", 0).exists()


def test_a_chain_of_steps_is_what_its_files_say_in_fresh_processes(study):
    """Pruned under a penalty, then tuned for 4-bit weights: torch file, compact file and record agree."""
    small = Training(epochs=40, batch_size=16)  # the smoke profile makes 2 epochs of it
    chain = Experiment(
        "chain",
        start="student",
        after=(Prune(0.5, training=small, penalty=0.01), QAT(4, small)),
        teacher="baseline",
        losses=(Labels(0.4), SoftTargets(0.6, 4.0)),
        control="student",
    )
    results = run(study, [BASELINE, STUDENT, chain])
    assert stable(study, "chain")["precision"] == "weight-int4" and len(stable(study, "chain")["history"]["epoch"]) == 6
    assert results["chain"].compact_bytes < results["chain"].state_dict_bytes / 3
    again = rescore(study, ["chain", "student"])
    assert os.getpid() not in set(again["process"])
    assert again["equal"].all() and len(again) == 2 * 2 * 2  # experiments, seeds, files
    cost = stable(study, "student")["cost"]
    assert list(again["bytes"][:2]) == [cost["checkpoint_bytes"], cost["compact_bytes"]]
    file = records.path(study.name, "chain", 1)
    record = json.loads(file.read_text())
    record["metrics"]["au_fa_fr"] += 1e-12
    records.write(study.name, record)
    assert list(rescore(study, ["chain"])["equal"]) == [True, True, False, False]
    run(study, [BASELINE, dataclasses.replace(STUDENT, name="afterwards")])  # rescoring leaves the workers alone


def test_a_control_must_be_there_and_train_as_long(study):
    longer = dataclasses.replace(STUDENT, training=dataclasses.replace(QUICK, epochs=80))
    with pytest.raises(ExperimentError, match="'student' trains for 80 epochs and its control 'baseline' for 40"):
        run(study, [BASELINE, longer])
    run(study, [BASELINE])
    with pytest.raises(ExperimentError, match="for 80 epochs and its control 'baseline' for 40"):
        run(study, [longer])
    with pytest.raises(ExperimentError, match="'nobody', the control of 'student', has no record"):
        run(study, [dataclasses.replace(STUDENT, control="nobody")])


def test_nothing_to_run_gives_what_there_is(study):
    run(study, [BASELINE])
    assert list(run(study, []).summary.index) == ["baseline"]


def test_missing_needs_and_bad_recipes_are_named(study):
    with pytest.raises(ExperimentError, match="'baseline' .* is needed but has no checkpoint"):
        run(study, [STUDENT])
    with pytest.raises(ExperimentError, match="circle"):
        run(
            study,
            [
                Experiment("a", student=TINY, teacher="b", losses=(SoftTargets(),)),
                Experiment("b", student=TINY, teacher="a", losses=(SoftTargets(),)),
            ],
        )
    with pytest.raises(ExperimentError, match="share a name"):
        run(study, [BASELINE, BASELINE])
    with pytest.raises(ValueError, match="names no teacher"):
        Experiment("x", student=TINY, losses=(SoftTargets(),))
    with pytest.raises(ValueError, match="either a student to train or a start"):
        Experiment("x")
    with pytest.raises(ValueError, match="not usable as a file name"):
        Experiment("a/b", student=TINY)


def test_an_ensemble_teaches_with_the_models_of_all_seeds(study, folder):
    recipes = [BASELINE, STUDENT, dataclasses.replace(STUDENT, name="taught", ensemble=True)]
    alone = open_study(str(folder), "go", "speaker", "smoke", seeds=1)
    run(alone, recipes)  # of one model: the same teacher as without an ensemble
    of_one = stable(alone, "taught")
    assert of_one["metrics"] == stable(alone, "student")["metrics"]
    run(study, recipes)
    of_two = stable(study, "taught")
    assert of_two["identity"] != of_one["identity"] and of_two["checkpoint"] != of_one["checkpoint"]
    run(alone, recipes)  # a look at fewer seeds takes nothing away
    assert stable(study, "taught") == of_two and len(study.results().records) == 6
    with pytest.raises(ValueError, match="wants an ensemble but names no teacher"):
        Experiment("x", student=TINY, ensemble=True)


def test_teachers_of_different_kinds_teach_by_the_mean_of_what_they_say(study):
    other = dataclasses.replace(BASELINE, name="other", student=dataclasses.replace(TINY, cell="rnn"))
    taught = dataclasses.replace(
        STUDENT, name="taught", teacher=("baseline", "other"), control=None, augmentation=WITHOUT_MASKS
    )
    assert taught.needs == ["baseline", "other"]
    run(study, [BASELINE, other, taught])
    (said, _) = (dict(np.load(file)) for file in sorted(study.corpus.folder.glob("taught-*.npz")))  # of two seeds
    heard = torch.from_numpy(np.array(study.bank(WITHOUT_MASKS)[0, :8])).float()
    means = []
    for seed in range(2):
        each = [study.model(name, seed).outputs(heard).logits for name in ("baseline", "other")]
        means.append((sum(each) / 2).detach().numpy())
    assert any(np.allclose(said["logits"][0, :8], mean, atol=1e-4) for mean in means)
    with pytest.raises(ValueError, match="its own control, teacher"):
        dataclasses.replace(taught, teacher=("baseline", "taught"))


def test_scores_of_test_clips_stand_against_the_threshold(study):
    run(study, [BASELINE, STUDENT])
    scores = study.scores(["baseline", "student"])
    test = study.split.test
    assert list(scores.index) == list(study.corpus.clips["clip"].to_numpy()[test])
    model, sidecar = checkpoints.load(study.checkpoint("baseline"))
    assert np.allclose(scores["baseline"], crnn.score(model, study.logmels[test]) - sidecar["threshold"])


def test_a_rival_that_cannot_stream_has_no_step(study):
    results = run(study, [Experiment("rival", SeparableConfig(), training=dataclasses.replace(QUICK, normalize=False))])
    record = results.records[0]
    assert record["run"]["latency_ms_per_clip"] > 0 and record["run"]["latency_ms_per_step"] is None
    with pytest.raises(ValueError, match="only a CRNN or a TimeNet runs on a stream"):
        StreamingModel(study.model("rival"))


def test_parameters_of_a_study_are_checked(folder):
    with pytest.raises(ValueError, match="choose one of smoke, standard, full"):
        open_study(profile_name="fast")
    with pytest.raises(ValueError, match="choose one of speaker, random"):
        open_study(split="clip")
    with pytest.raises(ValueError, match="whole number"):
        open_study(seeds=-1)


def test_a_quick_run_does_not_replace_a_long_one(study, folder):
    run(study, [BASELINE])
    file = records.path(study.name, "baseline", 0)
    record = json.loads(file.read_text())
    records.write(study.name, record | {"profile": "standard"})
    with pytest.raises(ExperimentError, match="holds results of profile 'standard'"):
        open_study(str(folder), "go", "speaker", "smoke")
    open_study(str(folder), "go", "speaker", "full")
    open_study(str(folder), "go", "speaker", "smoke", to_read=True)
    records.write(study.name, record | {"keyword": "Go"})
    with pytest.raises(ExperimentError, match="holds results of the keyword 'Go'"):
        open_study(str(folder), "go", "speaker", "smoke")


def test_the_synthetic_keyword_knows_no_capitals():
    assert open_study(keyword=" Sheila").keyword == "sheila"


def test_a_relative_home_starts_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KWS_HOME", ".")
    assert paths.home() == paths.ROOT
    monkeypatch.delenv("KWS_HOME")
    assert paths.home() == paths.ROOT


def test_installed_without_its_repository_everything_starts_at_the_working_directory(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(paths, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert corpora.load("tones", "go").name == "tones"
    with pytest.raises(ExperimentError, match="clone the repository"):
        reproduce.reproduce(open_study("tones", "go", "speaker", "smoke"))
    monkeypatch.delenv("KWS_HOME")
    assert paths.home() == tmp_path


def test_a_study_is_called_as_its_folder_whatever_leads_there(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "link").symlink_to(folder)
    for typed in ("~", "~/.", str(tmp_path / "link"), f"{folder}/go/.."):
        assert paths.study_name(typed, "go", "speaker") == "tones-go-speaker"
        assert corpora.load(typed, "go").name == "tones"
    assert paths.study_name("~nobody-of-that-name/words", "go", "speaker") == "words-go-speaker"
    monkeypatch.setenv("KWS_HOME", "~/runs")
    assert paths.home() == folder / "runs"


def test_a_profile_changes_sizes_only():
    smoke, standard = config.profile("smoke"), config.profile("standard")
    assert smoke.synthetic_speakers < standard.synthetic_speakers
    assert standard.synthetic_speakers * 36 * 2 >= 12_000


def test_what_many_wait_for_is_trained_first_and_nothing_waits_for_a_whole_wave(study, trained, monkeypatch):
    """With one process: an aside that nobody needs comes last, though it was named first and needs nothing."""
    aside = dataclasses.replace(BASELINE, name="aside", training=dataclasses.replace(QUICK, epochs=1))
    monkeypatch.setattr(workers, "cpu_count", lambda: 1)
    run(study, [aside, BASELINE, STUDENT])
    assert trained == [f"{name}-seed{seed}" for name in ("baseline", "student", "aside") for seed in (0, 1)]
    assert workers._epochs_that_wait([aside, BASELINE, STUDENT]) == {"baseline": 80, "student": 40, "aside": 1}
