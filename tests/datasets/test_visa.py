"""VisA: its split file names every picture, and nothing that can't be meant passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fettle.datasets import Record, open_dataset
from fettle.datasets.describe import describe
from fettle.errors import DataError
from fettle.images.decode import read_mask

HEADER = "object,split,label,image,mask"
NORMAL = "candle/Data/Images/Normal"
ANOMALY = "candle/Data/Images/Anomaly"
MASKS = "candle/Data/Masks/Anomaly"


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def write_split(root: Path, *rows: str, header: str = HEADER) -> None:
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv/1cls.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two objects: two normal pictures to learn from, one normal and one anomalous to test on, each."""
    rows = []
    for number, name in enumerate(("pcb1", "candle")):
        for i in range(3):
            draw(tmp_path / f"{name}/Data/Images/Normal/{i:04d}.JPG", 10 * number + i)
            split = "train" if i < 2 else "test"
            rows.append(f"{name},{split},normal,{name}/Data/Images/Normal/{i:04d}.JPG,")
        draw(tmp_path / f"{name}/Data/Images/Anomaly/000.JPG", 10 * number + 5)
        mask = np.zeros((16, 16), np.uint8)
        mask[2:4, 2:5], mask[8:10, 8:10] = 1, 3  # numbers of classes, as in the set
        (tmp_path / f"{name}/Data/Masks/Anomaly").mkdir(parents=True)
        Image.fromarray(mask).save(tmp_path / f"{name}/Data/Masks/Anomaly/000.png")
        images = f"{name}/Data/Images/Anomaly/000.JPG,{name}/Data/Masks/Anomaly/000.png"
        rows.append(f"{name},test,anomaly,{images}")
    write_split(tmp_path, *rows)
    return tmp_path


def test_every_object_is_a_product_of_one_data_set(root: Path) -> None:
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.root) == ("visa", root)
    assert Counter((r.product, r.split, r.defect) for r in dataset.records) == {
        (name, split, defect): count
        for name in ("candle", "pcb1")
        for split, defect, count in (("train", "good", 2), ("test", "good", 1), ("test", "defective", 1))
    }
    assert [r.path for r in dataset.records] == sorted(r.path for r in dataset.records)
    assert dataset.records[0] == Record(
        root / ANOMALY / "000.JPG", "defective", root / MASKS / "000.png", "test", "candle"
    )


def test_small_class_numbers_in_a_mask_are_defect(root: Path) -> None:
    mask, kind = read_mask(root / MASKS / "000.png", (16, 16))
    assert kind == "index" and mask.sum() == 6 + 4


def test_a_whole_set_has_no_findings(root: Path) -> None:
    assert describe(open_dataset(root)).findings == ()


def test_pictures_that_the_split_leaves_out_are_not_taken(root: Path) -> None:
    draw(root / NORMAL / "0099.JPG", 99)
    assert len(open_dataset(root).records) == 8


def test_further_columns_are_kept(root: Path) -> None:
    write_split(root, f"candle,train,normal,{NORMAL}/0000.JPG,,7", header=HEADER + ",lot")
    assert open_dataset(root).records[0].columns == {"lot": "7"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (f"candle,train,normall,{NORMAL}/0000.JPG,", r"label 'normall' is unknown\. Did you mean 'normal'"),
        (f"candle,val,normal,{NORMAL}/0000.JPG,", r"split 'val' is unknown\..*Known: test, train"),
        (f",train,normal,{NORMAL}/0000.JPG,", r"the object is empty"),
        (f"candle,train,normal,{NORMAL}/7777.JPG,", r"the image '.*7777.JPG' does not exist"),
        ("candle,train,normal,,", r"the image '' does not exist"),
        (f"candle,test,anomaly,{ANOMALY}/000.JPG,", r"anomalous, but has no mask"),
        (f"candle,test,anomaly,{ANOMALY}/000.JPG,{MASKS}/001.png", r"the mask '.*001.png' does not exist"),
        (f"candle,test,normal,{NORMAL}/0000.JPG,{MASKS}/000.png", r"normal, but has a mask"),
        (f"candle,train,anomaly,{ANOMALY}/000.JPG,{MASKS}/000.png", r"only good ones are learnt from"),
        ("candle,train,normal,../out.JPG,", r"the image '../out.JPG' leaves the folder"),
        (f"candle,train,normal,{NORMAL}/../../../../../out.JPG,", r"leaves the folder"),
        ("candle,train,normal,..\\out.JPG,", r"leaves the folder"),
        ("candle,train,normal,/etc/hostname,", r"leaves the folder"),
        ("candle,train,normal,C:\\out.JPG,", r"leaves the folder"),
        (f"candle,test,anomaly,{ANOMALY}/000.JPG,../mask.png", r"the mask '../mask.png' leaves the folder"),
        ("candle,train,normal", r"has 3 fields, the header 5"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named_by_its_line(root: Path, row: str, words: str) -> None:
    draw(root.parent / "out.JPG", 0)
    write_split(root, f"candle,train,normal,{NORMAL}/0001.JPG,", row)
    with pytest.raises(DataError, match=rf"1cls\.csv', line 3.*{words}") as caught:
        open_dataset(root)
    assert caught.value.remedy.endswith(".")


def test_a_picture_that_stands_twice_is_refused(root: Path) -> None:
    row = f"candle,train,normal,{NORMAL}/0001.JPG,"
    write_split(root, row, row)
    with pytest.raises(DataError, match=r"line 3: .* stands in line 2 already"):
        open_dataset(root)


def test_a_split_file_without_its_columns_is_refused(root: Path) -> None:
    write_split(root, header="object,split,label,image")
    with pytest.raises(DataError, match=r"the column 'mask' is missing; found: object.*header needs object,"):
        open_dataset(root)
    write_split(root)
    with pytest.raises(DataError, match="has no rows"):
        open_dataset(root)


def test_the_layout_by_name_needs_the_split_file(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0)
    with pytest.raises(DataError, match=r"has no split_csv/1cls\.csv"):
        open_dataset(tmp_path, "visa")
    with pytest.raises(DataError, match="a file where a folder is meant"):
        open_dataset(tmp_path / "a.png", "visa")


def test_anomalies_are_not_taken_for_good_pictures(root: Path) -> None:
    with pytest.raises(DataError, match=r"is one object of VisA.*folder that holds split_csv"):
        open_dataset(root / "candle")
    (root / "split_csv/1cls.csv").unlink()
    with pytest.raises(DataError, match=r"holds several products \(candle, pcb1\)"):
        open_dataset(root)
