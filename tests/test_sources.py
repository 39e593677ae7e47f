"""Laws of naming inputs: files, folders, globs, tables; classes by folder; one sentence for a
table that is wrong; plain pictures by pixels.
"""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_ingest import draw_slide, ingest, write_slide

import pipeline.readers.raster
from pipeline.plan import make_plan
from pipeline.readers import open_reader
from pipeline.sources import find_files, image_id
from pipeline.store import Store
from pipeline.table import find_sources


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"II*\0" + str(path).encode())


def names(found: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in found]


def test_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / name for name in ("b.tif", "a/c.SVS", "a/d e/ü.png", "a/[x].tif", "f.jp2")))
    for name in ("notes.txt", "a/.hidden.tif", "a/d e/data.dat", "table.csv"):
        (tmp_path / name).write_text("no image")
    every = ["a/[x].tif", "a/c.SVS", "a/d e/ü.png", "b.tif", "f.jp2"]
    assert names(find_files(str(tmp_path)), tmp_path) == every
    globs = {
        "*.tif": ["b.tif"],
        "**/*.tif": ["a/[x].tif", "b.tif"],
        "**": every,
        "**/*": every,
        "*": every,
        "a*": ["a/[x].tif", "a/c.SVS", "a/d e/ü.png"],
        "a/[[]x].tif": ["a/[x].tif"],
        "a/[x].tif": ["a/[x].tif"],
        "**/d?e/*": ["a/d e/ü.png"],
        "*.txt": ["notes.txt"],
    }
    for pattern, expected in globs.items():
        assert names(find_files(str(tmp_path / pattern)), tmp_path) == expected, pattern
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in find_files("a/*.SVS")] == ["a/c.SVS"]
    for nothing in ("*.ndpi", "nowhere", "nowhere/**"):
        with pytest.raises(ValueError, match="no file, folder or match"):
            find_files(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        find_files("empty")


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "real" / "a.tif", tmp_path / "elsewhere" / "b.tif")
    folder = tmp_path / "real"
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.tif").symlink_to(tmp_path / "nothing.tif")
    os.mkfifo(folder / "pipe.tif")
    found = names(find_files(str(folder)), folder)
    assert found == ["a.tif", "gone.tif", "linked/b.tif", "pipe.tif"]
    slide = write_slide(folder / "good.tif", draw_slide(300, 280))
    plan = make_plan([str(folder)], None, None, None, None, 0, None)
    assert [job.source.path for job in plan.jobs] == [slide]
    told = {failure.path.name: failure.reason for failure in plan.failures}
    assert all("is not a file" in told[name] for name in ("gone.tif", "pipe.tif"))


def test_the_pictures_of_a_vms_are_not_images_of_their_own(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jpg", "a_map2.jpg", "other.jpg")))
    (tmp_path / "s.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=a.jpg\nMapFile=a_map2.jpg\r\n"
    )
    assert names(find_files(str(tmp_path)), tmp_path) == ["other.jpg", "s.vms"]


def test_two_slides_in_many_files_with_one_stub_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name / "Slidedat.ini")
        (tmp_path / f"{name}.mrxs").write_bytes(b"the same picture")
    one, other = (image_id(tmp_path / f"{name}.mrxs") for name in "ab")
    assert one.rpartition("-")[2] != other.rpartition("-")[2]


def write_table(folder: Path, text: str) -> Path:
    table = folder / "sub" / "table.csv"
    table.parent.mkdir(exist_ok=True)
    table.write_text(text, encoding="utf-8")
    return table


def test_a_table_is_relative_to_itself_and_says_what_files_do_not(tmp_path: Path) -> None:
    touch(tmp_path / "sub" / "a.tif", tmp_path / "b, c.tif", tmp_path / "sub" / "scan" / "d.tif")
    text = (
        "\ufeffpath, mpp,gsd,patient,split,label\n"
        "a.tif,0.25,,p1,val,tumour\n"
        "\n,,,,,\n"
        f'"../b, c.tif",,0.6,, train ,\n{tmp_path / "sub" / "scan"},,,,,\n'
        "missing.tif\n"
    )
    first, second, third, fourth = find_sources([str(write_table(tmp_path, text))], None, None)
    assert (first.path, first.mpp, first.gsd) == (tmp_path / "sub" / "a.tif", 0.25, None)
    assert (first.patient, first.split, first.label) == ("p1", "val", "tumour")
    assert second.path.samefile(tmp_path / "b, c.tif") and second.gsd == 0.6
    assert (second.split, second.label) == ("train", None)
    assert third.path == tmp_path / "sub" / "scan" / "d.tif"
    assert fourth.path == tmp_path / "sub" / "missing.tif"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no column path"),
        ("file,mpp\na.tif,1\n", "has no column path"),
        ("path;mpp\na.tif;1\n", "has no column path.*with commas"),
        ("path,colour\na.tif,red\n", "unknown columns colour"),
        ("path,mpp,mpp\na.tif,1,2\n", "column mpp twice"),
        ("path,mpp\n", "no line with a path"),
        ("path,mpp\na.tif,1\nb.tif,0,5\n", "line 3: 3 cells and 2 columns"),
        ("path,mpp\na.tif,big\n", "line 2: mpp is 'big' and must be a positive number"),
        ("path,gsd\na.tif,-0.6\n", "line 2: gsd is '-0.6' and must be a positive number"),
        ("path,mpp\na.tif,nan\n", "line 2: mpp is 'nan'"),
        ("path,mpp\n,0.5\n", "line 2: the path is empty"),
        (
            "path,split\na.tif,training\n",
            "split is 'training' and must be one of train, val, test",
        ),
        ("path,mpp,gsd\na.tif,0.5,0.6\n", "line 2: mpp and gsd are both given"),
        (
            "path,split\na.tif,val\nb.tif,\n./a.tif,train\n",
            "lines 2 and 4 with split val and train",
        ),
        ('path,label\n"a.tif,x\n', "cannot be read as a CSV"),
        ("path\na.tif\0\n", "line 2: the path holds a NUL|CSV"),
    ],
)
def test_a_table_that_is_wrong_is_one_sentence_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    write_slide(tmp_path / "a.tif", draw_slide(300, 300))
    table = write_table(tmp_path, text)
    assert ingest(table, "--out", tmp_path / "o.zarr", "--region", "auto") == 2
    said = capsys.readouterr().err
    assert re.search(problem, said) and said.count("\n") == 1
    assert str(table) in said and not (tmp_path / "o.zarr").exists()


def test_a_table_of_another_alphabet_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("path\nMünchen.tif\n".encode("latin-1"))
    assert ingest(table, "--out", tmp_path / "o.zarr") == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_lines_that_lead_nowhere_stop_no_other_and_the_same_file_is_one_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = write_slide(tmp_path / "a.tif", draw_slide(400, 400))
    (tmp_path / "copy.tif").write_bytes(slide.read_bytes())
    text = "path,split\n../a.tif,val\n../a.tif,val\n../copy.tif,train\nnowhere.tif,\n"
    out = tmp_path / "o.zarr"
    command = (write_table(tmp_path, text), "--out", out, "--region", "128")
    assert ingest(*command, "--cluster", "inline") == 3
    said = capsys.readouterr().out
    assert "nowhere.tif is not a file; check the path" in said
    assert "copy.tif has the same content as" in said and "its split train is not used" in said
    states = Store.open(out).image_states().values()
    assert sorted(state["state"] for state in states) == ["failed", "ok"]
    assert {region.split for region in Store.open(out).regions()} == {"val"}


def write_faces(folder: Path, count: int = 6) -> Path:
    """JPEGs of faces, so to speak: smooth colours, black at the top; by colour of hair."""
    rng = np.random.default_rng(0)
    for i in range(count):
        face = Image.fromarray(rng.integers(20, 255, (9, 9, 3), np.uint8)).resize((160, 144))
        pixels = np.asarray(face).copy()
        pixels[:40] = 0
        path = folder / ("blond", "black", "red")[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    return folder


def test_a_folder_of_pictures_by_pixels_with_the_folders_as_classes(tmp_path: Path) -> None:
    faces, out = write_faces(tmp_path / "faces"), tmp_path / "o.zarr"
    command = (faces, "--out", out, "--pixels", 1, "--region", 128, "--cluster", "inline")
    assert ingest(*command, "--labels", "folders") == 0
    store = Store.open(out)
    assert (store.spec.unit, store.spec.spacing) == ("px", 1.0)
    assert sorted(store.classes().values()) == ["black"] * 2 + ["blond"] * 2 + ["red"] * 2
    for name, state in store.image_states().items():
        with (
            Image.open(state["source"]) as picture,
            open_reader(Path(state["source"]), plain=True) as reader,
        ):
            decoded = np.moveaxis(np.asarray(picture), 2, 0).astype(int)
            pixels = reader.read(0, 0, 144, 160)
        assert np.abs(decoded - pixels).max() <= 4  # decoders differ by rounding
        image = store.image(name)
        assert (image.unit, image.spacing) == ("pixel", 1.0)
        assert np.array_equal(image.read(0, 0, 144, 160), pixels)
        assert store.mask(name, 0, 0, 144, 160).all()  # black is a colour here
        assert state["label"] == Path(state["source"]).parent.name
    assert len(store.regions()) == 6
    again = (faces, "--out", out, "--region", 128, "--cluster", "inline")
    assert ingest(*again) == 0  # what the store is measured by is known
    half = tmp_path / "half.zarr"
    assert ingest(faces, "--out", half, "--pixels", 2, "--region", 64, "--cluster", "inline") == 0
    image = Store.open(half).image(Store.open(half).image_ids()[0])
    assert (image.shape, image.spacing) == ((3, 72, 80), 2.0)


def test_a_table_overrules_the_folders(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", 3)
    text = "path,label\n../faces/red/2.jpg,auburn\n../faces/blond/0.jpg,\n"
    table = write_table(tmp_path, text)
    labels = [s.label for s in find_sources([str(table)], None, None, True, "folders")]
    assert labels == ["auburn", "blond"]
    assert [s.label for s in find_sources([str(table)], None, None, True)] == ["auburn", None]
    assert [s.label for s in find_sources([str(faces)], None, None, True)] == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "does not say its mpp.*--pixels"),
        (("--pixels", "0.5"), "finest that works is --pixels 1"),
        (("--pixels", "0"), "must be a positive length"),
        (("--pixels", "1", "--mpp", "1"), "--mpp and --pixels are both given"),
        (("--pixels", "1", "--source-mpp", "1"), "--source-mpp and --pixels are both given"),
    ],
)
def test_plain_pictures_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, sentence: str
) -> None:
    faces = write_faces(tmp_path / "faces", 1)
    assert ingest(faces, "--out", tmp_path / "o.zarr", "--region", "auto", *arguments) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_picture_with_transparency_is_three_colours_and_a_mask(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 70, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    with open_reader(tmp_path / "a.png", plain=True) as reader:
        assert reader.bands == ("red", "green", "blue")
        assert np.array_equal(reader.read(0, 0, 60, 70), np.moveaxis(pixels[..., :3], 2, 0))
        assert np.array_equal(reader.read_valid(0, 0, 60, 70), pixels[..., 3] > 0)


def test_planning_decodes_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG whose pixels are gone is planned like any other; 30,000 of them must be cheap."""
    stream = io.BytesIO()
    Image.new("RGB", (1024, 1024)).save(stream, "jpeg")
    folder = tmp_path / "faces"
    folder.mkdir()
    head = stream.getvalue()[: stream.getvalue().index(b"\xff\xda") + 14]
    for i in range(20):
        noise = np.random.default_rng(i).bytes(5000)
        (folder / f"{i}.jpg").write_bytes(head + noise)
    opened: list[Path] = []
    honest = pipeline.readers.raster.RasterReader._open

    def counted(reader: Any) -> Any:
        opened.append(reader.path)
        return honest(reader)

    monkeypatch.setattr(pipeline.readers.raster.RasterReader, "_open", counted)
    plan = make_plan([str(folder)], 1.0, "px", None, None, 512, None)
    assert len(plan.jobs) == 20 and not plan.failures and len(opened) == 20
    assert {job.shape for job in plan.jobs} == {(3, 1024, 1024)}
