"""Full-frame textures: a woven fabric and a wooden board."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fettle.datasets.parts.canvas import Canvas, Draw, Field, Pose, coverage, noise, ramp, texture_side
from fettle.datasets.parts.scene import Look, Product, Scene
from fettle.datasets.parts.surface import plain, srgb

_PITCH = 0.076  # canvas units from thread to thread


def _thread_table(rng: np.random.Generator, spread: float) -> Field:
    """A random value for each of 64 threads."""
    return (rng.standard_normal(64) * spread).astype(np.float32)


def woven_fabric(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A twill of blue warp and pale weft.

    Faults: missing (a length of one warp thread), misweave (a weft floats over warps it should pass under).
    """
    pose = Pose.jittered(draw, 0.06, math.radians(3.5))
    u, v = pose.local(canvas)
    rng = draw("weave")
    side, px = canvas.size, canvas.px
    # Threads wander a little; the phase of the loom is any.
    a = (
        u + rng.uniform(0, 4 * _PITCH) + 0.010 * noise(rng, side, 3, 7) + 0.0035 * noise(rng, side, 16, 24)
    ) / _PITCH
    b = (
        v + rng.uniform(0, 4 * _PITCH) + 0.010 * noise(rng, side, 7, 3) + 0.0035 * noise(rng, side, 24, 16)
    ) / _PITCH
    warp, weft = np.floor(a), np.floor(b)
    s, t = a - warp - np.float32(0.5), b - weft - np.float32(0.5)  # -0.5..0.5 across each thread
    warp_id, weft_id = warp.astype(np.int32) + 32 & 63, weft.astype(np.int32) + 32 & 63
    over = np.mod(warp + weft, 3) < 2  # 2/1 twill: the warp lies on top two times of three
    fault_rng = draw("fault")
    changed, gap = None, canvas.full(0)
    if fault is not None:
        row, column = (int(n) for n in fault_rng.integers(side // 4, 3 * side // 4, 2))
        hit_warp, hit_weft = float(warp[row, column]), float(weft[row, column])
        if fault == "missing":
            length = fault_rng.uniform(5, 9)
            ends = np.abs(b - hit_weft) - length / 2
            strip = np.maximum(np.abs(a - hit_warp - np.float32(0.5)) - np.float32(0.5), ends) * _PITCH
            changed, gap = coverage(strip, px), coverage(strip - px, px)
        else:
            span = int(fault_rng.integers(3, 7))
            ends = np.abs(a - hit_warp - np.float32(span / 2)) - np.float32(span / 2)
            changed = coverage(
                np.maximum(np.abs(b - hit_weft - np.float32(0.5)) - np.float32(0.5), ends) * _PITCH, px
            )
            over = over & ~((weft == hit_weft) & (warp >= hit_warp) & (warp < hit_warp + span))
    warp_round = np.sqrt(np.maximum(1 - (s * 2.05) ** 2, 0)) * (0.72 + 0.28 * np.cos(t * math.pi))
    weft_round = np.sqrt(np.maximum(1 - (t * 2.05) ** 2, 0)) * (0.72 + 0.28 * np.cos(s * math.pi))
    on_top = np.where(over, warp_round, weft_round)
    # Plies twisted into each thread show as slanted lines.
    ply_warp = np.sin((b * 2.2 + s * 1.8) * (2 * math.pi))
    ply_weft = np.sin((a * 2.2 - t * 1.8) * (2 * math.pi))
    ply = np.where(over, ply_warp, ply_weft)
    fuzz = noise(rng, side, 120, 120)
    tone_warp = _thread_table(rng, 0.07)[warp_id]
    tone_weft = _thread_table(rng, 0.06)[weft_id]
    tone = 1 + np.where(over, tone_warp, tone_weft) + 0.09 * ply + 0.09 * fuzz
    blue, pale = np.array(srgb("#3d5f8f"), np.float32), np.array(srgb("#c3c1b4"), np.float32)
    top = over.astype(np.float32)
    albedo = (pale[:, None, None] + (blue - pale)[:, None, None] * top) * tone
    hollow = 0.22 + 0.82 * on_top
    cloth = plain(canvas, (0, 0, 0), gloss=0.05, shininess=12)
    height = 0.024 * on_top + 0.0012 * ply
    # Where a warp thread is gone, the wefts lie bare and low.
    bare = np.sqrt(np.maximum(1 - (t * 2.05) ** 2, 0))
    bare_albedo = pale[:, None, None] * (0.82 * (1 + tone_weft + 0.09 * ply_weft + 0.09 * fuzz))
    albedo = albedo + (bare_albedo - albedo) * gap
    height = height + (0.02 * bare - height) * gap
    exposed = hollow + ((0.12 + 0.62 * bare) - hollow) * gap
    surface = replace(cloth, albedo=albedo, height=height, exposed=exposed)
    return Scene(surface, canvas.full(-1), changed)


def wooden_board(canvas: Canvas, draw: Draw, fault: str | None) -> Scene:
    """A planed pine board with a groove. Fault: missing (the groove ends early: the cutter was lifted)."""
    pose = Pose.jittered(draw, 0.05, math.radians(2.5))
    u, v = pose.local(canvas)
    rng = draw("grain")
    side, big, px = canvas.size, texture_side(canvas), canvas.px
    warp = noise(rng, side, 4, 2) * 0.05 + noise(rng, side, 9, 3) * 0.012
    # A board is a flat cut through a cone of rings: its rings show as nested arches.
    pith = rng.uniform(-0.25, 0.25)
    arch = 0.13 * (u + rng.uniform(1.0, 1.6))
    ring = (np.sqrt((v - pith + warp) ** 2 + arch * arch) + warp * 0.4) * rng.uniform(7.5, 9.0) + rng.uniform(
        0, 1
    )
    phase = ring - np.floor(ring)
    late = (
        phase * phase * phase * ramp((1 - phase) / 0.09)
    )  # latewood darkens slowly and ends at a sharp line
    streaks = noise(rng, big, big, 7) * 0.6 + noise(rng, big, big // 2, 22) * 0.55
    fibre = pose.carry(streaks, canvas)
    pores = np.maximum(pose.carry(noise(rng, big, big, 34), canvas) - 1.15, 0)
    light, dark = np.array(srgb("#d9b27c"), np.float32), np.array(srgb("#8f5a2c"), np.float32)
    grade = np.clip(0.10 + 0.72 * late + 0.05 * fibre + 0.06 * noise(rng, side, 3, 2), 0, 1)
    albedo = light[:, None, None] + (dark - light)[:, None, None] * grade
    albedo = albedo * (1 + 0.055 * fibre - 0.13 * pores)
    groove = np.abs(v - np.float32(0.62)) - np.float32(0.035)
    changed = None
    if fault == "missing":
        fault_rng = draw("fault")
        side_of = float(fault_rng.choice([-1.0, 1.0]))
        stop = u * side_of - fault_rng.uniform(0.25, 0.75)
        changed = coverage(np.maximum(groove, -stop) - np.float32(0.02), px)
        groove = np.maximum(groove, stop)
    cut = ramp(-groove / 0.02 + 0.5)
    board = plain(canvas, (0, 0, 0), gloss=0.12, shininess=14)
    height = 0.0011 * fibre + 0.002 * late - 0.03 * cut - 0.002 * pores
    surface = replace(board, albedo=albedo, height=height, exposed=1 - 0.42 * cut)
    return Scene(surface, canvas.full(-1), changed)


WOVEN_FABRIC = Product(
    woven_fabric,
    ("missing", "misweave"),
    ("stain", "hole", "crack", "fibre"),
    Look(
        scratch=-0.2,
        stains=(srgb("#4a3626"), srgb("#27303a"), srgb("#6d6a35")),
        under=srgb("#14161a"),
        dent=0.02,
        grain=math.pi / 2,
    ),
)
WOODEN_BOARD = Product(
    wooden_board,
    ("missing",),
    ("scratch", "dent", "stain", "crack", "hole", "fibre"),
    Look(
        scratch=0.28,
        stains=(srgb("#3a2a20"), srgb("#6b7a55"), srgb("#5a4636")),
        under=srgb("#1d120a"),
        dent=0.03,
        grain=0.0,
    ),
)
