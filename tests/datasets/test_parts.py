"""The procedural parts: exact masks, repeatable pictures, the MVTec AD layout, no trivial solution."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import rankdata

from fettle.datasets.parts import PRODUCTS, contact_sheet, defects_of, render, write_parts
from fettle.datasets.parts.canvas import Canvas, Draw, coverage, noise
from fettle.datasets.parts.defects import SURFACE_DEFECTS
from fettle.datasets.parts.render import _CATALOGUE
from fettle.datasets.parts.shapes import circle, stroke
from fettle.errors import DataError, UsageError

CASES = [(product, defect) for product in PRODUCTS for defect in defects_of(product)]


def change(product: str, defect: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest change over the channels (H, W) that a defect makes, and its mask."""
    good = render(product, seed=5, index=index, size=size)
    bad = render(product, seed=5, index=index, size=size, defect=defect)
    return np.abs(bad.pixels.astype(int) - good.pixels.astype(int)).max(axis=2), bad.mask


def test_there_are_enough_products_and_defect_kinds() -> None:
    assert len(PRODUCTS) >= 6
    assert len({defect for _, defect in CASES}) >= 8


@pytest.mark.parametrize(("product", "defect"), CASES)
def test_a_defect_changes_nothing_outside_its_mask_and_shows_inside(product: str, defect: str) -> None:
    for index in range(3):
        changed, mask = change(product, defect, index, 128)
        assert changed[mask == 0].max() == 0
        assert (mask > 127).sum() >= 4
        assert changed[mask > 127].mean() > 3


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_good_part_has_an_empty_mask(product: str) -> None:
    assert not render(product, seed=0, index=0, size=64).mask.any()


@pytest.mark.parametrize(("product", "defect"), CASES)
def test_masks_are_anti_aliased(product: str, defect: str) -> None:
    mask = render(product, seed=1, index=0, size=128, defect=defect).mask
    assert ((mask > 20) & (mask < 235)).any()


def test_coverage_gives_the_true_area_of_a_disc() -> None:
    canvas = Canvas(64)
    disc = coverage(circle(canvas.x + 0 * canvas.y, canvas.y + 0 * canvas.x, 0.3, (0.013, -0.2)), canvas.px)
    assert disc.sum() * canvas.px**2 == pytest.approx(np.pi * 0.3**2, rel=2e-3)


def test_coverage_gives_the_true_area_of_a_capsule() -> None:
    canvas = Canvas(64)
    line = np.array([[-0.4, -0.3], [0.2, 0.5]])  # 1 long
    area = coverage(stroke(canvas, line, 0.1), canvas.px).sum() * canvas.px**2
    assert area == pytest.approx(1.0 * 0.2 + np.pi * 0.1**2, rel=5e-3)


@pytest.mark.parametrize("product", ["brushed_plate", "wooden_board"])
def test_a_part_looks_the_same_at_every_size(product: str) -> None:
    for defect in ("hole", "dent"):
        small, large = (render(product, seed=2, index=0, size=s, defect=defect).mask for s in (128, 384))
        shrunk = large.reshape(128, 3, 128, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small).mean() < 0.15 * small.mean()


def test_some_defects_are_faint_and_some_plain() -> None:
    shown = []
    for product, defect in CASES:
        if defect in SURFACE_DEFECTS:
            changed, mask = change(product, defect, 7, 96)
            shown.append(changed[mask > 127].mean())
    assert np.mean(np.array(shown) < 14) > 0.1
    assert np.mean(np.array(shown) > 40) > 0.2


def test_a_picture_repeats_and_depends_on_its_own_number_only() -> None:
    first = render("hex_nut", seed=3, index=4, size=64, defect="dent")
    render("hex_nut", seed=3, index=9, size=64)
    again = render("hex_nut", seed=3, index=4, size=64, defect="dent")
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.mask, again.mask)


@pytest.mark.parametrize("other", [{"seed": 4}, {"index": 1}, {"stream": "train/good"}])
def test_seed_index_and_stream_each_give_another_picture(other: dict[str, int | str]) -> None:
    asked: dict[str, int | str] = {"seed": 3, "index": 0, "stream": "test/good"}
    one = render("bottle_cap", size=64, **asked)  # type: ignore[arg-type]  # one dict for three types
    two = render("bottle_cap", size=64, **(asked | other))  # type: ignore[arg-type]
    assert np.mean(one.pixels != two.pixels) > 0.5


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_field_stays_float32(product: str) -> None:
    """float64 slips in through NumPy scalars, costs time, and rounds a faulty part unlike its sound twin."""
    entry, canvas, draw = _CATALOGUE[product], Canvas(64), Draw("types")
    scenes = [entry.build(canvas, draw, fault) for fault in (None, *entry.faults)]
    surfaces = [scene.surface for scene in scenes]
    surfaces += [SURFACE_DEFECTS[d](scenes[0], canvas, draw(d), entry.look)[0] for d in entry.surface_defects]
    for s in surfaces:
        assert {a.dtype for a in (s.albedo, s.height, s.gloss, s.metal, s.exposed)} == {np.dtype(np.float32)}


def test_noise_has_unit_variance() -> None:
    field = noise(np.random.default_rng(0), 256, 64, 256)
    assert field.std() == pytest.approx(1, abs=0.03)


def test_sensor_noise_differs_between_pictures_and_is_there() -> None:
    pixels = render("woven_fabric", seed=0, index=0, size=64).pixels.astype(int)
    plate = render("brushed_plate", seed=0, index=0, size=256).pixels[:20, :20, 1].astype(float)
    assert 0.5 < np.abs(np.diff(plate, axis=0)).mean() < 12
    assert np.abs(pixels - render("woven_fabric", seed=0, index=1, size=64).pixels).mean() > 1


def test_trivial_scores_do_not_tell_good_from_defective() -> None:
    aurocs: dict[str, list[float]] = {"brightness": [], "contrast": []}
    for product in PRODUCTS:
        good = [render(product, seed=0, index=i, size=64, stream="good").pixels for i in range(24)]
        bad = [
            render(product, seed=0, index=i, size=64, defect=defect, stream=defect).pixels
            for defect in defects_of(product)
            for i in range(4)
        ]
        for name, scores in {
            "brightness": [p.mean() for p in good + bad],
            "contrast": [p.mean(axis=2).std() for p in good + bad],
        }.items():
            ranks = rankdata(scores)[len(good) :]
            aurocs[name].append((ranks.sum() - len(bad) * (len(bad) + 1) / 2) / (len(good) * len(bad)))
    for name, values in aurocs.items():
        assert abs(np.mean(values) - 0.5) < 0.1, name


def test_written_set_has_the_mvtec_layout(tmp_path: Path) -> None:
    summary = write_parts(tmp_path, products=["spur_gear"], train=3, test_good=2, defects=2, size=64)
    root = tmp_path / "spur_gear"
    found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    expected = {f"train/good/{i:03d}.png" for i in range(3)} | {f"test/good/{i:03d}.png" for i in range(2)}
    for defect in defects_of("spur_gear"):
        for i in range(2):
            expected |= {f"test/{defect}/{i:03d}.png", f"ground_truth/{defect}/{i:03d}_mask.png"}
    assert found == expected
    assert (summary.train, summary.test_good, summary.test_defective) == (
        3,
        2,
        2 * len(defects_of("spur_gear")),
    )
    assert summary.pictures == sum("_mask" not in name for name in found)


def test_written_files_are_what_render_gives(tmp_path: Path) -> None:
    write_parts(tmp_path, products=["bottle_cap"], train=1, test_good=1, defects=1, size=64, seed=9)
    shown = render("bottle_cap", seed=9, index=0, size=64, defect="crack", stream="test/crack")
    picture = Image.open(tmp_path / "bottle_cap/test/crack/000.png")
    mask = Image.open(tmp_path / "bottle_cap/ground_truth/crack/000_mask.png")
    assert (picture.mode, mask.mode) == ("RGB", "L")
    assert np.array_equal(np.asarray(picture), shown.pixels)
    assert np.array_equal(np.asarray(mask), shown.mask)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_bytes_do_not_depend_on_workers_products_or_counts(tmp_path: Path) -> None:
    write_parts(tmp_path / "a", products=["hex_nut"], train=2, test_good=1, defects=1, size=64, workers=1)
    write_parts(
        tmp_path / "b",
        products=["woven_fabric", "hex_nut"],
        train=3,
        test_good=2,
        defects=2,
        size=64,
        workers=3,
    )
    small, large = files(tmp_path / "a"), files(tmp_path / "b")
    assert small.items() <= large.items()


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    asked = {"train": 1, "test_good": 1, "defects": 1, "size": 64}
    write_parts(tmp_path, products=["pill_blister"], **asked)
    first = files(tmp_path)
    write_parts(tmp_path, products=["pill_blister"], **asked)
    assert files(tmp_path) == first


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = write_parts(
        tmp_path,
        products=["hex_nut"],
        train=2,
        test_good=1,
        defects=1,
        size=64,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, summary.pictures) for i in range(summary.pictures)]


def test_a_failed_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_parts(tmp_path, products=["hex_nut"], train=2, test_good=1, defects=1, size=64)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"products": ["hex_nuts"]}, "'hex_nuts'.*Did you mean 'hex_nut'"),
        ({"products": []}, "'products' is 0"),
        ({"train": 0}, "'train' is 0"),
        ({"test_good": -1}, "'test_good' is -1"),
        ({"defects": 0}, "'defects' is 0"),
        ({"workers": 0}, "'workers' is 0"),
        ({"size": 63}, "63 px"),
        ({"size": 2049}, "2049 px"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, asked: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        write_parts(tmp_path / "out", **asked)  # type: ignore[arg-type]  # wrong on purpose
    assert not (tmp_path / "out").exists()


def test_an_unknown_defect_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no defect 'scrach'\. Did you mean 'scratch'"):
        render("hex_nut", seed=0, index=0, defect="scrach")


def test_a_folder_with_other_pictures_is_refused(tmp_path: Path) -> None:
    asked = {"products": ["hex_nut"], "test_good": 1, "defects": 1, "size": 64}
    write_parts(tmp_path, train=3, **asked)  # type: ignore[arg-type]  # one dict for several types
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"002\.png is there already"):
        write_parts(tmp_path, train=2, seed=1, **asked)  # type: ignore[arg-type]
    assert files(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        write_parts(tmp_path / "out", products=["hex_nut"], train=1, test_good=1, defects=1, size=64)


def test_contact_sheet_shows_every_defect() -> None:
    sheet = contact_sheet(["hex_nut", "spur_gear"], size=64)
    columns = 1 + max(len(defects_of("hex_nut")), len(defects_of("spur_gear")))
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] >= columns * 64
    assert sheet.shape[0] >= 2 * 2 * 64


def test_importing_the_renderer_imports_no_torch() -> None:
    code = "import sys, fettle.datasets.parts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
