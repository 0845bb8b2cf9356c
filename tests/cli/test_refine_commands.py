"""`--refine` and `--contours`: what is written, what is measured, and how wrong use is answered."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from command_line import TINY, Answer, fettle
from PIL import Image

from conftest import textured, write_good, write_product
from fettle.model_folder import read_model, write_model

PADIM = (*TINY, "--method", "padim", "--set", "channels=12")
ADDED = {
    *("iou", "iou_pooled", "boundary_f", "hd95", "hd95_median", "empty_predictions"),
    *("pixel_threshold", "seconds_per_refined_image"),
}


class Made(NamedTuple):
    """A model, labelled pictures, and pictures of both kinds."""

    model: Path
    labelled: Path
    good: Path
    bad: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("refine")
    plate = root / "plate"
    write_good(plate / "train" / "good", 24)
    write_good(plate / "test" / "good", 3, first_seed=100)
    for folder in ("test/scratch", "ground_truth/scratch"):
        (plate / folder).mkdir(parents=True)
    for i in range(3):
        pixels, mask = textured(200 + i), np.zeros((64, 64), np.uint8)
        mask[20 + i : 28 + i, 16:36] = 255
        pixels[mask > 0] = 255 - pixels[mask > 0]
        Image.fromarray(pixels).save(plate / "test" / "scratch" / f"{i}.png")
        Image.fromarray(mask).save(plate / "ground_truth" / "scratch" / f"{i}_mask.png")
    answer = fettle("fit", plate, "-o", root / "model", *PADIM, "--refine-refs", 6)
    assert answer.code == 0, answer.err
    return Made(root / "model", plate, plate / "test" / "good", plate / "test" / "scratch")


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "inspections.jsonl").open()]


def card(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["card"]
    return found


def inspect(made: Made, out: Path, *more: object) -> Answer:
    return fettle("inspect", made.model, made.good, made.bad, "-o", out, *more)


# --- inspect


def test_a_run_holds_the_refinement_of_each_picture(made: Made, tmp_path: Path) -> None:
    assert inspect(made, tmp_path / "plain").code == 0
    answer = inspect(made, tmp_path / "run", "--refine", "f2pad", "--contours", "coco,labelme,yolo,png")
    assert answer.code == 0, answer.err
    plain, refined = rows(tmp_path / "plain"), rows(tmp_path / "run")
    assert [(row["score"], row["verdict"]) for row in plain] == [
        (row["score"], row["verdict"]) for row in refined
    ]
    assert all(row["refinement"] is None and "refine" not in row["seconds"] for row in plain)
    for row, before in zip(refined, plain, strict=True):
        assert row["refinement"]["refiner"] == "f2pad"
        if row["verdict"] == "ok":
            assert row["refinement"]["gate_reason"] == "verdict_ok"
            assert "refine" not in row["seconds"] and row["regions"] == before["regions"]
        else:
            assert row["seconds"]["refine"] > 0
    assert {row["verdict"] for row in refined[:3]} == {"ok"}
    assert any(row["refinement"]["applied"] for row in refined[3:])
    told = card(tmp_path / "run")["refinement"]
    assert (told["name"], told["all"], told["facts_measured"], told["references"]) == (
        "f2pad", False, True, 6,
    )  # fmt: skip
    assert "refinement" not in card(tmp_path / "plain")
    with (tmp_path / "run" / "inspections.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [line["refined"] for line in cells] == [row["refinement"]["refined"] for row in refined]
    assert [bool(line["seconds_refine"]) for line in cells] == ["refine" in row["seconds"] for row in refined]
    assert fettle("report", tmp_path / "run").code == 0


def test_outlines_hold_the_area_of_the_regions(made: Made, tmp_path: Path) -> None:
    formats = "coco, labelme,yolo,png"
    assert inspect(made, tmp_path, "--refine", "difference", "--contours", formats).code == 0
    coco = json.loads((tmp_path / "contours" / "coco.json").read_text())
    found = rows(tmp_path)
    assert [image["file_name"] for image in coco["images"]] == [row["path"] for row in found]
    for number, row in enumerate(found, 1):
        areas = [one["area"] for one in coco["annotations"] if one["image_id"] == number]
        assert sorted(areas) == sorted(region["area_px"] for region in row["regions"])
    assert any(row["regions"] for row in found)
    total = 0
    for kind, suffix in (("labelme", ".json"), ("yolo", ".txt"), ("png", ".png")):
        written = sorted((tmp_path / "contours" / kind).iterdir())
        assert len(written) == 6 and {path.suffix for path in written} == {suffix}
        if kind == "png":
            total = sum(int((np.asarray(Image.open(path)) > 0).sum()) for path in written)
    assert total == sum(region["area_px"] for row in found for region in row["regions"])


def test_refine_all_takes_good_pictures_too(made: Made, tmp_path: Path) -> None:
    assert inspect(made, tmp_path, "--refine", "blur", "--refine-all").code == 0
    assert all(row["refinement"]["refined"] == "yes" for row in rows(tmp_path))
    assert card(tmp_path)["refinement"]["all"] is True


def test_a_setting_of_f2pad_reaches_it(made: Made, tmp_path: Path) -> None:
    more = ("--refine", "f2pad", "--refine-set", "max_roi_share=0.001", "--refine-set", "snap=off")
    assert inspect(made, tmp_path, *more).code == 0
    reasons = {row["refinement"]["gate_reason"] for row in rows(tmp_path)[3:]}
    assert reasons == {"roi_too_large"}
    settings = card(tmp_path)["refinement"]["settings"]
    assert (settings["max_roi_share"], settings["snap"]) == (0.001, "off")


def test_a_model_of_a_former_version_says_that_facts_are_stand_ins(made: Made, tmp_path: Path) -> None:
    stored = read_model(made.model)
    content = {name: value for name, value in stored.content.items() if name != "refine"}
    tensors = {name: state for name, state in stored.tensors.items() if name != "references"}
    write_model(tmp_path / "old", content, tensors)
    answer = fettle("inspect", tmp_path / "old", made.bad, "-o", tmp_path / "run", "--refine", "f2pad")
    assert answer.code == 0, answer.err
    told = card(tmp_path / "run")["refinement"]
    assert (told["facts_measured"], told["references"]) == (False, 0)
    assert {row["refinement"]["refined"] for row in rows(tmp_path / "run")}.isdisjoint({"error"})


def test_a_run_without_contours_removes_those_of_the_former(made: Made, tmp_path: Path) -> None:
    assert inspect(made, tmp_path, "--contours", "png").code == 0
    assert inspect(made, tmp_path).code == 0
    assert not list((tmp_path / "contours" / "png").iterdir())


# --- evaluate


def test_evaluate_measures_boundaries_with_any_refiner(made: Made) -> None:
    plain = fettle("evaluate", made.model, made.labelled, "--json").json
    assert ADDED.isdisjoint(plain)
    for name in ("none", "blur", "f2pad"):
        answer = fettle("evaluate", made.model, made.labelled, "--refine", name, "--json")
        assert answer.code == 0, answer.err
        found = answer.json
        assert set(found) - set(plain) == ADDED
        assert set(found["per_defect"]["scratch"]) > set(plain["per_defect"]["scratch"])
        for key in ("image_auroc", "frr_measured", "escape_rate", "num_good"):
            assert found[key] == plain[key]
        assert found["pixel_threshold"] > 0
        assert (found["seconds_per_refined_image"] is None) == (name == "none")
        assert (found["pixel_ap"] == plain["pixel_ap"]) == (name == "none")
        assert 0 <= found["boundary_f"] <= 1 and found["hd95"] >= 0


def test_evaluate_shows_boundaries_to_a_person(made: Made, tmp_path: Path) -> None:
    plain = fettle("evaluate", made.model, made.labelled).out
    answer = fettle("evaluate", made.model, made.labelled, "--refine", "guided", "-o", tmp_path)
    assert "IoU" in answer.out and "HD95" in answer.out and "IoU" not in plain
    assert card(tmp_path)["refinement"]["name"] == "guided"
    assert all(row["refinement"]["refiner"] == "guided" for row in rows(tmp_path))


def test_products_boundaries_are_averaged(tmp_path: Path) -> None:
    for number, name in enumerate(("cup", "nut")):
        write_product(tmp_path / "data" / name, number)
    data, model = tmp_path / "data", tmp_path / "model"
    more = (*TINY, "--method", "patchcore", "--set", "bank_rows=200", "--multi-class", "--refine-refs", 4)
    fitted = fettle("fit", data, "-o", model, *more)
    assert fitted.code == 0, fitted.err
    answer = fettle("evaluate", model, data, "--refine", "blur", "--refine-all", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    own = [found["per_product"][name] for name in ("cup", "nut")]
    assert set(own[0]) >= ADDED
    for key in ("iou", "boundary_f", "hd95", "seconds_per_refined_image"):
        assert found["mean"][key] == pytest.approx((own[0][key] + own[1][key]) / 2)
    assert found["pooled"]["iou"] is not None
    assert ADDED.isdisjoint(fettle("evaluate", model, data, "--json").json["mean"])


# --- wrong use


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--refine", "f2pat"), ("no refiner 'f2pat'", "f2pad")),
        (("--refine-all",), ("--refine-all, ", "Add --refine f2pad.")),
        (("--refine-set", "iters=3"), ("and --refine-set", "Add --refine f2pad.")),
        (("--refine", "none", "--refine-preset", "compact"), ("--refine-preset", "Add --refine f2pad.")),
        (("--refine", "f2pad", "--refine-preset", "compakt"), ("no preset", "compact")),
        (("--refine", "f2pad", "--refine-set", "iter=3"), ("no field 'iter'", "iters")),
        (("--refine", "f2pad", "--refine-set", "iters"), ("--refine-set iters has no '='",)),
        (("--refine", "f2pad", "--refine-set", "iters=-1"), ("'iters'", "cannot be -1")),
    ],
)
def test_wrong_use_is_one_sentence(
    command: str, more: tuple[str, ...], words: tuple[str, ...], made: Made, tmp_path: Path
) -> None:
    pictures = made.labelled if command == "evaluate" else made.good
    answer = fettle(command, made.model, pictures, "-o", tmp_path / "run", *more)
    assert answer.code == 2
    assert all(word in answer.sentence for word in words), answer.sentence
    assert not (tmp_path / "run").exists()


def test_an_unknown_format_of_contours_is_refused(made: Made, tmp_path: Path) -> None:
    answer = inspect(made, tmp_path / "run", "--contours", "coco,svg")
    assert answer.code == 2
    assert "--contours cannot be 'svg'" in answer.sentence
    assert not (tmp_path / "run").exists()
