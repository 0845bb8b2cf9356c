"""Frozen networks that turn pictures into features, and where their weights come from."""

from fettle.backbones.registry import (
    BackboneEntry,
    backbone_names,
    load_backbone,
    register_backbone,
    restore_backbone,
)

__all__ = ["BackboneEntry", "backbone_names", "load_backbone", "register_backbone", "restore_backbone"]
