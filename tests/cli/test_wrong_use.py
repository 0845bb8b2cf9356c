"""Wrong names and values: exit code 2, one sentence, and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, fettle, fit

from conftest import write_good


@pytest.mark.parametrize(
    ("option", "wrong", "words"),
    [
        ("--method", "patchcor", "There is no method 'patchcor'. Did you mean 'patchcore'?"),
        ("--preset", "compat", "has no preset 'compat'. Did you mean 'compact'?"),
        ("--backbone", "foo", "There is no backbone 'foo'. 'fettle doctor' lists"),
        ("--log-dir", "log", "Method 'patchcore' is not trained, so it has nothing to log."),
        ("--backbone", "resnet81", "There is no backbone 'resnet81'. Did you mean 'resnet18'?"),
        ("--frame", "sqare", "--frame cannot be 'sqare'. Did you mean 'square'?"),
        ("--calibration", "kfolds", "--calibration cannot be 'kfolds'. Did you mean 'kfold'?"),
        ("--set", "neighbors=3", "has no field 'neighbors'. Did you mean 'neighbours'?"),
        ("--set", "bank_rows=many", "Field 'bank_rows' of method 'patchcore' cannot be 'many'"),
        ("--set", "bank_rows", "--set bank_rows has no '='"),
        ("--size", "70", "Use --size 64"),
        ("--target-frr", "1.5", "--target-frr 1.5 is not between 0 and 1"),
        ("--target-frr", "0", "--target-frr 0 is not between 0 and 1"),
        ("--seed", "-1", "'seed' cannot be -1"),
        ("--roi", "0,0,1", "--roi 0,0,1 is not four numbers"),
        ("--roi", "0.5,0,0.5,1", "has no area"),
        ("--device", "gpu", "The device 'gpu' cannot be used here"),
        ("--group", "lot", "no column 'lot'"),
    ],
)
def test_fit_refuses_and_says_what_is_right(
    good_folder: Path, tmp_path: Path, option: str, wrong: str, words: str
) -> None:
    answer = fettle("fit", good_folder, "-o", tmp_path / "model", *TINY, option, wrong)
    assert answer.code == 2
    assert words in answer.sentence
    assert not (tmp_path / "model").exists()


def test_group_column_is_suggested_from_the_manifest(good_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,label,mask,split,product,tray\ngood/000.png,good,,train,,7\n")
    answer = fit(manifest, tmp_path / "model", "--group", "tary")
    assert answer.code == 2
    assert "no column 'tary' to group by. Did you mean 'tray'?" in answer.sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fti",), "Did you mean 'fit'?"),
        (("fit",), "Missing argument"),
        (("methods", "--jsn"), "--json"),
        (("data", "descripe", "x"), "Did you mean 'describe'?"),
        (("data", "parts", "-o", "parts", "--train", "many"), "valid integer"),
    ],
)
def test_wrong_words_end_with_two(arguments: tuple[str, ...], words: str) -> None:
    answer = fettle(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert words in " ".join(answer.err.split())


def test_product_is_suggested_where_it_is_evaluated(labelled_folder: Path, tmp_path: Path) -> None:
    fit(labelled_folder, tmp_path / "model")
    answer = fettle("evaluate", tmp_path / "model", labelled_folder, "--product", "palte")
    assert answer.code == 2
    assert "no test picture of product 'palte'. Did you mean 'plate'?" in answer.sentence


def test_product_is_suggested_where_it_is_rendered(tmp_path: Path) -> None:
    answer = fettle("data", "parts", "-o", tmp_path, "--products", "hexnut")
    assert answer.code == 2
    assert "There is no product 'hexnut'. Did you mean 'hex_nut'?" in answer.sentence


def test_layout_is_suggested(good_folder: Path) -> None:
    answer = fettle("data", "describe", good_folder, "--layout", "mvtech")
    assert answer.code == 2
    assert "Did you mean 'mvtec'?" in answer.sentence


def test_rates_are_checked_where_thresholds_are_set_anew(good_folder: Path, tmp_path: Path) -> None:
    fit(good_folder, tmp_path / "model")
    fresh = write_good(tmp_path / "fresh", 4, first_seed=50)
    answer = fettle("calibrate", tmp_path / "model", fresh, "-o", tmp_path / "model2", "--target-frr", "0")
    assert answer.code == 2
    assert "--target-frr 0 is not between 0 and 1" in answer.sentence


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--mm-per-pixel", "-1", "not positive"), ("--min-area", "0", "greater than or equal to 1")],
)
def test_inspect_refuses_impossible_measures(
    good_folder: Path, tmp_path: Path, option: str, value: str, words: str
) -> None:
    fit(good_folder, tmp_path / "model")
    answer = fettle("inspect", tmp_path / "model", good_folder, "-o", tmp_path / "run", option, value)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err
