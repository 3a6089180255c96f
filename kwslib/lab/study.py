"""A study: one corpus, keyword and split, with its data, its files and its results."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from torch import nn

from kwslib import metrics, paths
from kwslib.audio import small_flac
from kwslib.config import PROFILES, SPLITS, FeatureConfig, Profile, SynthesisConfig, profile
from kwslib.data import augment, corpora, features, pieces, splits
from kwslib.data.augment import Augmentation
from kwslib.data.pieces import PieceConfig
from kwslib.data.synthesis import is_voice
from kwslib.nets import crnn
from kwslib.results import records, sentences, tables
from kwslib.streaming import tracks
from kwslib.streaming.tracks import StreamSpec, Tracks
from kwslib.training import checkpoints
from kwslib.training.loop import Training

MOST_REPEATS = 20  # of a recording, each of them varied


class ExperimentError(ValueError):
    """An experiment cannot run or failed; the message says which, why and what to do."""


@dataclass(frozen=True)
class Study:
    """One corpus, keyword and split; made by ``open_study``. Knows its data and its files.

    A ``variant`` keeps the results of a side question apart.
    """

    corpus_argument: str
    keyword: str
    split_name: str
    profile: Profile
    seeds: int
    synthesis: SynthesisConfig = SynthesisConfig()
    variant: str = ""

    @property
    def name(self) -> str:
        name = paths.study_name(self.corpus_argument, self.keyword, self.split_name)
        return f"{name}-{self.variant}" if self.variant else name

    @cached_property
    def corpus(self) -> corpora.Corpus:
        return corpora.load(self.corpus_argument, self.keyword, self.profile.name, self.synthesis)

    @cached_property
    def split(self) -> splits.Split:
        return splits.load(self.corpus, self.keyword, self.split_name)

    @cached_property
    def labels(self) -> np.ndarray:
        """1 for clips of the keyword, (clips,)."""
        return self.corpus.is_keyword(self.keyword).astype(np.int64)

    @cached_property
    def logmels(self) -> np.ndarray:
        """Log-mels of all clips, (clips, F, T)."""
        return features.logmels(self.corpus)

    @cached_property
    def heard(self) -> np.ndarray:
        """The training clips; recordings beside many voices so often that they are a third of the keyword's clips.

        At most as many as the voices' clips in all, and nobody's more than ``MOST_REPEATS`` times.
        """
        train, labels = self.split.train, self.labels[self.split.train]
        if not self.corpus_argument.startswith(corpora.WITH_VOICES):
            return train
        recorded = ~self.corpus.clips["speaker"].iloc[train].map(is_voice).to_numpy(bool)
        said = labels[recorded].sum(), labels[~recorded].sum()
        wanted = said[1] // (2 * max(said[0], 1)), (~recorded).sum() // max(recorded.sum(), 1), MOST_REPEATS
        return np.concatenate([train, np.tile(train[recorded], max(min(wanted) - 1, 0))])

    def bank(self, augmentation: Augmentation) -> np.ndarray:
        """Augmented log-mels of the clips that are heard, (views, clips, F, T)."""
        train = self.heard
        others = train[self.labels[train] == 0]
        return augment.bank(self.corpus, train, others, self.profile.views, augmentation, FeatureConfig())

    def pieces(self, recipe: PieceConfig, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of stream of training speakers and labels of their seconds, as many as ``bank`` has clips."""
        train = self.heard
        n = max(1, self.profile.views * len(train) // recipe.clips)
        return pieces.bank(self.corpus, train, self.labels[train] == 1, n, recipe, augmentation, self.keyword)

    def tracks(self, part: str, specs: Sequence[StreamSpec]) -> dict[str, Tracks]:
        """Long streams by name, made of the clips of one part of the split: ``val`` or ``test``.

        Val streams draw from seeds of their own: other noise, other times.
        """
        rows, shift = getattr(self.split, part), 1000 if part == "val" else 0
        drawn = {spec.name: replace(spec, seed=spec.seed + shift) for spec in specs}
        return {name: tracks.prepare(self.corpus, rows, self.keyword, spec, part) for name, spec in drawn.items()}

    def sized(self, training: Training) -> Training:
        """A recipe's training with as many epochs as the profile makes of them."""
        return replace(training, epochs=self.profile.epochs(training.epochs))

    def summary(self) -> pd.DataFrame:
        """What is studied, as a table."""
        rows = {"study": self.name, "keyword": self.keyword, "split": self.split_name, "profile": self.profile.name}
        rows |= {"seeds": self.seeds, **self.corpus.summary()}
        return pd.DataFrame({"value": rows})

    def introduction(self) -> Markdown:
        """Who judges, and what is studied: the beginning of a notebook."""
        row = splits.counts(self.corpus, self.split, self.keyword).loc["test"]
        keywords, speakers = int(row["keyword clips"]), int(row["speakers"])
        judges = sentences.say_judges(
            self.corpus.name, self.split_name, keywords, int(row["clips"]) - keywords, speakers
        )
        return Markdown(f"{judges}\n\n{tables.markdown(self.summary().rename_axis('what'))}")

    def checkpoint(self, experiment: str, seed: int = 0) -> Path:
        return paths.checkpoints(self.name) / f"{paths.label(experiment, seed)}.pt"

    def aside(self, label: str, identity: str) -> Path:
        """Where the result of a run is kept after that of another recipe took its place: record and torch file."""
        return paths.reports(self.name) / "earlier" / f"{label}.{paths.slug(identity)}"

    def model(self, experiment: str, seed: int = 0) -> nn.Module:
        """The trained model of an experiment.

        Raises:
            ExperimentError: it was not trained yet, or its file is damaged.
        """
        try:
            return checkpoints.load(self.checkpoint(experiment, seed))[0]
        except checkpoints.CheckpointError as error:
            raise ExperimentError(f"the model of {experiment!r}, seed {seed}, is not available: {error}") from None

    def threshold(self, model: nn.Module, kept: float = 0.99) -> float:
        """The logit above which a clip counts as the keyword: it accepts this share of the val keywords."""
        rows = self.split.val[self.labels[self.split.val] == 1]
        return metrics.threshold_keeping(kept, crnn.score(model.cpu(), self.logmels[rows]))

    def scores(self, experiments: Sequence[str], seed: int = 0) -> pd.DataFrame:
        """Keyword scores of the test clips less each model's threshold, accepted from 0 on, (clips, experiments)."""
        test = self.split.test
        columns = {}
        for name in experiments:
            model = self.model(name, seed)
            columns[name] = crnn.score(model, self.logmels[test]) - self.threshold(model)
        return pd.DataFrame(columns, index=pd.Index(self.corpus.clips["clip"].to_numpy()[test], name="clip"))

    def mistakes(self, model: nn.Module, most: int = 6) -> dict:
        """Which test clips a model gets wrong at its threshold, as plain values: see ``kwslib.results.page.MISTAKES``.

        Listed are the ``most`` that are furthest off, of missed keywords one of each speaker, of other words that were
        accepted one of each word: else a single voice might fill the list. A synthesizer's clips come with their sound,
        recordings of people do not.
        """
        threshold, test = self.threshold(model), self.split.test
        clips = self.corpus.clips[["word", "speaker"]].iloc[test].assign(row=test)
        clips["score"] = crnn.score(model, self.logmels[test])
        is_keyword, found = self.labels[test] == 1, {"threshold": threshold}
        for kind, rows, alike in (("missed", clips[is_keyword], "speaker"), ("accepted", clips[~is_keyword], "word")):
            wrong = rows[(rows["score"] >= threshold) == (kind == "accepted")]
            apart = (wrong["score"] - threshold).abs()
            worst = wrong.loc[apart.sort_values(ascending=False, kind="stable").index].drop_duplicates(alike).head(most)
            listed = worst[["word", "speaker", "score"]].astype({"score": float}).round(4)
            for column, counted in (("alike", wrong), ("alike_clips", rows)):  # of the same speaker, or word
                listed[column] = worst[alike].map(counted[alike].value_counts())
            heard = self.corpus_argument == "synthetic"
            listed["flac"] = [small_flac(self.corpus.waveforms[row]) if heard else "" for row in worst["row"]]
            found[kind] = {"clips": len(rows), "wrong": len(wrong), "worst": listed.to_dict("records")}
        return found

    def false_accept_rate(
        self, experiment: str, others: corpora.Corpus, kept: float = 0.99, keywords_of: "Study | None" = None
    ) -> pd.Series:
        """Share of recordings of other words that each seed's model takes for the keyword, by seed.

        Args:
            others: of any corpus: what does a detector do among people it was not trained on?
            kept: share of the val keywords that must be accepted; it sets the threshold.
            keywords_of: the study whose val keywords these are; this one by default. Another one makes
                models comparable that were trained on different corpora.
        """
        logmels = features.logmels(others)[~others.is_keyword(self.keyword)]
        rates = {}
        for seed in range(self.seeds):
            model = self.model(experiment, seed)
            threshold = (keywords_of or self).threshold(model, kept)
            rates[seed] = float((crnn.score(model, logmels) >= threshold).mean())
        return pd.Series(rates, name=experiment)

    def results(self) -> "Results":
        """Everything this study has records of."""
        return Results(self, records.load(self.name))


@dataclass(frozen=True)
class Results:
    """Records of a study with the tables a notebook shows."""

    study: Study
    records: list[dict] = field(repr=False)

    def __getitem__(self, experiment: str) -> pd.Series:
        """Means over the seeds of one experiment, for example ``results["baseline"].au_fa_fr``."""
        return self.summary.loc[experiment]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per experiment; the columns are explained at ``kwslib.results.records.summary``."""
        return records.summary(self.records, people=records.people(paths.reports(self.study.name)))

    def table(self, *experiments: str) -> Markdown:
        """The results as a notebook shows them: all experiments, or the named ones."""
        rows = self.summary.loc[list(experiments)] if experiments else self.summary
        power = sentences.say_power(records.clear_ratios(self.records, rows))
        return Markdown(tables.markdown(tables.display_table(rows)) + (f"\n\n{power}" if power else ""))

    def gain(self, *experiments: str) -> pd.DataFrame:
        """What experiments gained over their controls, in AU-FA-FR, with 95 % intervals and a verdict."""
        rows = self.summary.loc[list(experiments)]
        verdicts = rows.apply(tables.verdict, axis=1).rename("verdict")
        return rows[["control", "gain", "gain_low", "gain_high"]].join(verdicts)

    def compare(self, experiment: str) -> Markdown:
        """An experiment beside what other recipes of that name gave: what was changed, quality, cost, files.

        Those are the results that were replaced here, the last one first, and the published one.

        Raises:
            ExperimentError: the experiment has no result yet.
        """
        now = [r for r in self.records if r["experiment"] == experiment]
        if not now:
            raise ExperimentError(f"{experiment!r} has no result yet: run the notebook that defines it first")
        versions = {"now": [(r, self.study.checkpoint(experiment, r["seed"])) for r in now]}
        versions |= _others(self.study, experiment, {r.get("identity") for r in now})
        if len(versions) == 1:
            return Markdown(f"There is nothing older than this of `{experiment}`, and nothing else was published.")
        return Markdown(_side_by_side(versions))


def _others(study: Study, experiment: str, known: set) -> dict[str, list[tuple[dict, Path]]]:
    """Records and torch files of each other recipe of an experiment, in the order of seeds, by a title; the last first.

    An identity is of one seed. Seeds are of one version when their recipes are equal; where a seed has
    several of one recipe, built on other models, the latest stands with the latest.
    """
    earlier = paths.reports(study.name) / "earlier"
    replaced = sorted(earlier.glob(f"{experiment}-seed*.*/record.json"), key=lambda file: -file.stat().st_mtime)
    published = (paths.published("reports", study.name) / "records").glob(f"{experiment}-seed*.json")
    versions: list[list[tuple[dict, Path]]] = []
    titles: list[str] = []
    for file in [*replaced, *published]:
        try:
            record = records.read(file)
            records.require(record, records.FORM, file)
        except records.RecordError:  # a damaged one is no reason to show none
            continue
        if record["experiment"] != experiment or record.get("identity") in known:
            continue
        known.add(record.get("identity"))
        here = file in replaced
        folder = file.parent if here else paths.published("checkpoints", study.name)
        row = record, folder / f"{paths.label(experiment, record['seed'])}.pt"
        for rows in versions:
            if _asked(rows[0][0]) == _asked(record) and record["seed"] not in {r["seed"] for r, _ in rows}:
                rows.append(row)
                break
        else:
            versions.append([row])
            here &= not record["run"].get("copy_of_published")
            title = f"until {datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}" if here else "published"
            again = sum(other.startswith(title) for other in titles)
            titles.append(f"{title} ({again + 1})" if again else title)
    # Resamples draw seeds by their place: a seed must stand against itself.
    ordered = [sorted(rows, key=lambda row: row[0]["seed"]) for rows in versions]
    return dict(zip(titles, ordered, strict=True))


def _asked(record: dict) -> dict[str, object]:
    """What decides a record's result, by dotted names: recipe, data and profile."""
    said = {key: value for key, value in record.get("recipe", {}).items() if key not in ("name", "note", "control")}
    data = {key: str(value)[:12] for key, value in record["data"].items()}
    return _flat({**said, "data": data, "profile": record["profile"]})


def _flat(value: object, name: str = "") -> dict[str, object]:
    """The leaves of nested values.

    >>> _flat({"losses": [{"weight": 0.4}, {"weight": 0.6}], "stride": [2, 8]})
    {'losses[0].weight': 0.4, 'losses[1].weight': 0.6, 'stride': [2, 8]}
    """
    if isinstance(value, dict):
        parts = {f"{name}.{key}".lstrip("."): part for key, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)}
    else:
        return {name: value}
    return {leaf: end for key, part in parts.items() for leaf, end in _flat(part, key).items()}


def _side_by_side(versions: dict[str, list[tuple[dict, Path]]]) -> str:
    """A table with a column for each version: where recipes differ, quality, cost, the file of the first seed."""
    asked = pd.DataFrame({title: pd.Series(_asked(rows[0][0]), dtype=object) for title, rows in versions.items()})
    changed = asked[asked.map(str).nunique(axis=1) > 1].fillna("–")
    found = []
    for title, rows in versions.items():
        for record, _ in rows:
            first = versions["now"][0][0]  # a gain needs the same clips, and as many resamples
            alike = record["data"] == first["data"] and record["profile"] == first["profile"]
            control = "now" if alike and title != "now" else None
            found.append(record | {"experiment": title, "control": control})
    summary = records.summary(found)
    shown = tables.display_table(summary)
    gains = -summary[["gain", "gain_high", "gain_low"]]  # of what is now over each, not of each over it
    shown["gain of now over it ×1e5 ↑"] = [
        "–" if np.isnan(gain) else f"{tables.area(gain)} ({tables.area(low)} to {tables.area(high)})"
        for gain, low, high in gains.to_numpy()
    ]
    quality = ["AU-FA-FR ×1e5 ↓", "95 % interval", "gain of now over it ×1e5 ↑"]
    shown = shown[[*quality, "MACs per clip ↓", "size, kB ↓", "compact file, kB ↓"]]
    shown["seeds"] = summary["seeds"]
    files = [f"`{file}`" for (_, file), *_ in versions.values()]
    shown["file"] = [file.replace(f"{paths.home()}/", "").replace(f"{paths.ROOT}/", "") for file in files]
    same = asked.map(str).drop(columns="now").eq(asked["now"].map(str), axis=0).all()
    alike = f"\n\nOf the same recipe and data, built on other models or by other code: {', '.join(same.index[same])}."
    return tables.markdown(pd.concat([changed, shown.T]).rename_axis("what")) + (alike if same.any() else "")


def open_study(
    corpus: str = "synthetic",
    keyword: str = "sheila",
    split: str = "speaker",
    profile_name: str = "standard",
    seeds: int = 0,
    synthesis: SynthesisConfig = SynthesisConfig(),
    variant: str = "",
    to_read: bool = False,
) -> Study:
    """Check the parameters of a run and open its study; the corpus is prepared when first used.

    Args:
        corpus: ``synthetic``, a version of Speech Commands, or a folder ``<root>/<word>/*.wav``.
        seeds: runs per experiment; 0 takes the profile's number.
        synthesis: how the synthetic corpus speaks.
        variant: added to the study's name, for a side question that keeps its results apart.
        to_read: nothing will be run, so results of a larger profile are in no danger.

    Raises:
        ValueError: an unknown profile or split, or a negative number of seeds.
        ExperimentError: the study's folder holds results of a larger profile.
    """
    chosen = profile(profile_name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not isinstance(seeds, int) or seeds < 0:
        raise ValueError(f"seeds must be a whole number, 0 for the profile's own, not {seeds!r}")
    keyword = corpora.clean_keyword(str(corpus), str(keyword))
    study = Study(
        str(corpus), keyword, split, chosen, seeds or chosen.seeds, synthesis, paths.slug(variant) if variant else ""
    )
    if not to_read:
        refuse_to_overwrite(study)
    return study


def refuse_to_overwrite(study: Study) -> None:
    """A quick run must not replace the results of a long one, nor a keyword those of another.

    Raises:
        ExperimentError: it would.
    """
    sizes = list(PROFILES)
    for file in records.folder(study.name).glob("*.json"):
        try:
            found = records.read(file)
        except records.RecordError:
            continue  # a damaged one is made anew
        kept = None
        if sizes.index(found["profile"]) > sizes.index(study.profile.name):
            kept = f"profile {found['profile']!r}, which a {study.profile.name!r} run"
        if found.get("keyword") != study.keyword:
            kept = f"the keyword {found.get('keyword')!r}, which {study.keyword!r}"
        if kept:
            raise ExperimentError(
                f"{paths.reports(study.name)} holds results of {kept} would replace: "
                "use that one, move the folder away, or set KWS_HOME to another folder"
            )
