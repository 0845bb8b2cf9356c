"""Import timm where torchvision's compiled operators do not fit the installed torch.

timm imports torchvision. A torchvision built for CUDA beside a CPU build of torch cannot load its
operators, and its import then fails because two operator schemas are unknown. No backbone calls those
operators: declaring their schemas is enough. Where torchvision is whole, nothing is declared.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # a schema lives as long as its library


def import_timm() -> ModuleType:
    """timm, with torchvision made importable first if need be."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for operator in ("nms", "qnms"):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _declared.append(library)
        importlib.import_module("torchvision")
    return importlib.import_module("timm")
