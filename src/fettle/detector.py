"""Detector: frame + backbone + method + calibration, the façade that most users need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.backbones import registry as backbones
from fettle.calibration import Calibration, RegionRules, calibrate, find_regions, order_statistic
from fettle.datasets.open import open_dataset
from fettle.datasets.records import Dataset, Record
from fettle.errors import DataError, FettleError, ModelFolderError, UsageError
from fettle.evaluation import Evaluation, Promise
from fettle.fitting import fit_parts, make_request
from fettle.gathering import gather_good
from fettle.images.decode import read_mask
from fettle.images.framing import Frame
from fettle.images.loading import Loaded, load_framed
from fettle.images.picture import Picture
from fettle.inspection import Inspection, Refusal, Region
from fettle.judging import gather_judged, judge
from fettle.methods.registry import find_method
from fettle.model_folder import read_model, write_model
from fettle.protocols import BackboneSpec, Json, Level, Method, Progress, no_progress, no_words

Item = TypeVar("Item")


@dataclass(frozen=True)
class Inspected(Generic[Item]):
    """The answer for one item, with the decoded picture that it is about."""

    item: Item
    picture: Picture
    inspection: Inspection


class Detector:
    """A fitted model. Make one with `Detector.fit` or `Detector.load`.

    Attributes:
        method: the fitted method, its backbone inside.
        frame: how pictures become network input.
        calibration: thresholds and what they promise.
        card: the model card: data, weights, seeds, versions, fit facts, fallbacks.
        fold_methods: with cross calibration, the folds' models, which decide the verdict.
    """

    def __init__(
        self,
        method: Method,
        frame: Frame,
        calibration: Calibration,
        card: Mapping[str, Json],
        device: str,
        fold_methods: Sequence[Method] = (),
    ) -> None:
        self.method = method
        self.fold_methods = tuple(fold_methods)
        self.frame = frame
        self.calibration = calibration
        self.card = dict(card)
        self.device = device

    @classmethod
    def fit(
        cls,
        good: Path | str | Dataset | Sequence[Path],
        *,
        progress: Progress = no_progress,
        say: Callable[[str], None] = no_words,
        **settings: object,
    ) -> Detector:
        """Learn from good pictures and calibrate on them.

        Args:
            good: a folder of good pictures, a labelled layout or manifest (its good training part is
                taken), or the pictures' paths.
            settings: the fields of `FitRequest`: method, preset, backbone, weights, size, frame, group,
                seed, ...

        Raises:
            UsageError: a wrong name or value. DataError: no usable picture. WeightsError: no weights.
        """
        request = make_request(settings)
        parts = fit_parts(_good_records(good), request, progress, say)
        return cls(
            parts.method, parts.frame, parts.calibration, parts.card, request.device, parts.fold_methods
        )

    @property
    def num_fit(self) -> int:
        """Good pictures that the model has learnt from."""
        return cast(int, cast("dict[str, Json]", self.card["data"])["pictures"])

    def warnings(self) -> list[str]:
        """What a user should know of this model: fallbacks, refused pictures, weak spots."""
        return cast("list[str]", self.card["warnings"])

    def describe(self) -> dict[str, Json]:
        """The model card in full: what it learnt from, with what, and what it promises."""
        hidden = ("picture_keys",)
        spec = asdict(self.method.backbone.spec)
        backbone = {name: spec[name] for name in ("id", "sha256", "source", "licence")}
        return {
            "name": f"{self.method.name} on {spec['id']}",
            "promise": " ".join(self.calibration.sentences()),
            "method": self.method.name,
            "configuration": self.method.config.model_dump(mode="json"),
            "backbone": {**backbone, "levels": list(self.method.levels)},
            "frame": self.frame.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json", exclude={"scores"}),
            **{name: value for name, value in self.card.items() if name not in hidden},
        }

    def inspect(
        self, paths: Iterable[Path | str], *, product: str = "", batch_size: int = 8
    ) -> Iterator[Inspection | Refusal]:
        """Inspect pictures in their order. A picture that cannot be read comes as a `Refusal`."""
        items = (Path(path) for path in paths)
        for answer in self.inspect_items(items, lambda p: p, product=product, batch_size=batch_size):
            yield answer.inspection if isinstance(answer, Inspected) else answer[1]

    def inspect_items(
        self,
        items: Iterable[Item],
        path_of: Callable[[Item], Path],
        *,
        product: str = "",
        batch_size: int = 8,
        rules: RegionRules | None = None,
    ) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """As `inspect`, with the item and the decoded picture beside each answer.

        Decoding runs ahead in threads while the network computes. Answers come in the order of `items`.
        """
        rules = rules or RegionRules()
        waiting: list[Loaded[Item] | tuple[Item, Refusal]] = []
        num_views = 0
        for loaded in load_framed(items, path_of, self.frame):
            waiting.append(loaded)
            num_views += len(loaded.placed.views) if isinstance(loaded, Loaded) else 0
            if num_views >= batch_size or len(waiting) >= 8 * batch_size:
                yield from self._answers(waiting, path_of, product, batch_size, rules)
                waiting, num_views = [], 0
        yield from self._answers(waiting, path_of, product, batch_size, rules)

    def evaluate(
        self,
        labelled: Path | str | Dataset,
        *,
        product: str = "",
        progress: Progress = no_progress,
        each: Callable[[Inspected[Record], NDArray[np.bool_] | None], None] | None = None,
        refused: Callable[[Record, Refusal], None] | None = None,
    ) -> dict[str, Json]:
        """Metrics on the test part of a labelled data set (keys: metrics.md section 7).

        Args:
            labelled: a labelled layout or manifest.
            product: evaluate this product's pictures only.
            each: called with every answer and its mask, e.g. to write them down.
            refused: called with every record that could not be used.
        """
        dataset = labelled if isinstance(labelled, Dataset) else open_dataset(Path(labelled))
        records = [r for r in dataset.for_testing() if not product or r.product == product]
        if not records:
            raise UsageError(
                f"{dataset.root} has no test picture" + (f" of product '{product}'." if product else "."),
                "Give a labelled layout or a manifest with a test part.",
            )
        evaluation = Evaluation(_promise(self.calibration))
        num_refused = 0
        num_known = 0
        known = set(cast("list[str]", self.card.get("picture_keys", [])))
        start = time.perf_counter()
        for done, answer in enumerate(self.inspect_items(records, lambda r: r.path, product=product), 1):
            progress("inspecting", done, len(records))
            try:
                if not isinstance(answer, Inspected):
                    raise FettleError(answer[1].reason)
                record, inspection = answer.item, answer.inspection
                mask = read_mask(record.mask, inspection.anomaly_map.shape)[0] if record.mask else None
                evaluation.update(inspection, record.defect, mask)
            except FettleError as error:
                num_refused += 1
                record = answer.item if isinstance(answer, Inspected) else answer[0]
                if refused is not None:
                    refused(record, Refusal(str(record.path), str(error)))
                continue
            num_known += inspection.sha256[:16] in known
            if each is not None:
                each(answer, mask)
        result = evaluation.compute(time.perf_counter() - start)
        return {**result, "num_refused": num_refused, "num_seen_in_fit": num_known}

    def recalibrated(
        self,
        good: Path | str | Dataset | Sequence[Path],
        *,
        target_frr: float | None = None,
        group: str | None = None,
        strict: bool = False,
        progress: Progress = no_progress,
    ) -> Detector:
        """The same model with thresholds from fresh good pictures; the promise is then exact.

        Pictures that the model has learnt from are left out, with a warning on the card.

        Args:
            target_frr: share of good parts that may be rejected; None keeps the model's.

        Raises:
            DataError: no fresh good picture. CalibrationError: `strict`, and too few of them.
        """
        gathered = gather_good(_good_records(good), group, progress)
        known = set(cast("list[str]", self.card["picture_keys"]))
        fresh = [picture for picture in gathered.pictures if picture.key[:16] not in known]
        num_known = len(gathered.pictures) - len(fresh)
        if not fresh:
            raise DataError(
                f"The model has learnt from all {num_known} pictures given.",
                "Give good pictures that it has not.",
            )
        refused: list[Refusal] = []
        views = judge(
            self.method, fresh, self.frame, device=self.device, progress=progress, refused=refused.append
        )
        judged = gather_judged(views, len(fresh))
        calibration = calibrate(
            judged.scores,
            target_frr=self.calibration.alpha_reject if target_frr is None else target_frr,
            mode="holdout",
            groups=judged.groups if gathered.column else None,
            pixel_statistics=judged.pixel_statistics or None,
            strict=strict,
        )
        warnings: list[Json] = [*self.warnings()]
        if num_known:
            warnings.append(f"{num_known} calibration pictures were learnt from and were left out.")
        unread: list[Json] = [refusal.reason for refusal in [*gathered.refused, *refused]]
        warnings += unread
        promise = " ".join(calibration.sentences())
        changed: dict[str, Json] = {"calibration_refused": unread, "promise": promise, "warnings": warnings}
        return Detector(self.method, self.frame, calibration, {**self.card, **changed}, self.device)

    def save(self, folder: Path | str) -> None:
        """Write the model atomically: a kill at any moment leaves the old model or the new one."""
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "backbone": self.method.backbone.state_dict(),
            "method": _learnt(self.method),
        }
        for fold, method in enumerate(self.fold_methods):
            tensors[f"fold{fold}"] = _learnt(method)
        content: dict[str, Json] = {
            "method": self.method.name,
            "config": self.method.config.model_dump(mode="json"),
            "levels": list(self.method.levels),
            "backbone": cast("dict[str, Json]", asdict(self.method.backbone.spec)),
            "frame": self.frame.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json"),
            "card": self.card,
        }
        write_model(Path(folder), content, tensors)

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> Detector:
        """Read a saved model. No weights are needed elsewhere: the backbone's used layers are inside.

        Raises:
            ModelFolderError: the folder is no model, or damaged, altered, too new or unsafe.
        """
        stored = read_model(Path(folder))
        content = stored.content
        try:
            method_class = find_method(str(content["method"]))
            config = method_class.Config.model_validate(content["config"])
            levels = tuple(cast("list[str]", content["levels"]))
            spec = _backbone_spec(cast("dict[str, object]", content["backbone"]))
            if not all(spec.level(name) for name in levels):
                raise ValueError(f"its backbone has no levels {levels}")
            frame = Frame.model_validate(content["frame"])
            calibration = Calibration.model_validate(content["calibration"])
            card = content["card"]
            if not isinstance(card, dict):
                raise TypeError("its card is no object")
            backbone = backbones.restore_backbone(spec, levels, stored.tensors["backbone"])
            num_folds = sum(part.startswith("fold") for part in stored.tensors)
            parts = ["method", *(f"fold{number}" for number in range(num_folds))]
            methods = [method_class(backbone, config, levels) for _ in parts]
            for method, part in zip(methods, parts, strict=True):
                _load_learnt(cast(torch.nn.Module, method), stored.tensors[part])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelFolderError(
                f"The model {folder} is damaged: {error}.", "Fit it again, or restore it from a copy."
            ) from error
        for method in methods:
            cast(torch.nn.Module, method).to(device).eval()
        return cls(methods[0], frame, calibration, card, device, methods[1:])

    def _answers(
        self,
        waiting: Sequence[Loaded[Item] | tuple[Item, Refusal]],
        path_of: Callable[[Item], Path],
        product: str,
        batch_size: int,
        rules: RegionRules,
    ) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """Answer some decoded pictures; their views go through the network together."""
        loaded = [item for item in waiting if isinstance(item, Loaded)]
        if loaded:
            views = np.concatenate([item.placed.views for item in loaded])
            valid = np.concatenate([item.placed.valid for item in loaded])
            start = time.perf_counter()
            maps, scores = self._run(self.method, views, valid, batch_size)
            fold_scores = [self._run(fold, views, valid, batch_size)[1] for fold in self.fold_methods]
            compute = (time.perf_counter() - start) / len(views)
        first = 0
        for item in waiting:
            if not isinstance(item, Loaded):
                yield item
                continue
            last = first + len(item.placed.views)
            yield self._answer(
                item,
                path_of(item.item),
                maps[first:last],
                scores[first:last],
                [float(of_fold[first:last].max()) for of_fold in fold_scores],
                compute,
                product,
                rules,
            )
            first = last

    def _answer(
        self,
        loaded: Loaded[Item],
        path: Path,
        maps: NDArray[np.float32],
        scores: NDArray[np.float32],
        fold_scores: Sequence[float],
        seconds: float,
        product: str,
        rules: RegionRules,
    ) -> Inspected[Item] | tuple[Item, Refusal]:
        """One picture's answer from its views' maps (n, H, W) and scores (n,)."""
        start = time.perf_counter()
        own_map, valid = self.frame.restore(maps, loaded.placed, loaded.picture.size)
        score = float(scores.max())
        if not np.isfinite(score):
            reason = f"'{path}' got no finite score from the model. Look at its pixels."
            return loaded.item, Refusal(str(path), reason)
        calibration = self.calibration
        threshold = calibration.pixel_threshold
        regions: tuple[Region, ...] = ()
        if threshold is not None:
            regions = find_regions(own_map, valid, threshold, **asdict(rules))
        inspection = Inspection(
            path=str(path),
            score=score,
            verdict=calibration.cross_verdict(fold_scores) if fold_scores else calibration.verdict(score),
            regions=regions,
            anomaly_map=own_map,
            valid=valid,
            seconds={
                "decode": loaded.seconds,
                "compute": seconds * len(maps),
                "regions": time.perf_counter() - start,
            },
            product=product,
            sha256=loaded.picture.sha256,
            notes=loaded.picture.notes + loaded.placed.notes,
        )
        return Inspected(loaded.item, loaded.picture, inspection)

    @torch.inference_mode()
    def _run(
        self, method: Method, views: NDArray[np.float32], valid: NDArray[np.bool_], batch_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Views (n, 3, H, W) -> maps (n, H, W) and scores (n,)."""
        answers = [
            method(
                torch.from_numpy(views[i : i + batch_size]).to(self.device),
                torch.from_numpy(valid[i : i + batch_size]).to(self.device),
            )
            for i in range(0, len(views), batch_size)
        ]
        maps = torch.cat([a.anomaly_map for a in answers]).cpu().numpy()
        return maps, torch.cat([a.score for a in answers]).cpu().numpy()


def _promise(calibration: Calibration) -> Promise:
    rate, count = calibration.frr_promised, calibration.num_scores
    rank = None if rate is None else order_statistic(count, rate, calibration.confidence)
    return Promise(rate, calibration.promise_on, count, rank)


def _learnt(method: Method) -> dict[str, torch.Tensor]:
    """What a method learnt, without its backbone."""
    return {name: t for name, t in method.state_dict().items() if not name.startswith("backbone.")}


def _load_learnt(method: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Set what a method learnt. Buffers take the stored shape, since a memory's size is learnt too."""
    own = {name for name in method.state_dict() if not name.startswith("backbone.")}
    if own != set(state):
        raise ValueError(f"its tensors are {sorted(state)}, not {sorted(own)}")
    buffers = dict(method.named_buffers())
    for name, tensor in state.items():
        place, _, last = name.rpartition(".")
        module = method.get_submodule(place)
        if name in buffers:
            if (tensor.dtype, tensor.ndim) != (buffers[name].dtype, buffers[name].ndim):
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            setattr(module, last, tensor)
        elif getattr(module, last).shape == tensor.shape:
            getattr(module, last).data.copy_(tensor)
        else:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}")


def _backbone_spec(fields: Mapping[str, object]) -> BackboneSpec:
    levels = tuple(Level(**level) for level in cast("list[dict[str, object]]", fields["levels"]))  # type: ignore[arg-type]  # checked by use
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "levels"}
    return BackboneSpec(levels=levels, **rest)  # type: ignore[arg-type]  # a wrong field raises TypeError


def _good_records(good: Path | str | Dataset | Sequence[Path]) -> Dataset:
    if isinstance(good, Dataset):
        return good
    if isinstance(good, Path | str):
        return open_dataset(Path(good))
    records = tuple(Record(Path(path)) for path in sorted(good))
    return Dataset(Path(), "paths", records)
