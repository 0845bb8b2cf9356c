"""PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265): distance to the nearest remembered good patch.

A memory bank keeps a greedy k-centre choice of good patches; a patch scores its Euclidean distance to the
nearest of them. Sections named in comments are those of the base methods' specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.coreset import Chosen, CoresetStream, draw_projection, sparse_projection
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.neighbours import (
    FlatIndex,
    Nearest,
    grids_pay,
    half_squared_norms,
    k_nearest,
    nearest,
    nearest_on_grids,
)
from fettle.layers.pixel_map import pixel_map, valid_tokens
from fettle.protocols import (
    Backbone,
    FeatureBatch,
    FeatureStream,
    FitRecord,
    LeftOut,
    Level,
    Maps,
    Preset,
    Run,
    Traits,
)

_MATRIX_ROWS = 8192  # beyond, faiss is up to twice as fast as the matrix product


class PatchCoreConfig(BaseModel):
    """Fields of PatchCore.

    Attributes:
        levels: backbone levels, fine to coarse; None takes strides 8 and 16, or two middle blocks of a ViT.
        embedding: "concat" joins the levels' channels; "pooled" is the paper's (512 + 1024 channels to 1024).
        bank_rows: cap on the memory bank's rows; 0 for no cap.
        bank_ratio: share of all good patches to keep; None for the cap alone.
        selection: "greedy" is exact k-centre; "approximate" samples first (section 4.4).
        projection_dims: dims of the random projection in which the choice is made; None by the
            Johnson-Lindenstrauss rule (section 4.1).
        search: "matrix" (torch, any device, what an export holds) or "faiss" (CPU); both are exact. "auto"
            takes faiss where it is faster: on a CPU, for more than 8,192 rows.
        neighbours: k, the mean distance to the k nearest rows is the patch's score.
        reweight: b of the paper's equation 7; 0 is off.
        score: picture score: "map_max" of the final map or "patch_max" before smoothing.
        sigma: blur of the map, framed px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: tuple[str, ...] | None = None
    embedding: Literal["concat", "pooled"] = "concat"
    bank_rows: int = Field(default=4096, ge=0)
    bank_ratio: float | None = Field(default=None, gt=0, le=1)
    selection: Literal["greedy", "approximate"] = "greedy"
    projection_dims: int | None = Field(default=None, ge=1)
    search: Literal["auto", "matrix", "faiss"] = "auto"
    neighbours: int = Field(default=1, ge=1, le=50)
    reweight: int = Field(default=0, ge=0, le=50)
    score: Literal["map_max", "patch_max"] = "map_max"
    sigma: float = Field(default=4.0, ge=0, le=100)

    @staticmethod
    def few_shot(preset: str) -> dict[str, object]:
        """What a few-shot fit changes: below 10,000 patches all are kept."""
        return {"bank_rows": 10_000, "bank_ratio": None}


class PatchCore(nn.Module):
    """Memory bank of good patches. See the module's text."""

    name: ClassVar[str] = "patchcore"
    Config: ClassVar[type[PatchCoreConfig]] = PatchCoreConfig
    traits: ClassVar[Traits] = Traits(
        trained=False,
        multi_class=True,
        few_shot=True,
        fixed_grid=False,
        square_grid=False,
        leave_one_out=True,
        exports=("onnx", "openvino", "pt2"),
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(PatchCoreConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(
            PatchCoreConfig(
                embedding="pooled", bank_rows=0, bank_ratio=0.1, projection_dims=128, score="patch_max"
            ),
            backbone="wide_resnet50_2",
            frame="crop",
            size=256,
        ),
    }

    bank: Tensor

    def __init__(self, backbone: Backbone, config: PatchCoreConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        self.register_buffer("bank", torch.empty(0, 0))  # (rows, D)
        self.scale = EnergyScale()
        # Group number of each bank row, and of each group: known during the fit only.
        self._owners = torch.empty(0, dtype=torch.int64)
        self._owner_of: dict[str, int] = {}
        # Of this bank; made when first searched.
        self._flat: tuple[Tensor, FlatIndex] | None = None
        self._norms: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if config.embedding == "pooled":
            _check_pooled([backbone.spec.level(name) for name in levels])

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: PatchCoreConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these."""
        if config.levels is not None:
            return config.levels
        strides = {level.stride for level in offered}
        if len(strides) > 1:
            return tuple(level.name for level in offered if level.stride in (8, 16))
        blocks = [level.name for level in offered if level.name.startswith("block")]
        return (blocks[len(blocks) // 2 - 1], blocks[3 * len(blocks) // 4 - 1])

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Locally averaged, joined patch features (section 3.1): {"patches": (B, D, h, w)}."""
        return {"patches": self._joined(self._levels(pictures))}

    def _levels(self, pictures: Tensor) -> list[Tensor]:
        """The levels (B, C, h, w), finest first; averaged locally where they are to be joined as they are."""
        by_name = self.backbone(pictures, self.levels)
        levels = [by_name[name] for name in self.levels]
        if self.config.embedding == "pooled":
            return levels
        return [F.avg_pool2d(level, 3, stride=1, padding=1) for level in levels]

    def _joined(self, levels: Sequence[Tensor]) -> Tensor:
        if self.config.embedding == "pooled":
            return pooled_embedding(levels[0], levels[1])
        grid = levels[0].shape[-2:]
        resized = [
            level
            if level.shape[-2:] == grid
            else F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
            for level in levels
        ]
        return torch.cat(resized, dim=1)

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Choose the memory bank from a stream of good pictures (sections 4.3 and 4.5).

        Raises:
            DataError: the bank would be empty.
        """
        owner_of: dict[str, int] = {}
        paths: dict[str, str] = {}
        stream: CoresetStream | None = None
        for batch in good:
            if stream is None:
                # A picture may come as several views (tiles), always in one batch.
                rows_each = int(_tokens(batch).sum()) / len(set(batch.keys))
                dims = batch.features["patches"].shape[1]
                stream = self._new_stream(dims, round(rows_each * good.num_pictures), run)
            paths |= zip(batch.keys, batch.paths or batch.keys, strict=True)
            for rows, group in zip(_valid_rows(batch), batch.groups, strict=True):
                stream.add(rows, owner_of.setdefault(group, len(owner_of)))
        if stream is None:
            raise DataError("There is no good picture to learn from.", "Give a folder of good pictures.")
        chosen = stream.finish()
        del stream
        self.bank = _rows_by_arrival(good, chosen, paths)
        self._owners = chosen.owners
        self._owner_of = owner_of
        return FitRecord(
            facts={
                "bank_rows": len(self.bank),
                "bank_dims": self.bank.shape[1],
                "bank_radius_bound": chosen.radius,
                "bank_reductions": chosen.reductions,
            }
        )

    def _new_stream(self, num_features: int, expected_rows: int, run: Run) -> CoresetStream:
        rows = self.config.bank_rows or expected_rows
        if self.config.bank_ratio is not None:
            rows = min(rows, int(self.config.bank_ratio * expected_rows))
        if rows < 1:
            raise DataError(
                f"{self.config.bank_ratio:.2%} of {expected_rows} patches is no row at all.",
                "Raise bank_ratio or give more good pictures.",
            )
        generator = run.generator("patchcore/projection")
        projection = draw_projection(num_features, max(expected_rows, 2), generator)
        if self.config.projection_dims is not None:
            projection = sparse_projection(num_features, self.config.projection_dims, generator)
        memory_mib = run.memory_mib
        if self.config.bank_ratio is not None:  # a fixed share is chosen among all patches at once
            dims = num_features if projection is None else projection.shape[1]
            floats = expected_rows * (dims + 16) + rows * num_features
            memory_mib = max(memory_mib, math.ceil(1.1 * 4 * floats / 2**20) + 128)
        stream = CoresetStream(
            num_features,
            rows,
            projection=projection,
            memory_mib=memory_mib,
            expected_rows=expected_rows,
            sample=run.generator("patchcore/sample") if self.config.selection == "approximate" else None,
            progress=run.progress,
        )
        seconds, mib = stream.expect(expected_rows)
        run.say(
            f"The memory bank keeps {min(rows, expected_rows):,} of about {expected_rows:,} patches: "
            f"about {seconds:.0f} s and {mib:.0f} MiB."
        )
        return stream

    @torch.no_grad()
    def left_out(self, good: FeatureStream, run: Run) -> Iterator[LeftOut]:
        """Each good picture against the bank rows of other groups only (section 8.3)."""
        for batch in good:
            patches = batch.features["patches"]
            for i, (key, group) in enumerate(zip(batch.keys, batch.groups, strict=True)):
                others = self.bank[self._owners != self._owner_of[group]]
                if len(others) == 0:  # the whole bank is its own: nobody is left to judge it
                    continue
                one, valid = patches[i : i + 1], batch.valid[i : i + 1]
                distance, index = self._search(one, others)
                maps = self._maps(one, valid, distance, index, others)
                yield LeftOut(key, group, maps, valid, distance)

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        levels = self._levels(pictures)
        patches = self._joined(levels)
        if self._on_grids(levels):
            row = nearest_on_grids(levels, self.bank, self._half_norms())
            distance = (patches - self.bank[row].permute(0, 3, 1, 2)).square().sum(dim=1).sqrt()
            return self._maps(patches, valid, distance, row[..., None], self.bank)
        distance, index = self._search(patches, self.bank)
        return self._maps(patches, valid, distance, index, self.bank)

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): sqrt(min_m ||u - m||^2 + 1e-8) on the stored scale (section 7).

        The nearest row is found anew at each call and held fixed for the gradient.
        """
        patches = self.features(pictures, valid)["patches"]
        with torch.no_grad():
            _, index = self._search(patches, self.bank)
        difference = patches - self.bank[index[..., 0]].permute(0, 3, 1, 2)  # (B, D, h, w)
        energy: Tensor = self.scale((difference.square().sum(dim=1) + 1e-8).sqrt())
        return energy

    def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
        """The same of parts of frames: the bank knows no places."""
        return self.patch_energy(pictures, valid)

    def _on_grids(self, levels: Sequence[Tensor]) -> bool:
        """Whether levels meet the bank on their own grids. Engines would copy products to resample them."""
        config = self.config
        return (
            config.embedding == "concat"
            and config.neighbours == 1
            and self._route(self.bank) == "matrix"
            and not torch.compiler.is_exporting()
            and grids_pay(levels)
        )

    def _search(self, patches: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, D, h, w) -> patch score (B, h, w) and bank rows (B, h, w, k), nearest first."""
        batch, dims, height, width = patches.shape
        queries = patches.permute(0, 2, 3, 1).reshape(-1, dims)
        if self.config.neighbours == 1:
            squared, row = self._nearest(queries, bank)
            return squared.sqrt().view(batch, height, width), row.view(batch, height, width, 1)
        squared, rows = k_nearest(queries, bank, min(self.config.neighbours, len(bank)), chunk=_chunk())
        distance = squared.sqrt().mean(dim=1)
        return distance.view(batch, height, width), rows.view(batch, height, width, -1)

    def _nearest(self, queries: Tensor, bank: Tensor) -> Nearest:
        """By matrix products, or by an index of the whole bank; the same rows and distances."""
        if (
            self._route(bank) == "matrix" or bank is not self.bank
        ):  # one with rows left out lives for one search
            return nearest(queries, bank, chunk=_chunk())
        if self._flat is None or self._flat[0] is not bank:
            self._flat = (bank, FlatIndex(bank))
        return self._flat[1].nearest(queries)

    def _half_norms(self) -> Tensor:
        if self._norms is None or self._norms[0] is not self.bank:
            self._norms = (self.bank, half_squared_norms(self.bank))
        return self._norms[1]

    def _route(self, bank: Tensor) -> Literal["matrix", "faiss"]:
        if torch.compiler.is_exporting():
            return "matrix"
        if self.config.search != "auto":
            return self.config.search
        return "faiss" if len(bank) > _MATRIX_ROWS and not bank.is_cuda else "matrix"

    def _maps(self, patches: Tensor, valid: Tensor, distance: Tensor, index: Tensor, bank: Tensor) -> Maps:
        anomaly_map = pixel_map(distance, valid, self.config.sigma)
        if self.config.score == "map_max":
            return Maps(anomaly_map, anomaly_map.flatten(1).amax(dim=1))
        tokens = valid_tokens(valid, (distance.shape[-2], distance.shape[-1]))
        score, place = distance.masked_fill(~tokens, 0).flatten(1).max(dim=1)  # (B,)
        if self.config.reweight > 1:
            rows = torch.arange(place.shape[0], device=place.device)
            worst = patches.flatten(2)[rows, :, place]  # (B, D)
            neighbour = index.flatten(1, 2)[rows, place, 0]
            score = reweighted(worst, bank, neighbour, self.config.reweight)
        return Maps(anomaly_map, score)


def _forget(method: PatchCore, keys: object) -> None:
    """A state was loaded into the bank: what is known of the former one is stale."""
    method._flat = method._norms = None


def _tokens(batch: FeatureBatch) -> Tensor:
    """Which patches are valid, (B, h, w) bool."""
    height, width = batch.features["patches"].shape[-2:]
    return valid_tokens(batch.valid, (height, width))


def _valid_rows(batch: FeatureBatch) -> Iterator[Tensor]:
    """The valid patches of each view, (n, D)."""
    patches = batch.features["patches"].permute(0, 2, 3, 1)
    for view, own in zip(patches, _tokens(batch), strict=True):
        yield view[own]


def _rows_by_arrival(good: FeatureStream, chosen: Chosen, paths: Mapping[str, str]) -> Tensor:
    """The chosen patches, (k, D), fetched from the stream in another walk.

    Args:
        paths: of the pictures in the first walk, by key.

    Raises:
        DataError: one of them is missing now.
    """
    bank = torch.empty(0)
    begin = 0
    missing = dict(paths)
    for batch in good:
        for key in batch.keys:
            missing.pop(key, None)
        for rows in _valid_rows(batch):
            if not begin:
                bank = rows.new_empty(len(chosen.arrivals), rows.shape[1], dtype=torch.float32)
            here = ((chosen.arrivals >= begin) & (chosen.arrivals < begin + len(rows))).nonzero()[:, 0]
            bank[here.to(rows.device)] = rows[(chosen.arrivals[here] - begin).to(rows.device)].float()
            begin += len(rows)
    if missing:
        raise DataError(
            f"'{next(iter(missing.values()))}' was changed or removed while it was learnt from.",
            "Put it back, or fit without it.",
        )
    return bank


def _chunk() -> int | None:
    """Queries that meet the bank at once; an exported graph does not know how many there will be."""
    return None if torch.compiler.is_exporting() else 1024


def reweighted(worst: Tensor, bank: Tensor, neighbour: Tensor, num_support: int) -> Tensor:
    """The paper's picture score (eq. 7): s* (1 - softmax of the distances to m*'s neighbours, at m*).

    Args:
        worst: u*, the patch with the largest distance, (B, D).
        bank: (M, D).
        neighbour: m*, the row nearest to u*, (B,).
        num_support: b, rows nearest to m* in the bank, m* itself among them.
    """
    _, support = k_nearest(  # (B, b), m* first
        bank[neighbour], bank, min(num_support, len(bank)), chunk=_chunk()
    )
    distances = (worst[:, None] - bank[support]).norm(dim=2)
    return reweighted_score(distances)


def reweighted_score(distances: Tensor) -> Tensor:
    """s = s* (1 - exp(s*) / sum exp(d)), with the maximum taken out first. (B, b), m* first -> (B,)."""
    return distances[:, 0] * (1 - distances.softmax(dim=1)[:, 0])


def pooled_embedding(fine: Tensor, coarse: Tensor) -> Tensor:
    """The paper's 1024-dim embedding of 512 + 1024 channels as fixed convolutions (section 3.1).

    Equal to unfolding 3 x 3 patches and adaptive average pooling to 1024, twice.
    """
    channels = fine.shape[1]
    kernel = fine.new_full((channels, 1, 3, 3), 0.1)
    kernel[:, :, 1, 1] = 0.2
    first = F.conv2d(fine, kernel, padding=1, groups=channels)
    batch, _, height, width = coarse.shape
    pairs = coarse.reshape(batch, channels, 2, height, width).mean(dim=2)
    second = F.interpolate(
        F.avg_pool2d(pairs, 3, stride=1, padding=1),
        size=fine.shape[-2:],
        mode="bilinear",
        align_corners=False,
    )
    return torch.cat([first, second], dim=1)


def _check_pooled(levels: Sequence[Level | None]) -> None:
    channels = [level.channels if level else 0 for level in levels]
    if channels != [512, 1024]:
        raise ConfigError(
            f"embedding 'pooled' is defined for levels of 512 and 1024 channels, not {channels}.",
            "Use --set embedding=concat, or a backbone of the ResNet-50 family.",
        )
