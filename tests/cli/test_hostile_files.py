"""Bad pictures, masks, models and folders: each command says so in a sentence, and goes on where it can."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import fettle, fit
from PIL import Image

from conftest import textured, write_good
from fettle.images import header

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    assert fit(write_good(folder / "good", 24), folder / "model").code == 0
    return folder / "model"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "inspections.jsonl").read_text().splitlines()]


# --- good pictures -------------------------------------------------------------------------------


def test_fit_goes_on_without_broken_pictures_and_names_them(good_folder: Path, tmp_path: Path) -> None:
    truncate(good_folder / "003.png")
    (good_folder / "007.png").write_bytes(b"")
    answer = fit(good_folder, tmp_path / "model", "--json")
    assert (answer.code, answer.json["num_fit"], answer.json["num_calibration"]) == (3, 22, 22)
    refused = [line for line in answer.err.splitlines() if line.startswith("Refused: ")]
    assert len(refused) == 2
    assert any("003.png" in line and "truncated" in line for line in refused)
    assert any("007.png" in line and "is empty" in line for line in refused)
    card = json.loads((tmp_path / "model" / "manifest.json").read_text())["card"]
    assert {Path(refusal["path"]).name for refusal in card["data"]["refused"]} == {"003.png", "007.png"}


def test_one_good_picture_fits_and_promises_nothing(tmp_path: Path) -> None:
    answer = fit(write_good(tmp_path / "good", 1), tmp_path / "model", "--json")
    assert answer.code == 0
    assert (answer.json["num_fit"], answer.json["frr_promised"]) == (1, None)
    inspected = fettle("inspect", tmp_path / "model", tmp_path / "good", "-o", tmp_path / "run", "--json")
    assert (inspected.code, inspected.json["review"]) == (0, 1)


def test_copies_of_one_good_picture_are_one(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 5)
    for copy in range(5):
        shutil.copy(good / "000.png", good / f"copy{copy}.png")
    assert fit(good, tmp_path / "model", "--json").json["num_fit"] == 5


def test_nothing_but_broken_pictures_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.png").write_text("I am no picture")
    answer = fit(tmp_path / "good", tmp_path / "model")
    assert answer.code == 1
    assert "no good picture to learn from" in answer.sentence and "does not begin like" in answer.sentence


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "no pictures"])
def test_fit_wants_a_folder_with_pictures(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("x")
    elif kind != "missing":
        place.mkdir()
    if kind == "no pictures":
        (place / "notes.txt").write_text("x")
    words = {"missing": "does not exist", "file": "is a file", "empty": "is empty", "no pictures": "holds no"}
    answer = fit(place, tmp_path / "model")
    assert answer.code == 1
    assert "place" in answer.sentence and words[kind] in answer.sentence


def test_calibrate_refuses_pictures_that_were_learnt_from(model: Path, tmp_path: Path) -> None:
    answer = fettle("calibrate", model, write_good(tmp_path / "good", 24), "-o", tmp_path / "model2")
    assert answer.code == 1
    assert "has learnt from all 24" in answer.sentence


# --- pictures to inspect -------------------------------------------------------------------------


def bomb(path: Path) -> None:
    """A PNG whose header promises 3000 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 50_000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def hostile_folder(folder: Path) -> dict[str, str]:
    """Write one picture of each bad kind; returns what must be said of each."""
    folder.mkdir()
    grey = textured(0)[:, :, 0]
    (folder / "text.png").write_text("I am no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    Image.fromarray(grey).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1500])
    floats = grey.astype(np.float32)
    Image.fromarray(floats).save(folder / "float.tif")
    floats[3, 3] = np.nan
    Image.fromarray(floats).save(folder / "nan.tif")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    bomb(folder / "bomb.png")
    return {
        "text.png": "does not begin like",
        "empty.png": "is empty",
        "cut.png": "truncated",
        "float.tif": "float values",
        "nan.tif": "1 values that are not finite",
        "dot.png": "1 px wide and 1 px high",
        "bomb.png": "60000 px wide and 50000 px high",
    }


def test_inspect_refuses_each_bad_picture_and_judges_the_others(model: Path, tmp_path: Path) -> None:
    words = hostile_folder(tmp_path / "mixed")
    Image.fromarray(textured(1)).save(tmp_path / "mixed" / "part.png")
    answer = fettle("inspect", model, tmp_path / "mixed", "-o", tmp_path / "run", "--json")
    assert answer.code == 3
    assert (answer.json["pictures"], answer.json["refused"]) == (len(words) + 1, len(words))
    reasons = {Path(row["path"]).name: row["refusal"] for row in rows_of(tmp_path / "run")}
    assert reasons.pop("part.png") is None
    assert set(reasons) == set(words)
    for name, word in words.items():
        assert word in reasons[name]
        assert f"Refused: {reasons[name]}" in answer.err.splitlines()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["complete"] is True


def test_report_shows_a_run_that_refused_everything(model: Path, tmp_path: Path) -> None:
    hostile_folder(tmp_path / "bad")
    assert fettle("inspect", model, tmp_path / "bad", "-o", tmp_path / "run").code == 3
    answer = fettle("report", tmp_path / "run")
    assert answer.code == 0
    assert "bomb.png" in Path(answer.out.strip()).read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(30_000, 10), (10, 30_000)])
def test_extreme_shapes_are_inspected_in_bounded_memory(
    model: Path, tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "MAX_FILE_BYTES", 4 << 20)  # what the reader may ask for at once
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / "strip.png")
    tracemalloc.start()
    answer = fettle("inspect", model, tmp_path / "strip.png", "-o", tmp_path / "run", "--overlays", "--json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (answer.code, answer.json["pictures"], answer.json["refused"]) == (0, 1, 0)
    assert Image.open(next((tmp_path / "run" / "overlays").iterdir())).size == size
    assert peak < 64 << 20  # bytes; the picture itself is 0.9 MB, its map 1.2 MB


def test_names_that_look_like_markup_are_printed_as_they_are(
    labelled_folder: Path, tmp_path: Path, model: Path
) -> None:
    for part in ("test", "ground_truth"):
        (labelled_folder / part / "scratch").rename(labelled_folder / part / "[red]scratch")
    answer = fettle("evaluate", model, labelled_folder)
    assert answer.code == 0
    assert "[red]scratch" in answer.out


def test_missing_picture_is_wrong_use(model: Path, tmp_path: Path) -> None:
    answer = fettle("inspect", model, tmp_path / "no.png", "-o", tmp_path / "run")
    assert answer.code == 2
    assert "no.png" in answer.sentence


# --- labels and masks ----------------------------------------------------------------------------


def test_good_pictures_alone_measure_the_false_rejects_only(model: Path, tmp_path: Path) -> None:
    answer = fettle("evaluate", model, write_good(tmp_path / "fresh", 6, first_seed=70), "--json")
    assert answer.code == 0
    assert (answer.json["num_good"], answer.json["num_defective"]) == (6, 0)
    assert answer.json["image_auroc"] is None and answer.json["frr_measured"] is not None
    assert "there is no defective picture" in answer.err
    assert "n/a" in fettle("evaluate", model, tmp_path / "fresh").out


def test_test_pictures_that_were_learnt_from_are_counted(labelled_folder: Path, tmp_path: Path) -> None:
    shutil.copy(labelled_folder / "train" / "good" / "004.png", labelled_folder / "test" / "good" / "100.png")
    fit(labelled_folder, tmp_path / "model")
    answer = fettle("evaluate", tmp_path / "model", labelled_folder, "--json")
    assert (answer.code, answer.json["num_seen_in_fit"]) == (0, 1)
    assert "1 of these pictures were learnt from" in answer.err
    assert "leakage" in {
        f["kind"] for f in fettle("data", "describe", labelled_folder, "--json").json["findings"]
    }


def test_mask_of_another_size_costs_one_picture(model: Path, labelled_folder: Path, tmp_path: Path) -> None:
    Image.new("L", (32, 32), 255).save(labelled_folder / "ground_truth" / "scratch" / "002_mask.png")
    answer = fettle("evaluate", model, labelled_folder, "-o", tmp_path / "run", "--json")
    assert (answer.code, answer.json["num_refused"], answer.json["num_defective"]) == (3, 1, 5)
    assert "002_mask.png" in answer.err and "32 px wide" in answer.err
    refused = [row for row in rows_of(tmp_path / "run") if row["refusal"]]
    assert [(Path(row["path"]).name, row["truth"]) for row in refused] == [("002.png", "scratch")]


def test_missing_mask_leaves_pixel_metrics_to_the_others(model: Path, labelled_folder: Path) -> None:
    (labelled_folder / "ground_truth" / "scratch" / "002_mask.png").unlink()
    answer = fettle("evaluate", model, labelled_folder, "--json")
    assert (answer.code, answer.json["num_defective"], answer.json["pictures_without_mask"]) == (0, 6, 1)
    assert answer.json["pixel_auroc"] is not None
    assert "1 defective pictures have no mask" in answer.err


def test_masks_1_and_10_go_to_their_own_pictures(model: Path, labelled_folder: Path) -> None:
    scratched = labelled_folder / "test" / "scratch"
    masks = labelled_folder / "ground_truth" / "scratch"
    scores = []
    for renamed in (False, True):
        for kept in ("002", "003", "004", "005"):
            (scratched / f"{kept}.png").unlink(missing_ok=True)
        if renamed:
            (scratched / "000.png").rename(scratched / "1.png")
            (scratched / "001.png").rename(scratched / "10.png")
            (masks / "000_mask.png").rename(masks / "1.png")
            (masks / "001_mask.png").rename(masks / "10.png")
        answer = fettle("evaluate", model, labelled_folder, "--json")
        assert (answer.json["num_defective"], answer.json["pictures_without_mask"]) == (2, 0)
        scores.append(answer.json["pixel_ap"])
    assert scores[0] == scores[1]


# --- models and run folders ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "no tensors", "changed tensors"])
def test_damaged_model_is_refused(model: Path, good_folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    manifest, tensors = broken / "manifest.json", sorted(broken.glob("*.safetensors"))[0]
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "cut manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    for command in (
        ("inspect", broken, good_folder, "-o", tmp_path / "run"),
        ("evaluate", broken, good_folder),
        ("calibrate", broken, good_folder, "-o", tmp_path / "model2"),
    ):
        answer = fettle(*command)
        assert answer.code == 1
        assert "broken" in answer.sentence


def test_out_must_be_a_folder_that_can_be_written(model: Path, good_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in (
            ("fit", good_folder, "-o", out),
            ("calibrate", model, good_folder, "-o", out),
            ("inspect", model, good_folder, "-o", out),
            ("evaluate", model, good_folder, "-o", out),
            ("data", "parts", "-o", out),
        ):
            answer = fettle(*command)
            assert answer.code in (1, 2)
            assert "file" in answer.sentence
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_is_not_written_among_other_files(good_folder: Path) -> None:
    answer = fit(good_folder, good_folder)
    assert answer.code == 2
    assert "holds '000.png', so it is no model's" in answer.sentence
    assert len(list(good_folder.iterdir())) == 24


def test_rows_are_not_written_into_a_model(model: Path, good_folder: Path) -> None:
    before = sorted(model.iterdir())
    answer = fettle("inspect", model, good_folder, "-o", model)
    assert answer.code == 2
    assert "holds a model" in answer.sentence
    assert sorted(model.iterdir()) == before


def test_report_of_what_is_no_run(good_folder: Path) -> None:
    answer = fettle("report", good_folder)
    assert answer.code == 2
    assert "not a run folder" in answer.sentence
