"""fettle doctor: the environment, devices, threads, and the weights that would be used."""

from __future__ import annotations

import os
import platform

from fettle.cli.console import print_facts, print_json
from fettle.cli.options import AsJson
from fettle.protocols import Json


def doctor(as_json: AsJson = False) -> None:
    """Print what this machine offers, and which backbone weights are found without the hub."""
    from importlib.metadata import version

    import torch

    from fettle.backbones.registry import backbone_names, found_offline

    devices = ["cpu"] + [
        f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    weights: dict[str, Json] = {name: found_offline(name) for name in backbone_names()}
    facts: dict[str, Json] = {
        "fettle": version("fettle"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "faiss-cpu")},
        "devices": [*devices],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "weights": weights,
    }
    if as_json:
        print_json(facts)
        return
    plain = {name: value for name, value in facts.items() if name not in ("weights", "devices")}
    print_facts({**plain, "devices": ", ".join(devices)})
    print("weights")
    print_facts({f"  {name}": source or "not found" for name, source in weights.items()})
