"""Each command does its job: the JSON keys that scripts rely on, exit codes, and pure standard output."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import TINY, fettle, fit
from PIL import Image

from conftest import textured, write_good
from fettle.backbones import registry

FIT_KEYS = {
    "model",
    "method",
    "shots",
    "num_fit",
    "num_calibration",
    "frr_promised",
    "promise_on",
    "needed",
    "seconds",
}
EVALUATE_KEYS = {
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
    "aupro_005",
    "frr_promised",
    "frr_measured",
    "escape_rate",
    "num_good",
    "num_defective",
    "seconds_per_image",
    "per_defect",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt from 24 good pictures, the ones of `good_folder`."""
    folder = tmp_path_factory.mktemp("fitted")
    assert fit(write_good(folder / "good", 24), folder / "model").code == 0
    return folder / "model"


def test_the_command_line_imports_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "scipy", "PIL", "pydantic", "timm", "pyarrow", "jinja2", "faiss")
    code = f"import sys, fettle.cli.main; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    answer = fettle("--help")
    assert answer.code == 0
    commands = ("fit", "calibrate", "inspect", "evaluate", "report", "methods", "data", "demo", "doctor")
    assert all(name in answer.out for name in commands)


@pytest.mark.parametrize(
    ("method", "size"), [("patchcore", "bank_rows=200"), ("padim", "channels=20")], ids=["patchcore", "padim"]
)
def test_fit_reports_what_it_learnt_and_promises(
    good_folder: Path, tmp_path: Path, method: str, size: str
) -> None:
    options = ("--method", method, "--set", size, "--json")
    answer = fettle("fit", good_folder, "-o", tmp_path / "model", *TINY, *options)
    assert answer.code == 0
    assert set(answer.json) == FIT_KEYS
    assert (answer.json["method"], answer.json["num_fit"], answer.json["num_calibration"]) == (method, 24, 24)
    # 24 good pictures carry 5 % on review; 1 % on reject would need 99
    assert (answer.json["promise_on"], answer.json["needed"]) == ("review", 99)
    assert 0 < answer.json["frr_promised"] <= 0.05
    assert Path(answer.json["model"], "manifest.json").is_file()


def test_fit_in_words_goes_to_standard_output_and_progress_does_not(
    good_folder: Path, tmp_path: Path
) -> None:
    answer = fit(good_folder, tmp_path / "model")
    assert answer.code == 0
    assert "24 learnt from, 24 calibrated on" in answer.out and "needs 99" in answer.out
    assert "memory bank" in answer.err and "memory bank" not in answer.out


def test_fit_takes_every_option(good_folder: Path, tmp_path: Path) -> None:
    method = ("--method", "padim", "--preset", "paper", "--set", "channels=20", "--seed", 7)
    region = ("--frame", "pad", "--roi", "0,0,1,0.5", "--roi-mask", tmp_path / "mask.png")
    promise = ("--target-frr", 0.1, "--calibration", "kfold")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    answer = fettle("fit", good_folder, "-o", tmp_path / "model", *TINY, *method, *region, *promise, "--json")
    assert answer.code == 0
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["config"]["channels"] == 20
    assert manifest["frame"]["mode"] == "pad"
    assert manifest["frame"]["roi"] == [0, 0, 1, 0.5]
    assert manifest["calibration"]["mode"] == "kfold"
    assert manifest["calibration"]["alpha_reject"] == 0.1
    assert (manifest["card"]["seed"], manifest["card"]["preset"]) == (7, "paper")


def test_fit_twice_replaces_the_model(good_folder: Path, tmp_path: Path) -> None:
    first = fit(good_folder, tmp_path / "model", "--set", "bank_rows=50")
    second = fit(good_folder, tmp_path / "model", "--set", "bank_rows=60")
    assert (first.code, second.code) == (0, 0)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["config"]["bank_rows"] == 60


def test_fit_of_a_labelled_layout_takes_its_good_training_part(labelled_folder: Path, tmp_path: Path) -> None:
    assert fit(labelled_folder, tmp_path / "model", "--json").json["num_fit"] == 24


def test_fit_of_a_manifest_counts_groups(good_folder: Path, tmp_path: Path) -> None:
    rows = [f"good/{i:03d}.png,good,,train,plate,{i // 2}" for i in range(24)]
    manifest = tmp_path / "parts.csv"
    manifest.write_text("\n".join(["path,label,mask,split,product,part", *rows]))
    answer = fit(manifest, tmp_path / "model", "--group", "part", "--json")
    assert (answer.json["num_fit"], answer.json["num_calibration"]) == (24, 12)
    said = fit(manifest, tmp_path / "model", "--group", "part")
    assert "24 learnt from, 24 calibrated on, in 12 groups" in said.out

    fresh = write_good(tmp_path / "fresh", 20, first_seed=500)
    rows = [f"fresh/{path.name},good,,train,plate,{i // 5}" for i, path in enumerate(sorted(fresh.iterdir()))]
    again = tmp_path / "fresh.csv"
    again.write_text("\n".join(["path,label,mask,split,product,tray", *rows]))
    for more, number in (((), 20), (("--group", "tray"), 4)):
        moved = fettle("calibrate", tmp_path / "model", again, "-o", tmp_path / "moved", *more, "--json")
        assert moved.json["num_calibration"] == number
        assert ("fitted by 'part', which these pictures lack" in moved.err) is (not more)


def test_strict_fails_where_the_promise_cannot_be_made(good_folder: Path, tmp_path: Path) -> None:
    answer = fit(good_folder, tmp_path / "model", "--strict")
    assert answer.code == 1
    assert "99" in answer.sentence
    assert not (tmp_path / "model").exists()


def test_calibrate_keeps_what_was_learnt(model: Path, tmp_path: Path) -> None:
    fresh = write_good(tmp_path / "fresh", 20, first_seed=500)
    answer = fettle("calibrate", model, fresh, "-o", tmp_path / "model2", "--target-frr", "0.1", "--json")
    assert answer.code == 0
    assert set(answer.json) == FIT_KEYS - {"num_fit", "shots"}
    assert (answer.json["num_calibration"], answer.json["promise_on"]) == (20, "reject")
    old, new = (json.loads((p / "manifest.json").read_text()) for p in (model, tmp_path / "model2"))
    assert old["files"] == new["files"]
    assert old["calibration"] != new["calibration"]


def test_calibrate_says_what_it_promises(model: Path, tmp_path: Path) -> None:
    fresh = write_good(tmp_path / "fresh", 20, first_seed=500)
    answer = fettle("calibrate", model, fresh, "-o", tmp_path / "model2")
    assert answer.code == 0
    assert "20 good pictures" in answer.out


def test_inspect_writes_the_same_rows_three_times(model: Path, labelled_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = fettle("inspect", model, labelled_folder / "test", "-o", out, "--product", "plate", "--json")
    assert answer.code == 0
    assert set(answer.json) == {"pictures", "ok", "review", "reject", "refused", "out"}
    counts = answer.json
    assert counts["pictures"] == 12 == counts["ok"] + counts["review"] + counts["reject"]
    assert (counts["refused"], counts["out"]) == (0, str(out))
    rows = [json.loads(line) for line in (out / "inspections.jsonl").read_text().splitlines()]
    cells = list(csv.DictReader((out / "inspections.csv").open(newline="")))
    table = pq.read_table(out / "inspections.parquet").to_pylist()
    assert [r["path"] for r in rows] == [r["path"] for r in cells] == [r["path"] for r in table]
    assert {row["product"] for row in rows} == {"plate"}
    assert not (out / "overlays").exists()


def test_inspect_says_when_too_many_are_not_ok(model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    for i in range(20):
        Image.fromarray(255 - textured(500 + i) // 3).save(strange / f"{i}.png")
    answer = fettle("inspect", model, strange, "-o", tmp_path / "run", "--json")
    assert answer.json["ok"] == 0
    assert answer.err.count("pictures are not ok") == 1 and "fettle calibrate" in answer.err
    good = fettle(
        "inspect", model, write_good(tmp_path / "good", 20, first_seed=900), "-o", tmp_path / "run2"
    )
    assert "pictures are not ok" not in good.err


def test_inspect_takes_pictures_folders_and_manifests(
    model: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    manifest = labelled_folder / "list.csv"
    manifest.write_text("path,label,mask,split,product\ntest/good/000.png,good,,test,\n")
    picture = labelled_folder / "test" / "scratch" / "003.png"
    paths = (manifest, picture, labelled_folder / "test" / "good")
    answer = fettle("inspect", model, *paths, "-o", tmp_path / "run", "--json")
    assert (answer.code, answer.json["pictures"]) == (0, 1 + 1 + 6)


def test_overlays_are_as_large_as_the_pictures(model: Path, labelled_folder: Path, tmp_path: Path) -> None:
    pictures = labelled_folder / "test" / "scratch"
    assert fettle("inspect", model, pictures, "-o", tmp_path / "run", "--overlays").code == 0
    overlays = sorted((tmp_path / "run" / "overlays").iterdir())
    assert len(overlays) == 6
    assert Image.open(overlays[0]).size == (64, 64)


def test_pictures_that_a_run_drew_are_nobodys_parts(
    model: Path, good_folder: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    drawing = ("--overlays", "--contours", "png")
    for _ in range(2):  # among the pictures that it inspects
        run = fettle("inspect", model, good_folder, "-o", good_folder / "run", *drawing, "--json")
        assert run.code == 0 and run.json["pictures"] == 24
    assert fettle("inspect", model, good_folder, "-o", tmp_path / "other", "--json").json["pictures"] == 24
    assert fit(good_folder, tmp_path / "again", "--json").json["num_fit"] == 24
    defects = labelled_folder / "test" / "scratch"
    before = fettle("evaluate", model, labelled_folder, "--json").json["num_defective"]
    assert fettle("inspect", model, defects, "-o", defects / "run", *drawing).code == 0
    assert fettle("evaluate", model, labelled_folder, "--json").json["num_defective"] == before
    (good_folder / "run" / "run.json").write_text('{"format": "of another program"}')
    assert fettle("data", "describe", good_folder, "--json").json["counts"][0]["pictures"] > 24


def test_evaluate_measures_everything(model: Path, labelled_folder: Path) -> None:
    answer = fettle("evaluate", model, labelled_folder, "--json")
    assert answer.code == 0
    result = answer.json
    assert set(result) >= EVALUATE_KEYS
    assert (result["num_good"], result["num_defective"], result["num_refused"]) == (6, 6, 0)
    ratios = EVALUATE_KEYS - {"num_good", "num_defective", "seconds_per_image", "per_defect"}
    assert all(0 <= result[name] <= 1 for name in ratios)
    assert set(result["per_defect"]) == {"scratch"}
    assert result["per_defect"]["scratch"]["num_defective"] == 6


def test_every_key_of_an_evaluation_is_explained(model: Path, labelled_folder: Path) -> None:
    found = fettle("evaluate", model, labelled_folder, "--refine", "none", "--json").json
    words = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    keys = {*found, *found["metric_state"], *found["per_defect"]["scratch"], "per_product", "mean", "pooled"}
    assert {key for key in keys if f"`{key}`" not in words} == set()


def test_every_key_that_a_script_may_read_is_explained(
    model: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    words = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text(encoding="utf-8")
    run = fettle(
        *("inspect", model, labelled_folder / "test" / "scratch", "-o", tmp_path / "run"),
        *("--refine", "blur", "--mm-per-pixel", "0.1", "--json"),
    ).json
    fresh = labelled_folder / "test" / "good"
    calibrated = fettle("calibrate", model, fresh, "-o", tmp_path / "again", "--json").json
    row = json.loads((tmp_path / "run" / "inspections.jsonl").read_text().splitlines()[0])
    header = (tmp_path / "run" / "inspections.csv").read_text().splitlines()[0].split(",")
    columns = {name for name in header if not name.startswith("seconds_")}
    method = fettle("methods", "--json").json[0]
    keys = {*FIT_KEYS, *run, *calibrated, *row, *row["regions"][0], *row["seconds"], *columns, *method}
    assert "refine" in keys and "area_mm2" in keys
    assert {key for key in keys if f"`{key}`" not in words} == set()


def test_evaluate_writes_a_run_folder_with_its_metrics(
    model: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    answer = fettle("evaluate", model, labelled_folder, "-o", tmp_path / "run", "--json")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["complete"] is True
    assert run["metrics"]["image_auroc"] == answer.json["image_auroc"]
    truths = [json.loads(line)["truth"] for line in (tmp_path / "run" / "inspections.jsonl").open()]
    assert sorted(truths) == ["good"] * 6 + ["scratch"] * 6


def test_evaluate_prints_a_table_with_each_defect_by_its_name(model: Path, labelled_folder: Path) -> None:
    answer = fettle("evaluate", model, labelled_folder)
    header, everything, scratch, rate = answer.out.splitlines()
    assert "image AUROC" in header and "AUPRO 0.05" in header
    assert everything.split()[:2] == ["all", "6"] and scratch.split()[:2] == ["scratch", "6"]
    assert rate.startswith("False-reject rate (good parts judged not ok): promised at most 0.0")


def test_evaluate_takes_one_product_of_a_manifest(model: Path, labelled_folder: Path) -> None:
    rows = [
        f"test/{label}/{i:03d}.png,{label},,test,{product}"
        for product, first in (("left", 0), ("right", 2))
        for i in range(first, first + 2)
        for label in ("good", "scratch")
    ]
    manifest = labelled_folder / "list.csv"
    manifest.write_text("\n".join(["path,label,mask,split,product", *rows]))
    answer = fettle("evaluate", model, manifest, "--product", "left", "--json")
    assert (answer.json["num_good"], answer.json["num_defective"]) == (2, 2)


def test_report_prints_the_page_that_it_wrote(model: Path, labelled_folder: Path, tmp_path: Path) -> None:
    fettle("evaluate", model, labelled_folder, "-o", tmp_path / "run")
    answer = fettle("report", tmp_path / "run")
    assert answer.code == 0
    page = Path(answer.out.strip())
    assert page == tmp_path / "run" / "report.html"
    assert "scratch" in page.read_text(encoding="utf-8")


def test_methods_are_listed_with_their_names() -> None:
    assert {"patchcore", "padim"} <= {method["name"] for method in fettle("methods", "--json").json}
    assert "patchcore" in fettle("methods").out


def test_data_parts_writes_a_layout_that_data_describe_counts(tmp_path: Path) -> None:
    counts = ("--train", 2, "--test-good", 1, "--defects", 1, "--size", 64, "--seed", 3)
    answer = fettle("data", "parts", "-o", tmp_path, "--products", "hex_nut", *counts, "--json")
    assert answer.code == 0
    assert answer.json["products"] == ["hex_nut"]
    found = fettle("data", "describe", tmp_path / "hex_nut", "--json")
    assert found.code == 0
    assert sum(count["pictures"] for count in found.json["counts"]) == answer.json["pictures"]
    assert "hex_nut train good: 2" in fettle("data", "describe", tmp_path / "hex_nut").out


def test_doctor_says_where_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "backbone_names", lambda: ("tf_efficientnet_lite2",))  # one to hash
    assert "tf_efficientnet_lite2" in fettle("doctor").out
    facts = fettle("doctor", "--json").json
    assert set(facts) >= {"fettle", "python", "torch", "devices", "weights"}


def test_python_m_fettle_is_the_same_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "fettle", "methods", "--json"], capture_output=True, text=True, check=True
    )
    assert [method["name"] for method in json.loads(answer.stdout)] == [
        "agpnet",
        "cflow",
        "fpfnet",
        "padim",
        "patchcore",
        "tfanet",
        "uniad",
    ]


def test_a_saved_model_says_the_same_as_a_fresh_fit(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "part.png"
    Image.fromarray(textured(900)).save(picture)
    again = write_good(tmp_path / "good", 24)
    assert fit(again, tmp_path / "model").code == 0
    scores = []
    for folder in (model, tmp_path / "model"):
        fettle("inspect", folder, picture, "-o", tmp_path / "run")
        scores.append(json.loads((tmp_path / "run" / "inspections.jsonl").read_text())["score"])
    assert scores[0] == scores[1]
