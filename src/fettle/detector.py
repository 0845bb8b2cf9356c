"""Detector: frame + backbone + method + calibration, the façade that most users need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.backbones import registry as backbones
from fettle.calibration import Calibration, RegionRules
from fettle.datasets.open import open_dataset
from fettle.datasets.products import open_products
from fettle.datasets.records import Dataset, Record
from fettle.errors import DataError, ModelFolderError, UsageError, nearest_name
from fettle.fitting import FittedParts, fit_parts, make_request
from fettle.gathering import GatheredPictures, gather_good
from fettle.images.framing import Frame
from fettle.inspecting import Inspected, Inspector
from fettle.inspection import ComparedWith, Inspection, Refusal
from fettle.judging import Calibrations
from fettle.labelled_run import LabelledRun
from fettle.methods.registry import find_method, method_names
from fettle.model_folder import read_model, write_model
from fettle.protocols import (
    BackboneSpec,
    Explains,
    Json,
    Level,
    Method,
    Progress,
    no_progress,
    no_words,
)
from fettle.recalibrating import GivenTemplate, recalibrate
from fettle.templates import shown_templates

__all__ = ["Detector", "Inspected"]

Item = TypeVar("Item")


class Detector:
    """A fitted model. Make one with `Detector.fit` or `Detector.load`.

    Attributes:
        method: the fitted method, its backbone inside.
        frame: how pictures become network input.
        calibration: thresholds and what they promise.
        card: the model card: data, weights, seeds, versions, fit facts, fallbacks.
        fold_methods: with cross calibration, the folds' models, which decide the verdict.
        product_calibrations: thresholds by product, for a model of many products; else empty.
    """

    def __init__(
        self,
        method: Method,
        frame: Frame,
        calibration: Calibration,
        card: Mapping[str, Json],
        device: str,
        fold_methods: Sequence[Method] = (),
        product_calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        self.method = method
        self.fold_methods = tuple(fold_methods)
        self.frame = frame
        self.calibration = calibration
        self.card = dict(card)
        self.device = device
        self.product_calibrations = dict(product_calibrations or {})

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
                taken), or the pictures' paths; with `multi_class` a folder of products or a manifest that
                names them.
            settings: the fields of `FitRequest`: method, preset, backbone, weights, size, frame, group,
                seed, ...

        Raises:
            UsageError: a wrong name or value. DataError: no usable picture. WeightsError: no weights.
        """
        request = make_request(settings)
        if request.multi_class and isinstance(good, Path | str):
            good = open_products(Path(good), request.products)
        parts = fit_parts(_good_records(good), request, progress, say)
        return cls(
            parts.method,
            parts.frame,
            parts.calibrations.shared,
            parts.card,
            request.device,
            parts.fold_methods,
            parts.calibrations.by_product,
        )

    @property
    def num_fit(self) -> int:
        """Good pictures that the model has learnt from."""
        return cast(int, cast("dict[str, Json]", self.card["data"])["pictures"])

    def warnings(self) -> list[str]:
        """What a user should know of this model: fallbacks, refused pictures, weak spots."""
        return cast("list[str]", self.card["warnings"])

    def describe(self, product: str = "") -> dict[str, Json]:
        """The model card in full: what it learnt from, with what, and what it promises (for a product)."""
        hidden = ("picture_keys", "promise")
        calibration = self.calibration_of(product)
        spec = asdict(self.method.backbone.spec)
        backbone = {name: spec[name] for name in ("id", "sha256", "source", "licence")}
        return {
            "name": f"{self.method.name} on {spec['id']}",
            "promise": " ".join(calibration.sentences()),
            "method": self.method.name,
            "configuration": self.method.config.model_dump(mode="json"),
            "backbone": {**backbone, "levels": list(self.method.levels)},
            "frame": self.frame.model_dump(mode="json"),
            "calibration": calibration.model_dump(mode="json", exclude={"scores"}),
            **self._describe_products(),
            **{name: value for name, value in self.card.items() if name not in hidden},
        }

    def _describe_products(self) -> dict[str, Json]:
        if not self.product_calibrations:
            return {}
        described: dict[str, Json] = {
            name: {
                "promise": " ".join(own.sentences()),
                "calibration": own.model_dump(mode="json", exclude={"scores"}),
            }
            for name, own in self.product_calibrations.items()
        }
        return {"products": described}

    def calibration_of(self, product: str) -> Calibration:
        """The thresholds of a product; the shared ones where products are not known, or not told.

        Raises:
            UsageError: the model knows products, but not this one.
        """
        if not product or not self.product_calibrations:
            return self.calibration
        if product not in self.product_calibrations:
            known = self.product_calibrations
            raise UsageError(f"The model has no product '{product}'.", nearest_name(product, known))
        return self.product_calibrations[product]

    def explainer(self) -> Explains:
        """The method, as one that shows its inner view.

        Raises:
            UsageError: it cannot.
        """
        if not isinstance(self.method, Explains):
            able = [name for name in method_names() if hasattr(find_method(name), "explain")]
            raise UsageError(
                f"The method '{self.method.name}' cannot explain what it sees.",
                f"Leave the explanation out, or fit a method that can: {', '.join(able)}.",
            )
        return self.method

    def templates(self) -> list[ComparedWith]:
        """The good pictures that the method compares others with; none where it compares with none."""
        return shown_templates(self.method)

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
        explain: bool = False,
    ) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """As `inspect`, with the item and the decoded picture beside each answer.

        Decoding runs ahead in threads while the network computes. Answers come in the order of `items`.

        Args:
            explain: with the method's inner view beside each answer, for one more pass of the network; of a
                picture in tiles, that of the tile with the highest score.

        Raises:
            UsageError: an unknown product, or a method that cannot explain.
        """
        self.calibration_of(product)  # a wrong name is refused now
        return self._inspector(path_of, lambda item: product, batch_size, rules, explain).inspect(items)

    def _inspector(
        self,
        path_of: Callable[[Item], Path],
        product_of: Callable[[Item], str],
        batch_size: int = 8,
        rules: RegionRules | None = None,
        explain: bool = False,
    ) -> Inspector[Item]:
        return Inspector(
            methods=(self.method, *self.fold_methods),
            frame=self.frame,
            device=self.device,
            path_of=path_of,
            product_of=product_of,
            calibration_of=self.calibration_of,
            batch_size=batch_size,
            rules=rules or RegionRules(),
            explainer=self.explainer() if explain else None,
        )

    def evaluate(
        self,
        labelled: Path | str | Dataset,
        *,
        product: str = "",
        progress: Progress = no_progress,
        each: Callable[[Inspected[Record], NDArray[np.bool_] | None], None] | None = None,
        refused: Callable[[Record, Refusal], None] | None = None,
        explain: bool = False,
    ) -> dict[str, Json]:
        """Metrics on the test part of a labelled data set (keys: metrics.md section 7).

        A model of many products gives `per_product`, `mean` and `pooled` instead, see `labelled_run`.

        Args:
            labelled: a labelled layout or manifest; for many products also a folder of such.
            product: evaluate this product's pictures only.
            each: called with every answer and its mask, e.g. to write them down.
            refused: called with every record that could not be used.
            explain: `each` gets the method's inner view too, as from `inspect_items`.
        """
        dataset = labelled if isinstance(labelled, Dataset) else self.open_labelled(Path(labelled), product)
        records = [r for r in dataset.for_testing() if not product or r.product == product]
        if not records:
            raise UsageError(
                f"{dataset.root} has no test picture" + (f" of product '{product}'." if product else "."),
                "Give a labelled layout or a manifest with a test part.",
            )
        for name in sorted({record.product for record in records}):
            self.calibration_of(name)  # an unknown product is refused before the work
        several = bool(self.product_calibrations) and not product
        product_of = (
            (lambda record: record.product) if self.product_calibrations else (lambda record: product)
        )
        run = LabelledRun(
            self._inspector(lambda record: record.path, product_of, explain=explain),
            frozenset(cast("list[str]", self.card.get("picture_keys", []))),
            progress,
            each,
            refused,
        )
        if several:
            return run.evaluate_products(records, self.calibration, self.calibration_of)
        return run.evaluate(records, self.calibration_of(product))

    def open_labelled(self, path: Path, product: str = "") -> Dataset:
        """Read a data set as this model needs it: the products that the model knows, where it knows some.

        Args:
            product: the path may then also be this product alone.
        """
        if not self.product_calibrations:
            return open_dataset(path)
        if not product:
            return open_products(path, tuple(self.product_calibrations), missing_ok=True)
        try:
            return open_products(path, (product,))
        except DataError:  # not several products
            alone = open_dataset(path)
            return replace(alone, records=tuple(replace(r, product=product) for r in alone.records))

    def recalibrated(
        self,
        good: Path | str | Dataset | Sequence[Path],
        *,
        target_frr: float | None = None,
        group: str | None = None,
        template: Path | str | None = None,
        template_product: str = "",
        strict: bool = False,
        progress: Progress = no_progress,
    ) -> Detector:
        """The same model with thresholds from fresh good pictures; the promise is then exact.

        Pictures that the model has learnt from are left out, with a warning on the card. This detector stays
        as it is.

        Args:
            target_frr: share of good parts that may be rejected; None keeps the model's.
            template: a good picture for the method to compare with from now on. Scores change with it, so
                every product needs fresh pictures.
            template_product: the product whose template it replaces; "" where there is one template.

        Raises:
            DataError: no fresh good picture, or none of some product where the template changes.
            CalibrationError: `strict`, and too few of them.
            UsageError: a template, and the method takes none. PictureError: it cannot be read.
        """
        if template_product and template is None:
            raise UsageError("A template's product is named, but no template.", "Give --template FILE too.")
        by_product = bool(self.product_calibrations)

        def gather() -> GatheredPictures:
            known = self.open_labelled(Path(good)) if by_product and isinstance(good, Path | str) else good
            gathered = gather_good(_good_records(known), group, progress, by_product=by_product)
            for name in sorted({picture.product for picture in gathered.pictures}):
                self.calibration_of(name)  # an unknown product is refused before the work
            return gathered

        calibrations = Calibrations(self.calibration, self.product_calibrations)
        changed = recalibrate(
            FittedParts(self.method, (), self.frame, calibrations, self.card),
            gather,
            template=None if template is None else GivenTemplate(Path(template), template_product),
            target_frr=target_frr,
            strict=strict,
            device=self.device,
            progress=progress,
        )
        return Detector(
            changed.method,
            changed.frame,
            changed.calibrations.shared,
            changed.card,
            self.device,
            product_calibrations=changed.calibrations.by_product,
        )

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
            "product_calibrations": {
                name: own.model_dump(mode="json") for name, own in self.product_calibrations.items()
            },
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
            by_product = {
                name: Calibration.model_validate(own)
                for name, own in cast("dict[str, object]", content.get("product_calibrations", {})).items()
            }
            card = content["card"]
            if not isinstance(card, dict):
                raise TypeError("its card is no object")
            backbone = backbones.restore_backbone(spec, levels, stored.tensors["backbone"])
            num_folds = sum(part.startswith("fold") for part in stored.tensors)
            parts = ["method", *(f"fold{number}" for number in range(num_folds))]
            methods = [method_class(backbone, config, levels) for _ in parts]
            for method, part in zip(methods, parts, strict=True):
                _load_learnt(cast(torch.nn.Module, method), stored.tensors[part])
                cast(torch.nn.Module, method).eval()  # a method may then compute with what it learnt
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelFolderError(
                f"The model {folder} is damaged: {error}.", "Fit it again, or restore it from a copy."
            ) from error
        for method in methods:
            cast(torch.nn.Module, method).to(device).eval()
        return cls(methods[0], frame, calibration, card, device, methods[1:], by_product)


def _learnt(method: Method) -> dict[str, torch.Tensor]:
    """What a method learnt, without its backbone; trained weights in what the configuration says."""
    state = {name: t for name, t in method.state_dict().items() if not name.startswith("backbone.")}
    if getattr(method.config, "stored", "fp32") == "fp16":  # they were rounded as the training ended
        trained = {name for name, p in cast(torch.nn.Module, method).named_parameters() if p.requires_grad}
        state |= {name: tensor.half() for name, tensor in state.items() if name in trained}
    return state


def _load_learnt(method: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Set what a method learnt. Buffers take the stored shape, since a memory's size is learnt too, and so do
    parameters that have no rows yet."""
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
            continue
        parameter = getattr(module, last)
        if (
            parameter.numel() == 0
            and parameter.ndim == tensor.ndim
            and parameter.shape[-1] == tensor.shape[-1]
        ):
            # of a grid that was not known yet
            parameter.data = tensor.to(parameter.dtype)
        elif parameter.shape == tensor.shape:
            parameter.data.copy_(tensor)
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
