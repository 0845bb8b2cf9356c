"""Detector: frame + backbone + method + calibration, the façade that most users need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from fettle.calibration import Calibration, RegionRules
from fettle.datasets.open import open_dataset
from fettle.datasets.products import open_products
from fettle.datasets.records import Dataset, Record
from fettle.errors import DataError, ModelFolderError, UsageError, first_failing, nearest_name
from fettle.exported import ExportedMethod, refuse_unproven
from fettle.fitting import FittedParts, fit_parts, make_request
from fettle.gathering import GatheredPictures, gather_good
from fettle.images.framing import Frame
from fettle.inspecting import Inspected, Inspector
from fettle.inspection import ComparedWith, Inspection, Refusal
from fettle.judged import Calibrations
from fettle.labelled_run import LabelledRun
from fettle.memory import views_together
from fettle.methods.registry import find_method, method_names
from fettle.model_folder import read_model, write_model
from fettle.model_parts import pack, unpack
from fettle.processes import check_device
from fettle.protocols import (
    Explains,
    Json,
    Method,
    Progress,
    no_progress,
    no_words,
)
from fettle.recalibrating import GivenTemplate, fit_column, recalibrate
from fettle.refine.facts import stand_in_facts
from fettle.refine.refiner import Refiner, make_refiner
from fettle.refining import ForRefiners
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
        for_refiners: what refiners know of good pictures; None: the model was fitted without.
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
        for_refiners: ForRefiners | None = None,
    ) -> None:
        self.method = method
        self.fold_methods = tuple(fold_methods)
        self.frame = frame
        self.calibration = calibration
        self.card = dict(card)
        self.device = device
        self.product_calibrations = dict(product_calibrations or {})
        self.for_refiners = for_refiners

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
        return cls.of(fit_parts(_good_records(good), request, progress, say), request.device)

    @classmethod
    def of(cls, parts: FittedParts, device: str) -> Detector:
        """From its parts, which are on the device already."""
        return cls(
            parts.method,
            parts.frame,
            parts.calibrations.shared,
            parts.card,
            device,
            parts.fold_methods,
            parts.calibrations.by_product,
            parts.for_refiners,
        )

    @property
    def num_fit(self) -> int:
        """Good pictures that the model has learnt from."""
        return cast(int, cast("dict[str, Json]", self.card["data"])["pictures"])

    def warnings(self) -> list[str]:
        """What a user should know of this model: fallbacks, refused pictures, weak spots."""
        of_calibration = cast("list[str]", self.card.get("calibration_notes", []))
        return [*cast("list[str]", self.card["warnings"]), *of_calibration]

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
        self.refuse_exported("shows no inner view")
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

    def refiner(
        self,
        name: str,
        *,
        everything: bool = False,
        preset: str | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Refiner | None:
        """What sharpens this model's maps; None for "none".

        Args:
            name: "f2pad", "difference", "grabcut", "guided", "blur" or "none", see `refine.refiner`.
            everything: pictures whose verdict is ok, too.
            preset: of F2PAD, see `refine.settings.PRESETS`; None: compact.
            settings: fields of its `F2PADConfig` to change.

        Raises:
            UsageError: no such refiner, an exported model, or OpenCV is not installed and it needs that.
            ConfigError: a setting that F2PAD does not have, or a value that it does not take.
        """
        if name == "none":
            return None
        self.refuse_exported(
            f"cannot be refined with '{name}': its graph gives no gradients or patch energies"
        )
        facts, references, product_facts = self.for_refiners or ForRefiners(
            stand_in_facts(self.calibration.pixel_threshold), None
        )
        if references is not None:
            references = references.to(self.device)
        return make_refiner(
            name,
            facts,
            references,
            product_facts=product_facts,
            everything=everything,
            preset=preset,
            settings=settings,
        )

    def inspect(
        self,
        paths: Iterable[Path | str],
        *,
        product: str = "",
        batch_size: int | None = None,
        refine: str | Refiner | None = None,
    ) -> Iterator[Inspection | Refusal]:
        """Inspect pictures in their order. A picture that cannot be read comes as a `Refusal`.

        Args:
            batch_size: views that go through the network at once; None: as many as are fastest, see
                `memory.views_together`. It changes no answer.
            refine: name of a refiner, or one made by `refiner`; by name it takes pictures whose verdict is
                review or reject.

        Raises:
            UsageError: an unknown product or refiner, no batch, or one path in place of several.
        """
        if isinstance(paths, str | Path):
            raise UsageError("One path is given where several are meant.", "Write inspect([path]).")
        items = (Path(path) for path in paths)
        refiner = self.refiner(refine) if isinstance(refine, str) else refine
        answers = self.inspect_items(
            items, lambda p: p, product=product, batch_size=batch_size, refiner=refiner
        )
        return (answer.inspection if isinstance(answer, Inspected) else answer[1] for answer in answers)

    def inspect_items(
        self,
        items: Iterable[Item],
        path_of: Callable[[Item], Path],
        *,
        product: str = "",
        batch_size: int | None = None,
        rules: RegionRules | None = None,
        explain: bool = False,
        refiner: Refiner | None = None,
    ) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """As `inspect`, with the item and the decoded picture beside each answer.

        Decoding runs ahead in threads while the network computes. Answers come in the order of `items`.

        Args:
            explain: with the method's inner view beside each answer, for one more pass of the network; of a
                picture in tiles, that of the tile with the highest score.
            refiner: made by `refiner`; None: maps stay as they are.

        Raises:
            UsageError: an unknown product, no batch, or a method that cannot explain.
        """
        self.calibration_of(product)  # a wrong name is refused now
        inspector = self._inspector(path_of, lambda item: product, batch_size, rules, explain, refiner)
        return inspector.inspect(items)

    def _inspector(
        self,
        path_of: Callable[[Item], Path],
        product_of: Callable[[Item], str],
        batch_size: int | None = None,
        rules: RegionRules | None = None,
        explain: bool = False,
        refiner: Refiner | None = None,
    ) -> Inspector[Item]:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"A batch of {batch_size} is none.", "Give batch_size 1 or more.")
        return Inspector(
            methods=(self.method, *self.fold_methods),
            frame=self.frame,
            device=self.device,
            path_of=path_of,
            product_of=product_of,
            calibration_of=self.calibration_of,
            batch_size=views_together(self.device) if batch_size is None else batch_size,
            rules=rules or RegionRules(),
            explainer=self.explainer() if explain else None,
            refiner=refiner,
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
        refiner: Refiner | None = None,
        boundaries: bool = False,
    ) -> dict[str, Json]:
        """Metrics on the test part of a labelled data set (keys: docs/metrics.md).

        A model of many products gives `per_product`, `mean` and `pooled` instead, see `labelled_run`.

        Args:
            labelled: a labelled layout or manifest; for many products also a folder of such.
            product: evaluate this product's pictures only.
            each: called with every answer and its mask, e.g. to write them down.
            refused: called with every record that could not be used.
            explain: `each` gets the method's inner view too, as from `inspect_items`.
            refiner: made by `refiner`; figures of pixels are then those of refined maps.
            boundaries: with IoU, boundary F and Hausdorff-95 too; a refiner brings them.
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
            self._inspector(lambda record: record.path, product_of, explain=explain, refiner=refiner),
            frozenset(cast("list[str]", self.card.get("picture_keys", []))),
            progress,
            each,
            refused,
            boundaries=boundaries or refiner is not None,
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
        product: str = "",
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
            product: of a model of several: `good` is of this one, or it alone is taken from it. Thresholds of
                others stay, and so do the shared ones, which come from all.
            group: column of pictures that belong together; None: that of the fit, where these have it.
            template: a good picture for the method to compare with from now on. Scores change with it, so
                every product needs fresh pictures.
            template_product: the product whose template it replaces; "" where there is one template.

        Raises:
            DataError: no fresh good picture, or none of some product where the template changes.
            CalibrationError: `strict`, and too few of them.
            UsageError: a template, and the method takes none; a product of a model of one; an exported model.
            PictureError: the template cannot be read.
        """
        self.refuse_exported("keeps its thresholds, which lie in its graph")
        if template_product and template is None:
            raise UsageError("A template's product is named, but no template.", "Give --template FILE too.")
        by_product = bool(self.product_calibrations)
        if product and not by_product:
            raise UsageError("The model knows no products.", "Leave --product out.")

        def gather() -> GatheredPictures:
            known = by_product and isinstance(good, Path | str)
            fresh = self.open_labelled(Path(cast(str, good)), product) if known else _good_records(good)
            if product:
                fresh = replace(fresh, records=tuple(r for r in fresh.records if r.product == product))
            column, usual = group, fit_column(self.card)
            if column is None and usual and any(record.columns.get(usual) for record in fresh.records):
                column = usual
            gathered = gather_good(fresh, column, progress, by_product=by_product)
            for name in sorted({picture.product for picture in gathered.pictures}):
                self.calibration_of(name)  # an unknown product is refused before the work
            return gathered

        changed = recalibrate(
            replace(self.parts(), fold_methods=()),
            gather,
            template=None if template is None else GivenTemplate(Path(template), template_product),
            target_frr=target_frr,
            strict=strict,
            device=self.device,
            progress=progress,
        )
        return Detector.of(changed, self.device)

    def save(self, folder: Path | str) -> None:
        """Write the model atomically: a kill at any moment leaves the old model or the new one.

        Raises:
            UsageError: it is an exported one, or the folder holds something else.
        """
        self.refuse_exported("is not saved anew: copy its folder")
        write_model(Path(folder), *pack(self.parts()))

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu", trusted: bool = False) -> Detector:
        """Read a saved or an exported model. No weights are needed elsewhere: the backbone is inside.

        Args:
            device: of a saved model; the engine of an exported one computes on the CPU.
            trusted: read a pt2 graph too, though torch may execute what such a file holds.

        Raises:
            ModelFolderError: the folder is no model, or damaged, altered, too new or unsafe; or an exported
                one that is too far from the model that it was made from.
            UsageError: the engine of an exported model is not installed, or it is pt2 and not trusted; the
                device cannot be used.
        """
        check_device(device)
        stored = read_model(Path(folder))
        refuse_unproven(Path(folder), stored.content.get("export"), trusted)
        try:
            parts = unpack(stored)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = first_failing(error) if isinstance(error, ValidationError) else error
            raise ModelFolderError(
                f"The model {folder} is damaged: {why}.", "Fit it again, or restore it from a copy."
            ) from error
        for method in (parts.method, *parts.fold_methods):
            cast(torch.nn.Module, method).to(device).eval()
        return cls.of(parts, device)

    def refuse_exported(self, what: str) -> None:
        """Raises UsageError where the method is an exported graph, which cannot do this."""
        if isinstance(self.method, ExportedMethod):
            self.method.refuse(what)

    def parts(self) -> FittedParts:
        """What the detector is made of."""
        calibrations = Calibrations(self.calibration, self.product_calibrations)
        return FittedParts(
            self.method, self.fold_methods, self.frame, calibrations, self.card, self.for_refiners
        )


def _good_records(good: Path | str | Dataset | Sequence[Path]) -> Dataset:
    if isinstance(good, Dataset):
        return good
    if isinstance(good, Path | str):
        return open_dataset(Path(good))
    records = tuple(Record(Path(path)) for path in sorted(good))
    return Dataset(Path(), "paths", records)
