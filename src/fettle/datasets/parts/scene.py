"""What a product's builder gives back, and what the generic defects need to know of a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fettle.datasets.parts.canvas import Canvas, Draw, Field
from fettle.datasets.parts.surface import Colour, Surface


@dataclass(frozen=True)
class Scene:
    """One part on its background.

    Attributes:
        surface: the whole picture's surface, background included.
        body: signed distance to where surface defects may lie (negative inside), canvas units.
        changed: coverage of the structural fault that was built in; None for a sound part.
    """

    surface: Surface
    body: Field
    changed: Field | None = None


@dataclass(frozen=True)
class Look:
    """How the generic defects look on a product.

    Attributes:
        scratch: brightness of a strong scratch relative to the surface (-0.4: 40 % darker).
        stains: linear colours that a stain tends to.
        under: linear colour seen through a hole.
        dent: depth of a strong dent, canvas units.
        grain: angle along which cracks run (radians in the part's frame), None for any.
    """

    scratch: float
    stains: tuple[Colour, ...]
    under: Colour
    dent: float
    grain: float | None = None


Build = Callable[[Canvas, Draw, str | None], Scene]
"""build(canvas, draw, fault): the part with the structural fault, or sound (None)."""


@dataclass(frozen=True)
class Product:
    """A product: how it is built, which faults its builder knows, and how the generic defects look on it."""

    build: Build
    faults: tuple[str, ...]
    surface_defects: tuple[str, ...]
    look: Look
