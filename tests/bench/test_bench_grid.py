"""Cells, their records, and comparisons of them; and the cells of the study of AGPNet."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from fettle.bench import Cell, Difference, paired_difference, read_records, run_cells
from fettle.datasets.open import open_dataset
from fettle.datasets.records import Dataset
from fettle.detector import Detector
from fettle.fitting import make_request
from fettle.methods.registry import find_method, make_config
from fettle.protocols import Json

STUDY = Path(__file__).parents[2] / "benchmarks" / "agpnet.py"


def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_of_agpnet", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_found_after_a_fit_goes_into_the_record(labelled_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def after(detector: Detector, dataset: Dataset) -> dict[str, Json] | None:
        seen.append((detector.method.name, len(dataset.for_testing())))
        return {"pictures": detector.num_fit} if len(seen) == 1 else None

    fit: dict[str, Json] = {"backbone": "tiny", "weights": "random", "size": 64}
    fit["settings"] = {"bank_rows": 50}
    cells = [Cell("a", "plate", fit), Cell("b", "plate", fit)]
    run_cells(cells, lambda name: open_dataset(labelled_folder), tmp_path, after=after)
    records = read_records(tmp_path)
    assert records["a"]["extra"] == {"pictures": 24} and "extra" not in records["b"]
    assert seen == [("patchcore", 12)] * 2
    run_cells(cells, lambda name: open_dataset(labelled_folder), tmp_path, after=after)
    assert len(seen) == 2  # cells with a record are left alone


def test_paired_difference_by_hand() -> None:
    reference = {0: 0.5, 1: 0.6, 2: 0.7, 3: None}
    found = paired_difference({0: 0.6, 1: 0.7, 2: 0.6, 5: 0.9, 3: 0.8}, reference)
    assert found is not None
    assert found.mean == pytest.approx(1 / 30) and found.deviation == pytest.approx(0.11547, abs=1e-5)
    assert found.exceeds is False and str(found) == "+0.033 ± 0.115, within the spread"
    assert paired_difference({7: 0.1}, reference) is None
    alone = paired_difference({1: 0.5}, reference)
    assert alone is not None and alone.exceeds is None and str(alone) == "-0.100 (one seed)"


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (Difference(0.02, 0.01), "better"),
        (Difference(-0.02, 0.01), "worse"),
        (Difference(0.0, 0.0), "within the spread"),
    ],
)
def test_difference_is_called_by_its_spread(difference: Difference, word: str) -> None:
    assert str(difference).endswith(word)


def test_every_cell_of_the_study_can_be_asked_for() -> None:
    cells = list(study().cells())
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        request = make_request(cell.fit)
        assert len(cell.name.split("-")) == 4
        make_config(find_method(request.method), request.preset, request.settings)


def test_arms_of_the_ablation_differ_from_its_reference_in_one_field_each() -> None:
    ablation = [cell for cell in study().cells() if cell.name.startswith("ablation")]
    configs = {}
    for cell in ablation:
        request = make_request(cell.fit)
        config = make_config(find_method("agpnet"), request.preset, request.settings).model_dump()
        configs[cell.name.split("-")[2]] = config
    reference = configs.pop("attention")
    assert configs and {config["steps"] for config in configs.values()} == {reference["steps"]}
    for arm, config in configs.items():
        assert sum(config[name] != value for name, value in reference.items()) == 1, arm


def test_table_compares_arms_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = study()
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    for arm, aurocs in {"attention": (0.8, 0.9), "uniform": (0.7, 0.79)}.items():
        for seed, auroc in enumerate(aurocs):
            result = {"image_auroc": auroc, "pixel_auroc": 0.5, "pixel_ap": 0.25, "aupro": 0.5}
            record = {"result": result, "fit": {"steps": 7, "normalised_loss": 0.5}, "seconds_fit": 120}
            record["extra"] = {"identity_index": 2.0, "mask_correlation": None, "prior_correlation": 0.125}
            (tmp_path / f"ablation-screw-{arm}-{seed}.json").write_text(json.dumps(record))
    module.table()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| uniform")]
    assert lines == [
        "| uniform | 2 | 7 | 0.745 ± 0.064 | 0.500 | 0.250 | 0.500 | 0.500 | 2.000 | n/a | 0.125 "
        "| -0.105 ± 0.007, worse | +0.000 ± 0.000, within the spread | 2.0 |"
    ]
