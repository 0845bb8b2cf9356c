"""Layouts: every picture gets the right label, mask, split and product, and splits never leak."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fettle.datasets import Dataset, Record, open_dataset
from fettle.datasets.magnetic_tile import neighbour_groups
from fettle.datasets.picture_list import list_pictures
from fettle.datasets.splits import folds, group_column, groups, hold_out
from fettle.errors import DataError, UsageError

RNG = np.random.default_rng(0)


def draw(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def by_name(dataset: Dataset) -> dict[str, Record]:
    return {record.path.name: record for record in dataset.records}


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A product in the layout of MVTec AD."""
    root = tmp_path / "nut"
    for name in ("train/good/0.png", "train/good/1.png", "test/good/2.png"):
        draw(root / name)
    for name in ("1", "10", "2"):
        draw(root / f"test/dent/{name}.png")
    draw(root / "ground_truth/dent/10_mask.png")
    draw(root / "ground_truth/dent/2.png")
    return root


class TestFolder:
    def test_every_picture_at_any_depth_is_good(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.JPG", "deep/er/c.tif", "d.webp", "e.bmp"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        dataset = open_dataset(tmp_path)
        assert dataset.layout == "folder"
        assert [r.path.name for r in dataset.records] == ["a.JPG", "b.png", "d.webp", "c.tif", "e.bmp"]
        assert all(r.is_good and r.split == "" and r.mask is None for r in dataset.records)

    def test_hidden_files_and_other_files_are_passed_over(self, tmp_path: Path) -> None:
        for name in ("a.png", ".b.png", "notes.txt", "png", ".cache/c.png", "d.png.bak"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert [r.path.name for r in open_dataset(tmp_path).records] == ["a.png"]

    def test_a_link_in_a_circle_ends(self, tmp_path: Path) -> None:
        draw(tmp_path / "in/a.png")
        (tmp_path / "in/again").symlink_to(tmp_path)
        assert [r.path.name for r in open_dataset(tmp_path).records] == ["a.png"]

    def test_a_linked_folder_is_followed(self, tmp_path: Path) -> None:
        draw(tmp_path / "elsewhere/a.png")
        (tmp_path / "set").mkdir()
        (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
        assert len(open_dataset(tmp_path / "set").records) == 1


class TestMvtec:
    def test_splits_labels_and_product(self, product: Path) -> None:
        dataset = open_dataset(product)
        assert dataset.layout == "mvtec"
        assert Counter((r.split, r.defect) for r in dataset.records) == {
            ("train", "good"): 2,
            ("test", "good"): 1,
            ("test", "dent"): 3,
        }
        assert {r.product for r in dataset.records} == {"nut"}
        assert [r.path for r in dataset.records] == sorted(r.path for r in dataset.records)

    def test_a_mask_is_matched_by_its_exact_name(self, product: Path) -> None:
        masks = {r.path.stem: r.mask for r in open_dataset(product).records if not r.is_good}
        assert masks["1"] is None  # never 10_mask.png
        assert masks["10"] == product / "ground_truth/dent/10_mask.png"
        assert masks["2"] == product / "ground_truth/dent/2.png"

    def test_a_picture_named_like_a_mask_does_not_take_it(self, product: Path) -> None:
        draw(product / "test/dent/10_mask.png")
        masks = {r.path.stem: r.mask for r in open_dataset(product).records if not r.is_good}
        assert masks["10"] == product / "ground_truth/dent/10_mask.png" and masks["10_mask"] is None

    def test_masks_of_another_defect_are_not_taken(self, product: Path) -> None:
        draw(product / "ground_truth/rust/1_mask.png")
        assert by_name(open_dataset(product))["1.png"].mask is None

    def test_the_test_part_is_no_folder_of_good_pictures(self, product: Path) -> None:
        with pytest.raises(DataError, match=r"is the test part of 'nut'.*test/good"):
            open_dataset(product / "test")
        assert open_dataset(product / "test" / "good").layout == "folder"

    def test_masks_are_not_among_the_pictures_of_a_folder(self, product: Path) -> None:
        pictures = list_pictures([product])
        assert sorted(pictures) == sorted(record.path for record in open_dataset(product).records)
        assert list_pictures([product.parent]) == pictures
        assert list_pictures([product / "ground_truth"])

    def test_training_alone_is_enough(self, tmp_path: Path) -> None:
        draw(tmp_path / "train/good/0.png")
        assert open_dataset(tmp_path).layout == "mvtec"

    def test_the_product_is_named_from_a_relative_path_too(
        self, product: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(product)
        assert {r.product for r in open_dataset(".").records} == {"nut"}

    def test_defects_in_training_are_refused(self, product: Path) -> None:
        draw(product / "train/dent/0.png")
        with pytest.raises(DataError, match=r"train' holds 'dent'.*Move it to 'test/dent'"):
            open_dataset(product)

    def test_pictures_without_a_label_are_refused(self, product: Path) -> None:
        draw(product / "test/0.png")
        with pytest.raises(DataError, match=r"1 pictures stand directly in .*test/DEFECT"):
            open_dataset(product)


class TestMagneticTile:
    @pytest.fixture
    def tiles(self, tmp_path: Path) -> Path:
        root = tmp_path / "tiles"
        for number in range(1000, 31_000, 1000):
            for exposure in (1, 2):
                draw(root / f"MT_Free/Imgs/exp{exposure}_num_{number + 10 * exposure}.jpg")
                draw(root / f"MT_Free/Imgs/exp{exposure}_num_{number + 10 * exposure}.png")
        for number in (1100, 90_000):
            draw(root / f"MT_Crack/Imgs/exp1_num_{number}.jpg")
        draw(root / "MT_Crack/Imgs/exp1_num_1100.png")
        return root

    def test_masks_are_not_among_the_pictures_of_a_folder(self, tiles: Path) -> None:
        assert list_pictures([tiles]) == [record.path for record in open_dataset(tiles).records]

    def test_labels_and_masks(self, tiles: Path) -> None:
        dataset = open_dataset(tiles)
        assert dataset.layout == "magnetic_tile"
        assert Counter(r.defect for r in dataset.records) == {"good": 60, "crack": 2}
        cracks = {r.path.name: r.mask for r in dataset.records if not r.is_good}
        assert cracks["exp1_num_1100.jpg"] == tiles / "MT_Crack/Imgs/exp1_num_1100.png"
        assert cracks["exp1_num_90000.jpg"] is None
        assert all(r.mask is None for r in dataset.records if r.is_good)

    def test_exposures_of_a_tile_stay_together_and_near_defects_are_tested(self, tiles: Path) -> None:
        dataset = open_dataset(tiles)
        sides: dict[str, set[str]] = defaultdict(set)
        for record in dataset.records:
            sides[record.columns["group"]].add(record.split)
        assert all(len(side) == 1 for side in sides.values())
        assert all(r.split == "test" for r in dataset.records if not r.is_good)
        assert by_name(dataset)["exp1_num_1010.jpg"].split == "test"  # beside the crack 1100
        assert Counter(r.split for r in dataset.records if r.is_good) == {"train": 40, "test": 20}
        assert group_column(dataset) == "group"

    def test_groups_chain_neighbouring_numbers(self) -> None:
        names = ["exp1_num_100", "exp4_num_900", "exp2_num_500", "exp2_num_1500", "other", "other2"]
        found = neighbour_groups(names)
        assert found[0] == found[1] == found[2]
        assert len(set(found)) == 4

    def test_a_png_alone_is_no_picture(self, tiles: Path) -> None:
        draw(tiles / "MT_Crack/Imgs/exp1_num_5.png")
        assert "exp1_num_5.png" not in by_name(open_dataset(tiles))


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a.png", "b.png", "masks/b.png", "in/c.png"):
            draw(tmp_path / name)
        return tmp_path

    def write(self, folder: Path, *rows: str, header: str = "path,label,mask,split,product,lot") -> Path:
        path = folder / "list.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    def test_rows_become_records(self, folder: Path) -> None:
        path = self.write(
            folder, "in/c.png,scratch,,test,nut,7", "a.png,good,,train,nut,8", "b.png,bad,masks/b.png,,nut,"
        )
        dataset = open_dataset(path)
        assert dataset.layout == "manifest"
        assert dataset.records == (
            Record(folder / "a.png", "good", None, "train", "nut", {"lot": "8"}),
            Record(folder / "b.png", "defective", folder / "masks/b.png", "", "nut", {"lot": ""}),
            Record(folder / "in/c.png", "scratch", None, "test", "nut", {"lot": "7"}),
        )

    def test_byte_order_mark_and_dos_line_ends_and_blank_rows(self, folder: Path) -> None:
        text = "path,label,mask,split,product\r\na.png,good,,Train,\r\n\r\n,,,,\r\n"
        (folder / "list.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [r.split for r in open_dataset(folder / "list.csv").records] == ["train"]

    def test_absolute_paths_and_paths_that_lead_out(self, folder: Path) -> None:
        (folder / "lists").mkdir()
        path = folder / "lists/list.csv"
        path.write_text(f"path,label,mask,split,product\n{folder / 'a.png'},good,,,\n../b.png,good,,,\n")
        assert {r.path.resolve() for r in open_dataset(path).records} == {folder / "a.png", folder / "b.png"}

    def test_quoted_commas(self, folder: Path) -> None:
        draw(folder / "x,y.png")
        assert open_dataset(self.write(folder, '"x,y.png",good,,,,')).records[0].path.name == "x,y.png"

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            (["a.png,good,,train,,", "b.png,good,,val,,"], r"line 3: the split 'val' is unknown"),
            (["a.png,good,,trian,,"], r"Did you mean 'train'\?"),
            (["a.png,good,,,,", "in/../a.png,good,,,,"], r"line 3: 'in/../a.png' stands in line 2 already"),
            (["no.png,good,,,,"], r"line 2: the picture 'no.png' does not exist"),
            (["in,good,,,,"], r"line 2: the picture 'in' does not exist"),
            (["a.png,bad,no.png,,,"], r"line 2: the mask 'no.png' does not exist"),
            (["a.png,,,,,"], r"line 2: the label is empty"),
            (["a.png,OK,,,,"], r"line 2: the label 'OK' can't be told.*Write 'good'"),
            (["a.png,good"], r"line 2 has 2 fields, the header 6"),
            (['a.png,"good,,,,'], r"line 2 is no valid CSV"),
            ([], r"has no rows"),
        ],
    )
    def test_a_row_that_cannot_be_meant_is_named_by_its_line(
        self, folder: Path, rows: list[str], words: str
    ) -> None:
        with pytest.raises(DataError, match=words):
            open_dataset(self.write(folder, *rows))

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ("path,label,mask,split", "the column 'product' is missing"),
            ("path;label;mask;split;product", "with commas between them"),
            ("path,label,mask,split,product,lot,lot", "the column 'lot' stands there twice"),
            ("", "the column 'path' is missing; found: nothing"),
        ],
    )
    def test_a_wrong_header_is_refused(self, folder: Path, header: str, words: str) -> None:
        with pytest.raises(DataError, match=words):
            open_dataset(self.write(folder, header=header))


class TestSplits:
    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=4, max_size=60),
        st.floats(0.05, 0.95),
        st.randoms(use_true_random=False),
    )
    def test_a_split_ignores_the_order_and_never_parts_a_group(
        self, pairs: list[tuple[int, int]], share: float, rng: random.Random
    ) -> None:
        names = [(f"key {key}", f"group {group}") for key, group in pairs]
        try:
            held = hold_out([k for k, _ in names], [g for _, g in names], share)
        except DataError:  # one group
            return
        sides: dict[str, set[bool]] = defaultdict(set)
        for (key, group), out in zip(names, held, strict=True):
            sides[key].add(out)
            sides[group].add(out)
        assert all(len(side) == 1 for side in sides.values())
        assert any(held) and not all(held)
        order = list(range(len(names)))
        rng.shuffle(order)
        again = hold_out([names[i][0] for i in order], [names[i][1] for i in order], share)
        assert again == [held[i] for i in order]

    def test_the_share_is_met_exactly_without_groups(self) -> None:
        keys = [str(i) for i in range(100)]
        assert sum(hold_out(keys, keys, 0.25)) == 25
        assert sum(hold_out(keys, keys, 0.001)) == 1
        assert sum(hold_out(keys, keys, 0.999)) == 99

    def test_another_purpose_gives_another_split(self) -> None:
        keys = [str(i) for i in range(100)]
        assert hold_out(keys, keys, 0.5, "a") != hold_out(keys, keys, 0.5, "b")

    def test_the_name_of_a_group_does_not_matter(self) -> None:
        keys = [str(i) for i in range(30)]
        first = hold_out(keys, [f"lot {i // 3}" for i in range(30)], 0.3)
        assert first == hold_out(keys, [f"part {99 - i // 3}" for i in range(30)], 0.3)

    def test_folds_are_even_and_keep_groups_together(self) -> None:
        keys = [str(i) for i in range(60)]
        names = [str(i // 2) for i in range(60)]
        found = folds(keys, names, 5)
        assert Counter(found) == dict.fromkeys(range(5), 12)
        assert all(found[i] == found[i + 1] for i in range(0, 60, 2))

    def test_equal_pictures_share_a_fold(self) -> None:
        assert len(set(folds(["same", "same", "b", "c"], ["1", "2", "3", "4"], 2)[:2])) == 1

    def test_too_few_groups_are_refused(self) -> None:
        with pytest.raises(DataError, match="3 pictures in 1 group"):
            hold_out(["a", "b", "c"], ["g", "g", "g"], 0.5)
        with pytest.raises(DataError, match="2 groups of pictures can't fill 3 folds"):
            folds(["a", "b"], ["1", "2"], 3)

    def test_a_share_out_of_range_is_refused(self) -> None:
        with pytest.raises(UsageError, match="between 0 and 1"):
            hold_out(["a", "b"], ["1", "2"], 1.0)

    def test_group_columns_are_found_in_their_order(self) -> None:
        records = (Record(Path("a"), columns={"lot": "1", "tile": "2", "shift": "3"}), Record(Path("b")))
        dataset = Dataset(Path("list.csv"), "manifest", records)
        assert group_column(dataset) == "tile"
        assert group_column(dataset, "shift") == "shift"
        assert groups(records, "tile") == ["tile=2", "path=b"]
        assert group_column(Dataset(Path("x"), "folder", (Record(Path("a")),))) is None

    def test_an_unknown_group_column_is_refused_with_the_nearest(self) -> None:
        dataset = Dataset(Path("list.csv"), "manifest", (Record(Path("a"), columns={"tile": "1"}),))
        with pytest.raises(UsageError, match=r"no column 'tiles'.*Did you mean 'tile'\?"):
            group_column(dataset, "tiles")


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("FETTLE_DATA")
    if not folder:
        pytest.skip("FETTLE_DATA is not set: real pictures are not at hand")
    return Path(folder)


def test_real_sets_have_their_documented_counts(real_data: Path) -> None:
    counts = {}
    for name in ("screw", "fabric", "battery_weld", "split_magnetic_tile.csv", "split_screw_mixed.csv"):
        records = open_dataset(real_data / name).records
        kinds = Counter((r.split, r.is_good) for r in records)
        masks = sum(r.mask is not None for r in records)
        counts[name] = (kinds["train", True], kinds["test", True], kinds["test", False], masks)
    assert counts == {
        "screw": (320, 41, 119, 119),
        "fabric": (150, 50, 28, 28),
        "battery_weld": (46, 23, 74, 74),
        "split_magnetic_tile.csv": (166, 87, 392, 388),
        "split_screw_mixed.csv": (284, 77, 119, 119),
    }


def test_real_tiles_hardly_leak_without_the_manifest(real_data: Path) -> None:
    tile = {
        r.path.name: r.columns["tile"] for r in open_dataset(real_data / "split_magnetic_tile.csv").records
    }
    sides: dict[str, set[str]] = defaultdict(set)
    for record in open_dataset(real_data / "magnetic_tile").records:
        sides[tile[record.path.name]].add(record.split)
    assert sum(len(side) > 1 for side in sides.values()) <= 3  # of 115 good tiles
