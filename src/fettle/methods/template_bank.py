"""The templates that TFA-Net stores: what a person sees of them, and what the network needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fettle.errors import ModelFolderError
from fettle.images.template_png import from_png, to_png
from fettle.protocols import FramedPicture, Template


@dataclass(frozen=True)
class NewTemplate:
    """A template on its way into the bank.

    Attributes:
        picture: as shown. name, product: of it.
        fused: its features (1, C, h, w). vector: pooled, (1, C).
    """

    picture: FramedPicture
    name: str
    product: str
    fused: Tensor
    vector: Tensor


class Label(NamedTuple):
    """What a template's file was called, the hash of its bytes, and what it shows."""

    name: str
    sha256: str
    product: str


class TemplateBank(nn.Module):
    """M templates in buffers: all that is known of them lies in the state dict."""

    png: Tensor  # uint8, all files one after another
    png_ends: Tensor  # (M,) int64
    labels: Tensor  # uint8, JSON
    fused: Tensor  # (M, C, h, w) half
    valid: Tensor  # (M, 1, H, W) bool
    vectors: Tensor  # (M, C)
    tokens: Tensor  # (M, N, d), with their positions: what inspection needs of `fused`

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("png", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("png_ends", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("fused", torch.zeros(0, 0, 0, 0, dtype=torch.float16))
        self.register_buffer("valid", torch.zeros(0, 1, 0, 0, dtype=torch.bool))
        self.register_buffer("vectors", torch.zeros(0, 0))
        self.register_buffer("tokens", torch.zeros(0, 0, 0))

    def __len__(self) -> int:
        return len(self.png_ends)

    def store(self, templates: Sequence[NewTemplate]) -> None:
        """Put these in place of all others."""
        shown = [one.picture for one in templates]
        files = [to_png(one.pixels[0].cpu().numpy(), one.valid[0, 0].cpu().numpy()) for one in shown]
        labels = [Label(one.name, one.picture.sha256, one.product) for one in templates]
        self._describe(files, labels)
        # As it comes back from a file: a convolution's last bits depend on how its input lies in memory.
        self.fused = torch.cat([one.fused for one in templates]).half().contiguous()
        self.valid = torch.cat([one.valid for one in shown])
        self.vectors = torch.cat([one.vector for one in templates])

    def replace(self, number: int, template: NewTemplate) -> None:
        """Put this in place of one."""
        alone = TemplateBank()
        alone.store([template])
        files, labels = [self._file(i) for i in range(len(self))], self.known()
        files[number], labels[number] = alone._file(0), alone.known()[0]
        self._describe(files, labels)
        for name in ("fused", "valid", "vectors"):
            changed = getattr(self, name).clone()
            changed[number] = getattr(alone, name)[0]
            setattr(self, name, changed)

    def check(self) -> None:
        """Raises ValueError where the buffers, which may come from a file, do not fit together."""
        sizes = {len(part) for part in (self.png_ends, self.fused, self.valid, self.vectors)}
        ends = [0, *self.png_ends.tolist()]
        fit = ends == sorted(ends) and ends[-1] == len(self.png)
        if len(sizes) > 1 or not fit or (len(self) and self.vectors.shape[1] != self.fused.shape[1]):
            raise ValueError("its templates do not fit together")

    def known(self) -> list[Label]:
        """Each template's label.

        Raises:
            ModelFolderError: they are damaged.
        """
        text = self.labels.cpu().numpy().tobytes()
        if not text:
            return []
        try:
            labels = [Label(*(str(part) for part in row)) for row in json.loads(text)]
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelFolderError(
                f"The labels of the model's templates are damaged: {error}.", "Fit it again."
            ) from error
        if len(labels) != len(self):
            raise ModelFolderError(f"{len(labels)} labels name {len(self)} templates.", "Fit it again.")
        return labels

    def label(self, number: int) -> str:
        """A template's name and product, in words."""
        known = self.known()[number]
        return f"'{known.name}'" + (f" of {known.product}" if known.product else "")

    def templates(self) -> list[Template]:
        """What is shown. Raises ModelFolderError where a file is damaged."""
        found = []
        for number, label in enumerate(self.known()):
            pixels, valid = from_png(self._file(number))
            found.append(Template(*label, torch.from_numpy(pixels), torch.from_numpy(valid[None])))
        return found

    def _file(self, number: int) -> bytes:
        ends = [0, *self.png_ends.tolist()]
        file: bytes = self.png[ends[number] : ends[number + 1]].cpu().numpy().tobytes()
        return file

    def _describe(self, files: Sequence[bytes], labels: Sequence[Label]) -> None:
        device = self.png.device
        ends = torch.tensor([len(file) for file in files], dtype=torch.int64).cumsum(0)
        self.png, self.png_ends = _as_bytes(b"".join(files)).to(device), ends.to(device)
        self.labels = _as_bytes(json.dumps(labels).encode()).to(device)


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
