"""How a decoded mask is read."""

import numpy as np
import pytest

from fettle.errors import MetricError
from fettle.metrics import binarise_mask


@pytest.mark.parametrize(
    ("values", "dtype", "defect", "kind"),
    [
        ([0, 255, 0], np.uint8, [0, 1, 0], "binary"),
        ([0, 127, 128, 255], np.uint8, [0, 0, 1, 1], "antialiased"),
        ([0, 32767, 32768, 65535], np.uint16, [0, 0, 1, 1], "antialiased"),
        ([0, 0.5, 0.6, 1], np.float32, [0, 0, 1, 1], "antialiased"),
        ([0, 1], np.float64, [0, 1], "binary"),
        ([0, 1, 2, 3], np.uint8, [0, 1, 1, 1], "index"),
        ([0, 127], np.uint8, [0, 1], "index"),
        ([0, 300], np.uint16, [0, 1], "index"),
        ([0, 0], np.uint8, [0, 0], "binary"),
        ([255, 255], np.uint8, [1, 1], "binary"),
        ([0, 1, 1], np.int64, [0, 1, 1], "binary"),
        ([False, True], np.bool_, [0, 1], "binary"),
    ],
)
def test_mask_rules(values, dtype, defect, kind):
    mask, found = binarise_mask(np.array([values], dtype))
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[bool(value) for value in defect]]
    assert found == kind


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3), np.uint8), "shape"),
        (np.array([[0, 255]], np.int64), "full scale is not known"),
        (np.array([[0, 2.0]]), "outside 0..1"),
        (np.array([[0, np.nan]]), "NaN"),
    ],
)
def test_masks_that_cannot_be_read_are_refused(array, message):
    with pytest.raises(MetricError, match=message):
        binarise_mask(array)
