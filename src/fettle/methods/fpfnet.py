"""FPFNet (Xu, Zang, Wu, arXiv 2604.19259): UniAD with two switches.

The network, the training and the judging are UniAD's, see `methods/uniad.py`. The first switch is `pool`:
features are disturbed in training by one of several perturbations, not by UniAD's jitter alone. The second
is `fusion`: sums of encoder and decoder layers without a parameter. With `pool="gaussian"` and
`fusion="none"` this is UniAD bit for bit. Only the paper's abstract was at hand: what the pool holds and
where the sums go are readings of it.
"""

from __future__ import annotations

from typing import ClassVar

from fettle.methods.uniad import Fusion, Uniad, UniadConfig
from fettle.perturb.pool import NAMED_POOLS, PoolConfig
from fettle.protocols import Preset


class FPFNetConfig(UniadConfig):
    """Fields of `UniadConfig`; the two switches are on by default."""

    pool: PoolConfig = NAMED_POOLS["fpfnet"]
    fusion: Fusion = "encoder_decoder"


def _switched_on(preset: Preset) -> Preset:
    kept = preset.config.model_dump(exclude={"pool", "fusion"})
    return preset._replace(config=FPFNetConfig.model_validate(kept))


class FPFNet(Uniad):
    """UniAD with the pool and the fusion on."""

    name: ClassVar[str] = "fpfnet"
    Config: ClassVar[type[UniadConfig]] = FPFNetConfig
    presets: ClassVar[dict[str, Preset]] = {
        name: _switched_on(preset) for name, preset in Uniad.presets.items()
    }
