"""From pictures to inspections: decode ahead, run the network, bring maps back, decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.calibration import Calibration, RegionRules, find_regions
from fettle.images.framing import Frame, Placed, from_input
from fettle.images.loading import Loaded, load_framed
from fettle.images.picture import Picture
from fettle.inspection import Explained, Inspection, Refusal, Region, Verdict
from fettle.protocols import Explains, Json, Method, Remarks
from fettle.refine.f2pad import Refined
from fettle.refine.record import joined
from fettle.refine.refiner import Refiner

Item = TypeVar("Item")


@dataclass(frozen=True)
class Inspected(Generic[Item]):
    """The answer for one item, with the decoded picture that it is about.

    `explained` is there where an explanation was asked for.
    """

    item: Item
    picture: Picture
    inspection: Inspection
    explained: Explained | None = None


class _Seen(NamedTuple):
    """A method's answers for some views: maps (n, H, W), scores (n,), and where it has any remarks (n, R) and
    the folds' scores (n, K)."""

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    remarks: NDArray[np.float32] | None
    fold_scores: NDArray[np.float32] | None

    def of(self, views: slice) -> _Seen:
        return _Seen(*(None if part is None else part[views] for part in self))  # type: ignore[arg-type]  # as its fields


@dataclass(frozen=True)
class Inspector(Generic[Item]):
    """How items become inspections.

    Attributes:
        methods: the fitted method, then the folds' models of a cross calibration.
        frame: how pictures become network input.
        path_of, product_of: each item's picture, and its product ("" where there is none).
        calibration_of: the thresholds of a product.
        batch_size: views that go through the network together.
        rules: which regions are reported.
        explainer: shows the method's inner view of each picture; None: it is not asked for.
        refiner: sharpens maps; None: it is not asked for.
    """

    methods: Sequence[Method]
    frame: Frame
    device: str
    path_of: Callable[[Item], Path]
    product_of: Callable[[Item], str]
    calibration_of: Callable[[str], Calibration]
    batch_size: int
    rules: RegionRules
    explainer: Explains | None = None
    refiner: Refiner | None = None

    def inspect(self, items: Iterable[Item]) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """Answers in the order of `items`. Decoding runs ahead in threads while the network computes."""
        waiting: list[Loaded[Item] | tuple[Item, Refusal]] = []
        num_views = 0
        for loaded in load_framed(items, self.path_of, self.frame):
            waiting.append(loaded)
            num_views += len(loaded.placed.views) if isinstance(loaded, Loaded) else 0
            if num_views >= self.batch_size or len(waiting) >= 8 * self.batch_size:
                yield from self._answers(waiting)
                waiting, num_views = [], 0
        yield from self._answers(waiting)

    def _answers(
        self, waiting: Sequence[Loaded[Item] | tuple[Item, Refusal]]
    ) -> Iterator[Inspected[Item] | tuple[Item, Refusal]]:
        """Answer some decoded pictures; their views go through the network together."""
        loaded = [item for item in waiting if isinstance(item, Loaded)]
        if loaded:
            views = np.concatenate([item.placed.views for item in loaded])
            valid = np.concatenate([item.placed.valid for item in loaded])
            start = time.perf_counter()
            seen = self._run(self.methods[0], views, valid)
            fold_scores = [self._run(fold, views, valid).scores for fold in self.methods[1:]]
            if seen.fold_scores is not None:
                fold_scores = [*seen.fold_scores.T]
            compute = (time.perf_counter() - start) / len(views)
            refined = self._refine(loaded, views, valid, seen, fold_scores)
        first = 0
        for item in waiting:
            if not isinstance(item, Loaded):
                yield item
                continue
            own = slice(first, first + len(item.placed.views))
            yield self._answer(
                item,
                seen.of(own),
                self._verdict(item, seen, fold_scores, own),
                refined[own] if refined else (),
                compute,
            )
            first = own.stop

    def _verdict(
        self, item: Loaded[Item], seen: _Seen, fold_scores: Sequence[NDArray[np.float32]], own: slice
    ) -> Verdict | None:
        """Of the picture with these views; None where its score is not finite."""
        score = float(seen.scores[own].max())
        if not np.isfinite(score):
            return None
        calibration = self.calibration_of(self.product_of(item.item))
        if fold_scores:
            return calibration.cross_verdict([float(of_fold[own].max()) for of_fold in fold_scores])
        return calibration.verdict(score)

    def _refine(
        self,
        loaded: Sequence[Loaded[Item]],
        views: NDArray[np.float32],
        valid: NDArray[np.bool_],
        seen: _Seen,
        fold_scores: Sequence[NDArray[np.float32]],
    ) -> list[Refined]:
        """Every view's refined map, or its base map; empty without a refiner."""
        if self.refiner is None:
            return []
        chosen: list[bool] = []
        pictures: list[int] = []
        products: list[str] = []
        for number, item in enumerate(loaded):
            own = slice(len(chosen), len(chosen) + len(item.placed.views))
            verdict = self._verdict(item, seen, fold_scores, own)
            wanted = verdict is not None and (self.refiner.everything or verdict is not Verdict.OK)
            chosen += [wanted] * len(item.placed.views)
            pictures += [number] * len(item.placed.views)
            products += [self.product_of(item.item)] * len(item.placed.views)
        pixels, inside, maps = (torch.from_numpy(one).to(self.device) for one in (views, valid, seen.maps))
        return self.refiner(self.methods[0], pixels, inside, maps, chosen, pictures, products)

    def _answer(
        self,
        loaded: Loaded[Item],
        seen: _Seen,
        verdict: Verdict | None,
        refined: Sequence[Refined],
        seconds: float,
    ) -> Inspected[Item] | tuple[Item, Refusal]:
        """One picture's answer from what was seen in its views."""
        start = time.perf_counter()
        path, product = self.path_of(loaded.item), self.product_of(loaded.item)
        number = int(seen.scores.argmax())
        score = float(seen.scores[number])
        if verdict is None:
            reason = f"'{path}' got no finite score from the model. Look at its pixels."
            return loaded.item, Refusal(str(path), reason)
        threshold = self.calibration_of(product).pixel_threshold
        maps = np.stack([one.anomaly_map.cpu().numpy() for one in refined]) if refined else seen.maps
        own_map, valid = self.frame.restore(maps, loaded.placed, loaded.picture.size)
        soft = self._soft(refined, loaded, own_map, threshold)
        regions: tuple[Region, ...] = ()
        if threshold is not None or soft is not None:
            cut = np.inf if threshold is None else threshold
            marked = None if soft is None else soft > 0.5
            regions = find_regions(own_map, valid, cut, marked=marked, **asdict(self.rules))
        times = {
            "decode": loaded.seconds,
            "compute": seconds * len(seen.maps),
            "regions": time.perf_counter() - start,
        }
        if refined and any(one.record.gate_reason != "verdict_ok" for one in refined):
            times["refine"] = sum(one.record.seconds for one in refined)
        notes = loaded.picture.notes + loaded.placed.notes + self._remarks(seen, number)
        explained = None
        if self.explainer is not None:
            start = time.perf_counter()
            explained = self._explain(self.explainer, loaded.placed, number)
            times["explain"] = time.perf_counter() - start
            if len(seen.maps) > 1:
                notes += (f"explained: tile {number + 1} of {len(seen.maps)}, which has the highest score",)
        inspection = Inspection(
            path=str(path),
            score=score,
            verdict=verdict,
            regions=regions,
            anomaly_map=own_map,
            valid=valid,
            seconds=times,
            product=product,
            sha256=loaded.picture.sha256,
            notes=notes,
            soft=soft,
            refinement=self._refinement(refined, seen),
        )
        return Inspected(loaded.item, loaded.picture, inspection, explained)

    def _soft(
        self,
        refined: Sequence[Refined],
        loaded: Loaded[Item],
        own_map: NDArray[np.float32],
        threshold: float | None,
    ) -> NDArray[np.float32] | None:
        """A refiner's soft mask at the picture's size, (H, W), and where it says nothing the map, a half at
        its threshold; None where it says nothing at all."""
        if all(one.soft is None for one in refined):
            return None
        nothing = np.zeros_like(refined[0].anomaly_map.cpu().numpy())
        parts = [
            np.stack([nothing if one is None else one.float().cpu().numpy() for one in views])
            for views in ([one.soft for one in refined], [one.speaks for one in refined])
        ]
        soft, speaks = (self.frame.restore(part, loaded.placed, loaded.picture.size)[0] for part in parts)
        soft = np.minimum(soft / np.maximum(speaks, np.float32(0.5)), 1)  # of those alone that speak there
        rest = np.zeros_like(soft)
        if threshold is not None and threshold > 0:
            rest = np.clip(own_map / np.float32(2 * threshold), 0, 1)
        return np.where(speaks > 0.5, soft, rest)

    def _refinement(self, refined: Sequence[Refined], seen: _Seen) -> dict[str, Json] | None:
        """What was done to a picture, of its views the one with the highest score first."""
        if self.refiner is None:
            return None
        order = sorted(range(len(refined)), key=lambda i: -seen.scores[i])
        record = joined([refined[i].record for i in order])
        return {"refiner": self.refiner.name, **record.to_json()}

    def _remarks(self, seen: _Seen, number: int) -> tuple[str, ...]:
        """What the method says of one view."""
        method = self.methods[0]
        if seen.remarks is None or not isinstance(method, Remarks):
            return ()
        return method.remark(seen.remarks[number].tolist())

    @torch.no_grad()
    def _explain(self, explainer: Explains, placed: Placed, number: int) -> Explained:
        """The inner view of one view of a picture, alone: batch mates then change nothing in it."""
        view, valid = placed.views[number], placed.valid[number]
        found = explainer.explain(
            torch.from_numpy(view[None]).to(self.device), torch.from_numpy(valid[None]).to(self.device)
        )
        return Explained(
            view=from_input(view),
            valid=valid[0],
            maps={name: values[0].float().cpu().numpy() for name, values in found.maps.items()},
            numbers=found.numbers,
            words=found.words,
            pictures={name: from_input(own[0].float().cpu().numpy()) for name, own in found.pictures.items()},
        )

    @torch.inference_mode()
    def _run(self, method: Method, views: NDArray[np.float32], valid: NDArray[np.bool_]) -> _Seen:
        """What a method answers for views (n, 3, H, W), a batch after another."""
        size = self.batch_size
        answers = [
            method(
                torch.from_numpy(views[i : i + size]).to(self.device),
                torch.from_numpy(valid[i : i + size]).to(self.device),
            )
            for i in range(0, len(views), size)
        ]
        remarks = [a.remarks for a in answers if a.remarks is not None]
        fold_scores = [a.fold_scores for a in answers if a.fold_scores is not None]
        return _Seen(
            torch.cat([a.anomaly_map for a in answers]).cpu().numpy(),
            torch.cat([a.score for a in answers]).cpu().numpy(),
            torch.cat(remarks).cpu().numpy() if remarks else None,
            torch.cat(fold_scores).cpu().numpy() if fold_scores else None,
        )
