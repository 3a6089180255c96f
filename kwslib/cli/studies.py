"""Commands about studies: run, check, search, show and publish them."""

import argparse
import json
import sys
from dataclasses import replace

from kwslib import paths


def kws_make(options: argparse.Namespace) -> None:
    """A detector for a word."""
    from kwslib.cli.sounds import as_in_shell
    from kwslib.lab import detector

    recordings, people, negatives = map(as_in_shell, (options.recordings, options.people, options.negatives))
    folder = detector.make(options.keyword, recordings, people, options.profile, negatives)
    print((folder / "card.md").read_text("utf-8"))
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def kws_name(options: argparse.Namespace) -> None:
    """The folder name of a study."""
    print(paths.study_name(options.corpus, options.keyword, options.split))


def kws_reproduce(options: argparse.Namespace) -> int:
    """Run a study; 1 when part of it failed."""
    from kwslib.lab import reproduce, verify
    from kwslib.lab.study import open_study
    from kwslib.results import records

    to_read = options.only == [reproduce.PLOTS]
    study = open_study(options.corpus, options.keyword, options.split, options.profile, options.seeds, to_read=to_read)
    if not options.only:
        _ = study.split  # prepares the corpus: whatever is wrong with it is said before any notebook runs
        if options.people:
            verify.people_for(study, options.people)  # of the people, too
    parameters = {"other": options.other} if options.other else {}
    failed = reproduce.reproduce(study, options.only, options.quiet, options.people, **parameters)
    if not options.only and list(records.folder(study.name).glob("*.json")):
        print()
        kws_table(argparse.Namespace(study=study.name))
    if failed:
        print(f"{len(failed)} failed; what they wrote is in {paths.reports(study.name) / 'run.log'}", file=sys.stderr)
    return 1 if failed else 0


def kws_verify(options: argparse.Namespace) -> int:
    """Compare with what was published; 1 when something does not hold."""
    import pandas as pd

    from kwslib.lab import verify
    from kwslib.lab.study import open_study

    study = open_study(options.corpus, options.keyword, options.split, to_read=True)
    found = verify.check(study, None if options.all else (0,))
    if options.json:
        print(json.dumps(found))
        return 0 if found["holds"] else 1
    if found["compared"]:
        table = pd.DataFrame(found["compared"]).set_index("what")
        runs = f"{found['compared'][0]['compared']} of the {found['published']} published runs"
        print(f"Your records of {study.name}, {runs}, against the published ones:")
        print(table.drop(columns="outside").to_string())
        for what, outside in table.loc[table["outside"] != "", "outside"].items():
            print(f"  {what} differs: {outside if len(outside) < 300 else outside[:300] + ' ...'}")
    else:
        print(f"{study.name} has no records of yours to compare: 'make reproduce' makes them")
    print(
        f"Published files scored again: {found['files']}, of which {found['exact']} exactly as recorded and "
        f"{found['close']} within {verify.RESCORED_TOLERANCE:g}; largest difference {found['largest_difference']:.1g}"
    )
    print("The results hold." if found["holds"] else "NOT ALL RESULTS HOLD.")
    return 0 if found["holds"] else 1


def kws_people(options: argparse.Namespace) -> None:
    """Score every model of a study on recordings of people."""
    from kwslib.lab import verify
    from kwslib.lab.study import open_study
    from kwslib.results import sentences

    study = open_study(options.corpus, options.keyword, options.split, to_read=True)
    print(sentences.say_people(verify.score_people(study, options.people)))
    print(f"\n{paths.reports(study.name) / 'people.json'}")


def kws_mistakes(options: argparse.Namespace) -> None:
    """Find what the clip model to take gets wrong, and draw the report with it."""
    from kwslib.lab import reproduce
    from kwslib.lab.study import open_study
    from kwslib.results import page

    study = open_study(options.corpus, options.keyword, options.split, to_read=True)
    file = reproduce.keep_mistakes(study, options.published)
    if file is None:
        raise ValueError(f"{study.name} has no clip model to take: none has ten times fewer MACs than its baseline")
    print(file)
    paths.write_atomically(file.parent / "index.html", page.render(study.name, file.parent))


def kws_sweep(options: argparse.Namespace) -> None:
    """Search for small models and print the front."""
    from kwslib.lab import sweep
    from kwslib.lab.study import open_study

    study = open_study(options.corpus, options.keyword, options.split, options.profile)
    recipe = replace(sweep.TRAINING, epochs=options.epochs)
    found = sweep.sweep(study, options.trials, options.max_macs, recipe, options.storage, options.teacher or None)
    print(found[found["front"]].drop(columns="front").to_string())
    print(f"\nThe Pareto front on val; all trials: {paths.reports(study.name) / 'sweep.csv'}")


def kws_report(options: argparse.Namespace) -> None:
    """Draw the report again."""
    from kwslib.results import page

    print(page.write(options.study))


def kws_table(options: argparse.Namespace) -> None:
    """The results of a study."""
    from kwslib.results import records, tables

    people, found = records.people(paths.reports(options.study)), records.load(options.study)
    table = tables.display_table(records.summary(found, people=people))
    columns = ["AU-FA-FR ×1e5 ↓", "95 % interval", tables.PEOPLE, "fewer MACs ↑", "compression ↑"]
    print(table[[column for column in columns if column in table]].to_string().replace("**", "  "))
    if found[0]["profile"] == "smoke":
        print(f"\n{tables.SMOKE}")
    for failure in records.failures(paths.reports(options.study)):
        print(f"FAILED  {failure['experiment']}, seed {failure['seed']}: {failure['error']}")
    print(f"\nReport: {paths.reports(options.study) / 'index.html'}")


def kws_publish(options: argparse.Namespace) -> None:
    """Make a study the published one."""
    from kwslib.results import page

    page.publish(options.study)
    print(f"published as {paths.reports('reference') / options.study}")
