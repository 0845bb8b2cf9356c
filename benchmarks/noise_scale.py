"""How strong should training noise be? The closed form of fettle/bench/noise_scale.py on real good pictures.

    python benchmarks/noise_scale.py [--method agpnet] [--backbone NAME] [--data screw fabric] [--seeds 3]

FETTLE_DATA and FETTLE_WEIGHTS name the folders of pictures and weights. Half of the good training pictures is
learnt from; the other half is judged with pasted defects and without. No test picture is read. A cell is the
image AUROC, mean ± deviation over seeds of the pasted defects.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fettle.backbones import registry
from fettle.bench import spread
from fettle.bench.noise_scale import WEIGHTS, probe_noise_scale
from fettle.datasets.open import open_dataset
from fettle.datasets.splits import hold_out
from fettle.gathering import gather_good
from fettle.images.framing import choose_frame
from fettle.methods.registry import find_method, make_config
from fettle.protocols import Method, no_progress

DATA = {"screw": "split_screw_mixed.csv", "fabric": "fabric"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="agpnet")
    parser.add_argument("--backbone", default=registry.DEFAULT_BACKBONE)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=None, help="good pictures")
    arguments = parser.parse_args()
    method = unfitted(arguments.method, arguments.backbone)
    frame = choose_frame("square", arguments.size, [], method.backbone.spec.side_step)
    print(f"{arguments.method}'s features of {arguments.backbone}\n")
    print(f"| data | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} |\n|{'---|' * (len(WEIGHTS) + 1)}")
    for data in arguments.data:
        dataset = open_dataset(Path(os.environ["FETTLE_DATA"]) / DATA[data])
        good = gather_good(dataset, None, no_progress).pictures[: arguments.most]
        held = hold_out([picture.key for picture in good], [picture.group for picture in good], 0.5)
        learn, judged = (
            [picture.path for picture, out in zip(good, held, strict=True) if out == side]
            for side in (False, True)
        )
        found = [
            probe_noise_scale(method, frame, learn, judged, seed=seed) for seed in range(arguments.seeds)
        ]
        cells = [spread([one[weight] for one in found]) for weight in WEIGHTS]
        print(f"| {data} ({len(learn)} learnt, {len(judged)} judged) | {' | '.join(cells)} |", flush=True)


def unfitted(name: str, backbone: str) -> Method:
    """A method with nothing learnt: its features are all that is wanted."""
    method_class = find_method(name)
    config = make_config(method_class, "compact", {})
    entry = registry.find_entry(backbone)
    levels = registry.resolve_level_names(entry, method_class.choose_levels(entry.levels, config))
    method: Method = method_class(registry.load_backbone(backbone, levels), config, levels)
    return method


if __name__ == "__main__":
    main()
