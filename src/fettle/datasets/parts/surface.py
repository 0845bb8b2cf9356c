"""What a part is made of, and the light and camera that make a picture of it.

A surface is lit by one soft lamp (Lambert's diffuse law and Blinn and Phong's highlight over a height field).
The camera adds exposure, a lighting gradient, vignetting, shot and read noise and the sRGB curve. All of it
acts on single pixels after the slopes are taken, so a change of the surface stays where it was made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fettle.datasets.parts.canvas import Canvas, Draw, Field, noise, ramp

Colour = tuple[float, float, float]
"""Linear red, green, blue, 0..1."""

_SENSOR_LEVELS = 4096  # 12 bits, as an industrial camera has
_FULL_SCALE = 1.6  # linear light at the sensor's largest level


def srgb(code: str) -> Colour:
    """Linear light of a colour such as "#c8a24a"."""
    parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return linear[0], linear[1], linear[2]


@dataclass(frozen=True)
class Surface:
    """What the light meets, pixel by pixel.

    Attributes:
        albedo: float32 (3, H, W), linear share of light sent back, 0..1.
        height: (H, W), canvas units, larger is nearer to the camera.
        gloss: (H, W), strength of the highlight, 0 matt to about 1.
        metal: (H, W), 0 for paint, wood or plastic, 1 for bare metal (its highlight takes its colour).
        exposed: (H, W), share of the lamp that shadows and narrow places leave, 0..1.
        shininess: how narrow the highlight is (Blinn's exponent).
    """

    albedo: Field
    height: Field
    gloss: Field
    metal: Field
    exposed: Field
    shininess: float = 30.0


def plain(
    canvas: Canvas, colour: Colour, *, gloss: float = 0.0, metal: float = 0.0, shininess: float = 30.0
) -> Surface:
    """A flat surface of one colour."""
    albedo = np.empty((3, canvas.size, canvas.size), np.float32)
    albedo[:] = np.array(colour, np.float32)[:, None, None]
    full = canvas.full
    return Surface(albedo, full(0), full(gloss), full(metal), full(1), shininess)


def mix(below: Field, above: Field | float, cover: Field) -> Field:
    """`below` where `cover` is 0, `above` where it is 1."""
    return below + (above - below) * cover


def tint(surface: Surface, colour: Colour, cover: Field) -> Surface:
    """The surface with its colour changed to `colour` where `cover` is 1."""
    target = np.array(colour, np.float32)[:, None, None]
    return replace(surface, albedo=surface.albedo + (target - surface.albedo) * cover)


def lay(below: Surface, above: Surface, cover: Field) -> Surface:
    """`above` laid on `below` where `cover` is 1. Heights are those of `above` there."""
    return Surface(
        mix(below.albedo, above.albedo, cover),
        mix(below.height, above.height, cover),
        mix(below.gloss, above.gloss, cover),
        mix(below.metal, above.metal, cover),
        mix(below.exposed, above.exposed, cover),
        above.shininess,
    )


@dataclass(frozen=True)
class Rig:
    """Lamp and camera of one picture.

    Attributes:
        lamp: unit vector towards the lamp (x, y, towards the camera).
        gradient: change of the lamp's light over one canvas unit along x and y.
        vignette: loss of light in the corners, 0..1.
        exposure: gain of the camera.
        balance: gains of red, green, blue.
        shot, read: noise: variance a unit of signal, and standard deviation at no signal (linear, 0..1).
    """

    lamp: tuple[float, float, float]
    gradient: tuple[float, float]
    vignette: float
    exposure: float
    balance: Colour
    shot: float
    read: float

    @classmethod
    def jittered(cls, draw: Draw) -> Rig:
        """The rig of one picture: lamp at the upper left, everything a little different each time."""
        rng = draw("rig")
        azimuth = math.radians(rng.uniform(-147, -123))
        elevation = math.radians(rng.uniform(46, 56))
        flat = math.cos(elevation)
        strength, turn = rng.uniform(0.04, 0.2), azimuth + rng.uniform(-0.6, 0.6)
        iso = math.exp(rng.uniform(-0.45, 0.45))
        return cls(
            lamp=(flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)),
            gradient=(strength * math.cos(turn), strength * math.sin(turn)),
            vignette=rng.uniform(0.06, 0.16),
            exposure=math.exp(rng.normal(0, 0.09)),
            balance=(1 + rng.normal(0, 0.012), 1.0, 1 + rng.normal(0, 0.016)),
            shot=4e-4 * iso,
            read=2.2e-3 * math.sqrt(iso),
        )


def _slopes(height: Field, px: float) -> tuple[Field, Field]:
    """Central differences of the height, bounded so that a steep edge stays a bright or dark line."""
    down, across = np.empty_like(height), np.empty_like(height)
    half = 0.5 / px
    down[1:-1] = (height[2:] - height[:-2]) * half
    across[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * half
    down[0], down[-1] = down[1], down[-2]
    across[:, 0], across[:, -1] = across[:, 1], across[:, -2]
    return np.clip(across, -2, 2, out=across), np.clip(down, -2, 2, out=down)


def shade(surface: Surface, rig: Rig, canvas: Canvas) -> Field:
    """Linear light (3, H, W) that reaches the camera, before exposure and noise."""
    across, down = _slopes(surface.height, canvas.px)
    facing = 1 / np.sqrt(1 + across * across + down * down)  # z of the normal (-across, -down, 1)
    lx, ly, lz = rig.lamp
    hx, hy, hz = lx, ly, lz + 1  # half way between lamp and camera
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    hx, hy, hz = hx / length, hy / length, hz / length
    lambert = np.maximum(lz - lx * across - ly * down, 0) * facing
    half = np.maximum(hz - hx * across - hy * down, 0) * facing
    # exp(-s (1 - c)) is the usual smooth stand-in for c^s; a wide lobe serves as the metal's surroundings.
    shine = np.exp(surface.shininess * (half - 1))
    wide = np.exp(5.0 * (half - 1))
    diffuse = (0.30 + 0.92 * lambert) * (1 - 0.8 * surface.metal)
    mirrored = surface.metal * (0.18 + 0.95 * wide) + surface.gloss * surface.metal * shine * 0.6
    glint = surface.gloss * (1 - surface.metal) * shine * 0.55
    light = surface.albedo * ((diffuse + mirrored) * surface.exposed)
    light += glint * surface.exposed
    return light


def _falloff(rig: Rig, canvas: Canvas) -> Field:
    """(H, W): lighting gradient and vignette."""
    gradient = 1 + rig.gradient[0] * canvas.x + rig.gradient[1] * canvas.y
    return gradient * (1 - rig.vignette * 0.5 * (canvas.x**2 + canvas.y**2))


@lru_cache(maxsize=1)
def _tone_curve() -> NDArray[np.uint8]:
    """8-bit sRGB value of each sensor level; a soft shoulder above 70 % keeps highlights from clipping."""
    linear = np.arange(_SENSOR_LEVELS) * (_FULL_SCALE / (_SENSOR_LEVELS - 1))
    knee = 0.7
    over = np.maximum(linear - knee, 0)
    linear = np.minimum(linear, knee) + (1 - knee) * (1 - np.exp(-over / (1 - knee)))
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    levels: NDArray[np.float64] = np.clip(np.round(encoded * 255), 0, 255)
    return levels.astype(np.uint8)


def expose(light: Field, rig: Rig, canvas: Canvas, draw: Draw) -> NDArray[np.uint8]:
    """The camera's picture, uint8 (H, W, 3), of linear light (3, H, W)."""
    gain = _falloff(rig, canvas) * np.float32(rig.exposure * (_SENSOR_LEVELS - 1) / _FULL_SCALE)
    unit = (_SENSOR_LEVELS - 1) / _FULL_SCALE  # sensor levels a unit of linear light
    grain = draw("sensor").standard_normal(light.shape, dtype=np.float32)
    # Demosaicking spreads each photosite a little: neighbours share some of their noise.
    grain[:, :, 1:] += 0.45 * grain[:, :, :-1]
    curve = _tone_curve()
    pixels = np.empty((canvas.size, canvas.size, 3), np.uint8)
    for channel, balance in enumerate(rig.balance):  # one channel at a time stays in the processor's cache
        signal = light[channel] * gain
        signal *= balance
        spread = signal * (rig.shot * unit / 1.2025)
        spread += (rig.read * unit) ** 2 / 1.2025
        np.sqrt(np.maximum(spread, 0, out=spread), out=spread)
        spread *= grain[channel]
        signal += spread
        pixels[..., channel] = curve.take(signal.astype(np.int32), mode="clip")
    return pixels


def backdrop(canvas: Canvas, draw: Draw, colour: Colour, *, grain: float = 0.1) -> Surface:
    """A matt mat or belt under a part, `grain` rough."""
    rng = draw("backdrop")
    side = canvas.size
    mottle = noise(rng, side, 110, 110) * grain + noise(rng, side, 4, 4) * (grain * 0.35)
    surface = plain(canvas, colour, gloss=0.02)
    return replace(surface, albedo=surface.albedo * np.maximum(1 + mottle, 0.1))


def cast_shadow(distance: Field, softness: float, strength: float) -> Field:
    """(H, W): light left beside a part, from the (shifted) distance to it."""
    return 1 - strength * ramp(1 - distance / softness)
