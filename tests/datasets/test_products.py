"""Products: each record knows its own, and training and test never share a picture or a group."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fettle.datasets import Dataset, Record, open_dataset
from fettle.datasets.own_split import split_by_groups
from fettle.datasets.products import SPLIT_MADE, merge_datasets, open_products, product_notes
from fettle.datasets.splits import group_column, groups
from fettle.errors import DataError, UsageError

COLUMNS = "path,label,mask,split,product"
seeds = iter(range(10**6))


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(next(seeds)).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return path


def write(file: Path, *rows: str, more: str = "") -> Path:
    file.write_text("\n".join([COLUMNS + more, *rows]) + "\n")
    return file


def counts(dataset: Dataset) -> dict[tuple[str, str, bool], int]:
    return dict(Counter((r.product, r.split, r.is_good) for r in dataset.records))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A product of each layout that a folder shows: nut (MVTec), bagel (3D), tiles, and bolt (plain)."""
    root = tmp_path / "plant"
    for name in ("train/good/0", "train/good/1", "test/good/2", "test/dent/3"):
        draw(root / f"nut/{name}.png")
        kind, label, number = name.split("/")
        draw(root / f"bagel/{kind}/{label}/rgb/{number}.png")
    draw(root / "bagel/validation/good/rgb/9.png")
    for number in range(1000, 13_000, 1000):
        for exposure in (1, 2):
            draw(root / f"tiles/MT_Free/Imgs/exp{exposure}_num_{number + exposure}.jpg")
    draw(root / "tiles/MT_Crack/Imgs/exp1_num_90000.jpg")
    for number in range(4):
        draw(root / f"bolt/monday/{number}.png")
    return root


@pytest.fixture
def lots(tmp_path: Path) -> Path:
    """A manifest without a split: 12 good pictures of 6 lots, and a defective one of lot 0."""
    rows = [
        f"{draw(tmp_path / f'pictures/{i}.png').relative_to(tmp_path)},good,,,cap,{i // 2}" for i in range(12)
    ]
    draw(tmp_path / "pictures/bad.png")
    return write(tmp_path / "lots.csv", *rows, "pictures/bad.png,bad,,,cap,0", more=",lot")


class TestFolderOfProducts:
    def test_each_folder_is_a_product_in_its_own_layout(self, root: Path) -> None:
        dataset = open_products(root)
        assert (dataset.layout, dataset.root) == ("products", root)
        assert counts(dataset) == {
            ("nut", "train", True): 2,
            ("nut", "test", True): 1,
            ("nut", "test", False): 1,
            ("bagel", "train", True): 2,
            ("bagel", "validation", True): 1,
            ("bagel", "test", True): 1,
            ("bagel", "test", False): 1,
            ("tiles", "train", True): 16,
            ("tiles", "test", True): 8,
            ("tiles", "test", False): 1,
            ("bolt", "train", True): 4,
        }
        assert [r.path for r in dataset.records] == sorted(r.path for r in dataset.records)

    def test_no_picture_is_learnt_from_and_tested_on(self, root: Path) -> None:
        dataset = open_products(root)
        learnt, tested = dataset.good_for_training(), dataset.for_testing()
        assert learnt and not {r.path for r in learnt} & {r.path for r in tested}

    def test_only_chosen_folders_are_looked_into(self, root: Path) -> None:
        (root / "notes").mkdir()
        (root / "notes/readme.txt").touch()
        assert {r.product for r in open_products(root, ["nut", "bolt", "nut"]).records} == {"nut", "bolt"}

    def test_an_unknown_product_is_refused_with_the_nearest(self, root: Path) -> None:
        with pytest.raises(UsageError, match=r"no product 'bolts'\. Did you mean 'bolt'\?"):
            open_products(root, ["nut", "bolts"])

    def test_hidden_and_empty_folders_and_other_files_are_passed_over(self, root: Path) -> None:
        draw(root / ".old/0.png")
        (root / "empty").mkdir()
        (root / "nearly").mkdir()
        (root / "nearly/.keep").touch()
        (root / "license.txt").touch()
        write(root / "list.csv")
        assert {r.product for r in open_products(root).records} == {"nut", "bagel", "tiles", "bolt"}

    def test_a_folder_that_is_no_product_is_refused_by_name(self, root: Path) -> None:
        (root / "notes").mkdir()
        (root / "notes/readme.txt").touch()
        with pytest.raises(DataError, match=r"'notes' can't be read as a product: .*holds no pictures"):
            open_products(root)

    def test_a_linked_folder_has_the_name_of_its_link(self, root: Path) -> None:
        (root / "screw").symlink_to(root / "nut")
        assert {r.product for r in open_products(root, ["screw"]).records} == {"screw"}

    def test_one_picture_in_two_products_is_refused(self, root: Path) -> None:
        (root / "screw").symlink_to(root / "nut")
        with pytest.raises(DataError, match=r"stands in two products, 'nut' and 'screw'"):
            open_products(root)

    def test_a_manifest_in_a_folder_says_what_is_in_it(self, root: Path) -> None:
        draw(root / "bolt/bad.png")
        write(root / "bolt/manifest.csv", "monday/0.png,good,,train,,", "bad.png,rust,,test,,", more=",lot")
        assert counts(open_products(root, ["bolt"])) == {
            ("bolt", "train", True): 1,
            ("bolt", "test", False): 1,
        }

    def test_a_root_without_folders_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").touch()
        with pytest.raises(DataError, match="holds no folders of products"):
            open_products(tmp_path)
        with pytest.raises(DataError, match="does not exist"):
            open_products(tmp_path / "no")


class TestOneProduct:
    @pytest.mark.parametrize("name", ["nut", "bagel", "tiles"])
    def test_a_layout_is_refused_with_the_remedy(self, root: Path, name: str) -> None:
        with pytest.raises(DataError, match=r"is itself one product.*leave --multi-class away.*plant'"):
            open_products(root / name)

    def test_plain_pictures_are_refused_with_the_remedy(self, root: Path) -> None:
        with pytest.raises(DataError, match=r"pictures of its own.*leave --multi-class away"):
            open_products(root / "bolt/monday")

    @pytest.mark.parametrize("part", ["test", "ground_truth", "good", "Masks"])
    def test_parts_of_a_product_are_no_products(self, tmp_path: Path, part: str) -> None:
        draw(tmp_path / part / "0.png")
        draw(tmp_path / "dent/0.png")
        with pytest.raises(DataError, match=rf"a folder '{part}'.*leave --multi-class away"):
            open_products(tmp_path)

    def test_pictures_beside_products_have_no_product(self, root: Path) -> None:
        draw(root / "0.png")
        with pytest.raises(DataError, match=r"1 pictures stand directly in .*Move them"):
            open_products(root)

    def test_a_manifest_in_the_root_is_to_be_named_itself(self, root: Path) -> None:
        write(root / "manifest.csv", "nut/train/good/0.png,good,,train,nut")
        with pytest.raises(DataError, match=r"has a manifest\.csv of its own\. Name it"):
            open_products(root)
        assert counts(open_products(root / "manifest.csv")) == {("nut", "train", True): 1}


class TestOneList:
    def test_products_of_a_manifest(self, tmp_path: Path) -> None:
        for name in "abc":
            draw(tmp_path / f"{name}.png")
        rows = ("a.png,good,,train,nut", "b.png,good,,train,cap", "c.png,bad,,test,nut")
        file = write(tmp_path / "list.csv", *rows)
        dataset = open_products(file)
        assert (dataset.layout, dataset.root) == ("products", file)
        assert [(r.path.name, r.product) for r in dataset.records] == [
            ("a.png", "nut"),
            ("b.png", "cap"),
            ("c.png", "nut"),
        ]
        assert {r.product for r in open_products(file, ["cap"]).records} == {"cap"}
        with pytest.raises(UsageError, match=r"no product 'nuts'\. Did you mean 'nut'\?"):
            open_products(file, ["nuts"])

    def test_rows_without_a_product_are_refused(self, tmp_path: Path) -> None:
        draw(tmp_path / "a.png")
        draw(tmp_path / "b.png")
        with pytest.raises(DataError, match=r"so it is one product.*or leave --multi-class away"):
            open_products(write(tmp_path / "one.csv", "a.png,good,,train,", "b.png,good,,train,"))
        with pytest.raises(DataError, match=r"names no product for 1 pictures, such as '.*b\.png'"):
            open_products(write(tmp_path / "two.csv", "a.png,good,,train,nut", "b.png,good,,train,"))

    def test_objects_of_visa(self, tmp_path: Path) -> None:
        rows = ["object,split,label,image,mask"]
        for name in ("candle", "pcb1"):
            draw(tmp_path / f"{name}/Data/Images/Normal/0.png")
            draw(tmp_path / f"{name}/Data/Images/Normal/1.png")
            rows += [f"{name},train,normal,{name}/Data/Images/Normal/0.png,"]
            rows += [f"{name},test,normal,{name}/Data/Images/Normal/1.png,"]
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text("\n".join(rows))
        assert counts(open_products(tmp_path, ["pcb1"])) == {
            ("pcb1", "train", True): 1,
            ("pcb1", "test", True): 1,
        }
        assert {r.product for r in open_products(tmp_path).records} == {"candle", "pcb1"}


class TestOwnSplit:
    def test_defects_and_their_groups_are_tested_and_a_third_of_the_good(self, lots: Path) -> None:
        dataset = open_products(lots)
        assert counts(dataset) == {
            ("cap", "train", True): 8,
            ("cap", "test", True): 4,
            ("cap", "test", False): 1,
        }
        sides: dict[str, set[str]] = defaultdict(set)
        for record in dataset.records:
            sides[record.columns["lot"]].add(record.split)
        assert all(len(side) == 1 for side in sides.values()) and sides["0"] == {"test"}

    def test_it_depends_on_neither_place_nor_other_products(self, lots: Path, tmp_path: Path) -> None:
        def by_name(dataset: Dataset) -> dict[str, str]:
            return {r.path.name: r.split for r in dataset.records if r.product == "cap"}

        first = by_name(open_products(lots))
        shutil.copytree(lots.parent / "pictures", tmp_path / "moved/pictures")
        shutil.copy(lots, tmp_path / "moved/lots.csv")
        moved = open_dataset(tmp_path / "moved/lots.csv")
        other = Dataset(tmp_path, "folder", (Record(draw(tmp_path / "other.png")),))
        assert by_name(merge_datasets({"other": other, "cap": moved})) == first

    def test_equal_files_stay_on_one_side_also_beside_a_defect(self, tmp_path: Path) -> None:
        paths = [draw(tmp_path / f"{i}.png") for i in range(6)]
        shutil.copy(paths[0], tmp_path / "copy.png")
        shutil.copy(paths[5], tmp_path / "bad.png")
        records = [*map(Record, [*paths, tmp_path / "copy.png"]), Record(tmp_path / "bad.png", "dent")]
        sides = {r.path.name: r.split for r in split_by_groups(records, groups(records, None))}
        assert sides["0.png"] == sides["copy.png"] and sides["5.png"] == sides["bad.png"] == "test"

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30))
    def test_no_group_stands_on_two_sides(self, asked: list[tuple[int, bool]]) -> None:
        records = [
            Record(Path(f"missing {i}"), "good" if good else "dent") for i, (_, good) in enumerate(asked)
        ]
        names = [str(group) for group, _ in asked]
        sides: dict[str, set[str]] = defaultdict(set)
        for record, group in zip(split_by_groups(records, names), names, strict=True):
            sides[group].add(record.split)
            assert record.is_good or record.split == "test"
        assert all(len(side) == 1 for side in sides.values())

    def test_good_pictures_of_one_group_are_learnt_from(self) -> None:
        records = [Record(Path("a")), Record(Path("b")), Record(Path("c"), "dent")]
        assert [r.split for r in split_by_groups(records, ["1", "1", "2"])] == ["train", "train", "test"]

    def test_an_unreadable_picture_does_not_end_it(self, lots: Path) -> None:
        (lots.parent / "pictures/3.png").write_bytes(b"")
        assert len(open_products(lots).records) == 13

    def test_a_split_for_some_pictures_only_is_refused(self, tmp_path: Path) -> None:
        records = (Record(Path("a.png"), split="train"), Record(Path("b.png")))
        with pytest.raises(DataError, match=r"1 of 2 pictures of 'nut' have no split, such as 'b\.png'"):
            merge_datasets({"nut": Dataset(tmp_path, "manifest", records)})


class TestNotes:
    def test_they_tell_made_splits_and_what_is_left_out(self, root: Path, lots: Path) -> None:
        assert product_notes(open_products(root)) == [
            "'bagel' has 1 pictures for validation: they are left out.",
            "'bolt' has good pictures only and no split: all 4 are to learn from.",
            "'tiles' has no split of its own. One was made by contents, groups kept whole: "
            "16 good ones to learn from, 8 good and 1 defective to test on.",
        ]
        assert "8 good ones to learn from, 4 good and 1 defective" in product_notes(open_products(lots))[0]

    def test_they_tell_what_is_missing(self, tmp_path: Path) -> None:
        learnt, tested = Record(Path("a"), split="train"), Record(Path("b"), split="test")
        named = {n: Dataset(tmp_path, "manifest", (r,)) for n, r in (("cap", learnt), ("nut", tested))}
        assert product_notes(merge_datasets(named)) == [
            "'cap' has no picture to test on.",
            "'nut' has no good picture to learn from.",
        ]


class TestMerge:
    def test_records_take_the_name_given_and_keep_the_rest(self, root: Path) -> None:
        merged = merge_datasets({"b": open_dataset(root / "nut"), "a": open_dataset(root / "bagel")})
        assert {(r.product, r.path.relative_to(root).parts[0]) for r in merged.records} == {
            ("b", "nut"),
            ("a", "bagel"),
        }
        assert merged.root == root
        assert all(SPLIT_MADE not in r.columns for r in merged.records)

    def test_groups_of_several_columns_come_into_one(self, tmp_path: Path) -> None:
        def product(column: str) -> Dataset:
            records = [
                Record(Path(f"{column}{i}"), split="train", columns={column: str(i // 2)}) for i in range(4)
            ]
            return Dataset(tmp_path, "manifest", tuple(records))

        merged = merge_datasets({"a": product("lot"), "b": product("tile")})
        column = group_column(merged)
        kept = Counter(
            (r.product, group)
            for r, group in zip(merged.records, groups(merged.records, column), strict=True)
        )
        assert column == "tile" and set(kept.values()) == {2} and len(kept) == 4
        assert merged.records[0].columns == {"lot": "0", "tile": "0"}

    def test_what_is_no_product_is_refused(self, root: Path, tmp_path: Path) -> None:
        several = open_products(root, ["nut", "bagel"])
        with pytest.raises(DataError, match=r"holds several products \('bagel', 'nut'\), and 'all' is to be"):
            merge_datasets({"all": several})
        with pytest.raises(DataError, match="No products"):
            merge_datasets({})
        with pytest.raises(DataError, match="has no name"):
            merge_datasets({"": open_dataset(root / "nut")})


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("FETTLE_DATA")
    if not folder:
        pytest.skip("FETTLE_DATA is not set: real pictures are not at hand")
    return Path(folder)


def test_the_four_real_products_in_one(real_data: Path) -> None:
    sources = {
        "screw": "split_screw_mixed.csv",
        "magnetic_tile": "split_magnetic_tile.csv",
        "battery_weld": "battery_weld",
        "fabric": "fabric",
    }
    merged = merge_datasets({name: open_dataset(real_data / source) for name, source in sources.items()})
    found = counts(merged)
    assert {
        n: (found[n, "train", True], found[n, "test", True], found[n, "test", False]) for n in sources
    } == {
        "screw": (284, 77, 119),
        "magnetic_tile": (166, 87, 392),
        "battery_weld": (46, 23, 74),
        "fabric": (150, 50, 28),
    }
    assert merged.root == real_data and group_column(merged) == "tile" and not product_notes(merged)
    folders = open_products(real_data, list(sources))
    assert len(folders.records) == len(merged.records)
