"""A class label on its way from a table to the image: laws of each stage that hands it on."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from chain import Chain, ingest_arguments, pack_arguments, succeed, train_arguments
from processes import run
from test_data import equal

import jobs.sample
import pipeline.ingest
import pipeline.pack
from conditioning.tokens import with_labels
from jobs.data import Batches
from jobs.run import Run
from model.attention import Condition
from pipeline.packfile import PackSet
from pipeline.store import Store


@pytest.fixture(scope="module")
def labelled(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain again, after its slide was given a class in a table."""
    folder = tmp_path_factory.mktemp("labelled")
    found = dataclasses.replace(chain, store=folder / "dataset.zarr", packs=folder / "packs")
    shutil.copytree(chain.store, found.store)
    table = folder / "cohort.csv"
    table.write_text(f"path,label\n{chain.slide},tumour\n")
    succeed(pipeline.ingest.main(ingest_arguments(table, found.store)))
    succeed(pipeline.pack.main(pack_arguments(found, found.packs)))
    return found


def two_classes(chain: Chain, *labels: str | None) -> PackSet:
    """The chain's packs, as if regions were of images of several classes, in turn."""
    packs = PackSet.open(chain.packs)
    regions = [
        dataclasses.replace(entry, label=labels[number % len(labels)])
        for number, entry in enumerate(packs.regions)
    ]
    classes = tuple(sorted({label for label in labels if label is not None}))
    settings = dataclasses.replace(packs.settings, classes=classes)
    return PackSet(packs.path, settings, packs.statistics, regions)


def test_a_table_gives_a_class_to_images_that_were_ingested_before(
    chain: Chain, labelled: Chain
) -> None:
    before, after = Store.open(chain.store), Store.open(labelled.store)
    (image,) = after.image_ids()
    assert before.classes() == {}
    assert after.classes() == {image: "tumour"}
    assert after.regions() == before.regions()
    assert after.fingerprint() != before.fingerprint()


def test_packs_know_the_class_of_every_region(
    labelled: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    packs = PackSet.open(labelled.packs)
    assert packs.settings.classes == ("tumour",)
    assert {entry.label for entry in packs.regions} == {"tumour"}
    (shard,) = labelled.packs.glob("*.tar")
    with tarfile.open(shard) as members:
        files = [members.extractfile(m) for m in members if m.name.endswith(".json")]
        assert {json.load(file)["label"] for file in files if file is not None} == {"tumour"}
    unlabelled = dataclasses.replace(labelled, store=labelled.slide.parent / "dataset.zarr")
    assert pipeline.pack.main(pack_arguments(unlabelled, labelled.packs)) == 2
    assert "was packed with store_fingerprint" in capsys.readouterr().err


def test_batches_name_the_class_of_each_region_and_change_in_nothing_else(chain: Chain) -> None:
    plain = Batches(PackSet.open(chain.packs), batch=8, seed=2, part=3)
    with_two = Batches(two_classes(chain, "stroma", None, "tumour"), batch=8, seed=2, part=3)
    for step in range(3):
        batch, bare = with_two.at(step), plain.at(step)
        for name in ("draw", "seeds", "uniform"):
            assert equal(getattr(batch, name), getattr(bare, name))
        for name in ("values", "centres_px", "keep"):
            assert equal(getattr(batch.condition, name), getattr(bare.condition, name))
        assert bare.condition.labels is None
        parts = [with_two.at(step, rank, 2).condition for rank in range(2)]
        for name in ("labels", "keep_label"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert equal(getattr(batch.condition, name), joined)


def test_labels_are_dropped_on_their_own_and_in_half_of_the_samples_without_tokens(
    chain: Chain,
) -> None:
    """Of 600 samples: frequencies within four deviations of 0.2 and 0.5; never at no dropout,
    except where a region has no label.
    """
    packs = two_classes(chain, "stroma", "tumour")
    batches = Batches(packs, batch=60, seed=2, condition_dropout=0.2, part=0)
    conditions = [batches.at(step).condition for step in range(10)]
    keep, keep_label = (
        torch.cat([getattr(c, name) for c in conditions]) for name in ("keep", "keep_label")
    )
    for kept, expected in ((True, 0.2), (False, 0.5)):
        dropped = ~keep_label[keep == kept]
        bound = 4 * (expected * (1 - expected) / len(dropped)) ** 0.5
        assert abs(float(dropped.double().mean()) - expected) < bound

    def always(*labels: str | None) -> Condition:
        given = two_classes(chain, *labels)
        return Batches(given, batch=60, seed=2, condition_dropout=0.0, part=0).at(0).condition

    both, half = always("stroma", "tumour"), always(None, "tumour")
    assert both.labels is not None and both.keep_label is not None and both.keep_label.all()
    assert 0 < int(both.labels.sum()) < 60
    assert equal(half.keep_label, both.labels == 1)


def test_a_class_that_was_not_trained_is_none(chain: Chain) -> None:
    given = Batches(PackSet.open(chain.packs), batch=4, seed=0, part=0).at(0).condition
    names = ["tumour", "fat", None, "stroma"]
    made = with_labels(given, ("stroma", "tumour"), names, [True, True, True, False])
    assert made.labels is not None and made.keep_label is not None
    assert made.keep_label.tolist() == [True, False, False, False]
    assert made.labels.tolist()[0] == 1
    assert with_labels(given, (), names, [True] * 4) is given


def test_an_image_is_painted_as_the_class_it_is_asked_for(
    labelled: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default as its region's own; a class that the run does not know is a sentence."""
    run_folder, out = tmp_path / "run", tmp_path / "out"
    run("jobs.train", train_arguments(labelled, run_folder, 2))
    config = Run(run_folder).config()
    assert config.denoiser.classes == 1
    arguments = [
        *(str(run_folder), "--condition", str(labelled.store), "--out", str(out)),
        *("--region", "3", "--size", "128", "--steps", "1", "--format", "zarr"),
    ]
    assert jobs.sample.main([*arguments, "--label", "fat"]) == 2
    assert "--label fat is none of the run's classes, which are tumour" in capsys.readouterr().err
    succeed(jobs.sample.main(arguments))
    (record,) = out.glob("*.json")
    assert json.loads(record.read_text())["identity"]["label"] == "tumour"
    succeed(jobs.sample.main([*arguments, "--label", "tumour"]))
    assert "is already done" in capsys.readouterr().out
