"""anomalib's part of `beside_anomalib.py`: it runs in anomalib's own environment and knows nothing of Fettle.

    python benchmarks/anomalib_side.py ACTION '{"work": ..., ...}'

`beside_anomalib.py` starts it, once a measurement, and reads the JSON object in the last line of its output.
Weights come from the file that the arguments name: nothing is fetched.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from beside_clock import Clock, Found, Given, answer, passes, peak_mib, words

SIZE = 256
LEVELS = {"patchcore": ("layer2", "layer3"), "padim": ("layer1", "layer2", "layer3")}


def build(method: str, weights: str) -> Any:
    """An anomalib model on ResNet-18 with the weights of the file, all of which must fit."""
    from anomalib.models import Padim, Patchcore
    from safetensors.torch import load_file

    kind = {"patchcore": Patchcore, "padim": Padim}[method]
    model = kind(backbone="resnet18", layers=list(LEVELS[method]), pre_trained=False)
    network = model.model.feature_extractor.feature_extractor
    state = {key: value.float() for key, value in load_file(weights).items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(key for key in missing if not key.endswith("num_batches_tracked"))]
    if wrong:
        sys.exit(f"The weights do not fit anomalib's network: {wrong[:3]}. Give ResNet-18, layers 1 to 3.")
    return model


def folder_data(root: str) -> Any:
    """anomalib's folder of pictures; half of the test part validates, as is its default."""
    from anomalib.data import Folder

    return Folder(
        name=Path(root).name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/defective",
        num_workers=0,
        seed=0,
    )


def engine(root: Path, **more: Any) -> Any:
    from anomalib.engine import Engine

    return Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False, **more)


def checkpoint(given: Given) -> Path:
    """The checkpoint of a fit in the work folder."""
    return Path(given["work"]) / "anomalib" / f"{given['model']}.ckpt"


def fit(given: Given) -> Found:
    """Engine.fit on a folder: up to the bank or the Gaussians ("learnt"), and with validation ("whole")."""
    import numpy as np
    from anomalib.models.image.patchcore import torch_model

    model = build(given["method"], given["weights"])
    if "ratio" in given:
        model.coreset_sampling_ratio = given["ratio"]
    data = folder_data(given["folder"])
    selected: Found = {}

    class Watched(torch_model.KCenterGreedy):
        """The selection as it is, and what it chose, from what, and in which time."""

        def select_coreset_idxs(self) -> list[int]:
            clock = Clock()
            picks: list[int] = super().select_coreset_idxs()
            selected.update(clock.read(), picks=picks, rows=self.features)
            return picks

    learn = model.fit
    learnt: Found = {}

    def watched_fit() -> None:
        learn()
        learnt.update(clock.read(), peak_mib=peak_mib())

    model.fit = watched_fit
    before = peak_mib()
    with mock.patch.object(torch_model, "KCenterGreedy", Watched):
        clock = Clock()
        validation = {} if given["validate"] else {"limit_val_batches": 0}
        runner = engine(Path(given["work"]) / "anomalib" / "runs", **validation)
        runner.fit(model=model, datamodule=data)
        whole = clock.read()
    peak = peak_mib()
    target = checkpoint(given)
    target.parent.mkdir(parents=True, exist_ok=True)
    runner.trainer.save_checkpoint(target)
    found: Found = {
        "pictures": len(data.train_data),
        "learnt": {**learnt, "added_mib": learnt["peak_mib"] - before},
        "whole": {**whole, "peak_mib": peak, "added_mib": peak - before},
        "before_mib": before,
        "validated_on": len(data.val_data) if given["validate"] else 0,
    }
    if selected:
        np.savez(target.with_suffix(".npz"), rows=selected["rows"].numpy(), picks=np.array(selected["picks"]))
        found["selection"] = {
            "wall_s": selected["wall_s"],
            "cpu_s": selected["cpu_s"],
            "picks": len(selected["picks"]),
            "rows": list(selected["rows"].shape),
        }
    return found


def loaded(given: Given) -> Any:
    """The fitted model, ready to infer."""
    import torch

    model = build(given["method"], given["weights"])
    state = torch.load(checkpoint(given), map_location="cpu", weights_only=False)["state_dict"]
    model.load_state_dict(state)
    return model.eval()


def pictures(paths: list[str]) -> Any:
    """(N, 3, 256, 256) in 0..1, each as anomalib's own pre-processor makes it, but for the normalisation."""
    import torch
    from anomalib.data.utils import read_image
    from torchvision.transforms.v2.functional import resize

    return torch.stack(
        [resize(read_image(path, as_tensor=True), [SIZE, SIZE], antialias=True) for path in paths]
    )


def infer(given: Given) -> Found:
    """Milliseconds of one picture alone: the whole model, its inner part, and the backbone."""
    import torch

    model = loaded(given)
    one = pictures(given["paths"][:1])
    normalised = model.pre_processor(one)
    with torch.inference_mode():
        return {
            "whole": passes(lambda: model(one), given["passes"]),
            "inner": passes(lambda: model.model(normalised), given["passes"]),
            "backbone": passes(lambda: model.model.feature_extractor(normalised), given["passes"]),
        }


def predict(given: Given) -> Found:
    """Engine.predict on a folder, as a user would: heatmaps are drawn and written, as is the default."""
    from lightning.pytorch.callbacks import Callback

    clock = Clock()
    model = build(given["method"], given["weights"])

    class Start(Callback):
        """Notes when the loading is over."""

        def on_predict_start(self, *_: object) -> None:
            self.clock = Clock()

    start = Start()
    runner = engine(Path(given["out"]), callbacks=[start])
    answers = runner.predict(model=model, data_path=given["folder"], ckpt_path=checkpoint(given))
    return {
        "pictures": sum(len(answer.pred_score) for answer in answers),
        "loop": start.clock.read(),
        "whole": clock.read(),
        "files": sum(path.is_file() for path in Path(given["out"]).rglob("*")),
    }


def score(given: Given) -> Found:
    """Raw picture scores by path: not normalised, since anomalib clips normalised ones to 0..1."""
    import torch

    model = loaded(given)
    found = {}
    with torch.inference_mode():
        for path in given["paths"]:
            found[path] = float(model.model(model.pre_processor(pictures([path]))).pred_score)
    return {"scores": found}


def export(given: Given) -> Found:
    """anomalib's own export, in batches of 1, 2 and 8, against its own model; and its latency.

    Each way of telling it the shapes is tried, since not all give a graph that takes one picture.
    """
    import torch

    model = loaded(given)
    views = pictures(given["paths"])
    with torch.inference_mode():
        expected = torch.cat([model(one).pred_score.reshape(-1) for one in views.split(1)])
    found: Found = {"score_range": [float(expected.min()), float(expected.max())]}
    shapes = {  # its default, with the pictures' size, and told to take one picture alone
        "default": {},
        "size": {"input_size": (SIZE, SIZE)},
        "one": {"input_size": (SIZE, SIZE), "onnx_kwargs": {"dynamic_shapes": None}},
    }
    for shape, more in shapes.items():
        out = Path(given["out"]) / shape
        try:
            path = engine(out).export(model=model, export_type=given["format"], export_root=out, **more)
        except Exception as error:
            found[shape] = {"export_error": words(error)}
            continue
        found[shape] = exported(given["format"], Path(path), views.numpy(), expected.numpy(), given["passes"])
    return found


def exported(format_: str, path: Path, views: Any, expected: Any, times: int) -> Found:
    """How far a graph's scores are from the model's, relative to the largest, by size of batch."""
    import numpy as np

    run = open_graph(format_, path)
    found: Found = {}
    for batch in (1, 2, 8):
        try:
            scores = np.concatenate(
                [run(views[i : i + batch]) for i in range(0, len(views) - batch + 1, batch)]
            )
        except Exception as error:
            found[str(batch)] = {"error": words(error)}
            continue
        away = np.abs(scores - expected[: len(scores)])
        found[str(batch)] = {
            "pictures": len(scores),
            "max_score_diff": float((away / np.maximum(np.abs(expected[: len(scores)]), 1e-12)).max()),
            "max_abs_diff": float(away.max()),
        }
    if "error" not in found["1"]:
        found["latency"] = passes(lambda: run(views[:1]), times)
    return found


def open_graph(format_: str, path: Path) -> Callable[[Any], Any]:
    """Pictures (B, 3, H, W) to scores (B,), one thread, float32."""
    if format_ == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: session.run(["pred_score"], {name: batch})[0].reshape(-1)
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda batch: compiled(batch)["pred_score"].reshape(-1).copy()


ACTIONS = {"fit": fit, "infer": infer, "predict": predict, "score": score, "export": export}


def main() -> None:
    import torch

    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    answer(ACTIONS)


if __name__ == "__main__":
    main()
