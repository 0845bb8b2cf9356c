"""A frozen backbone's features, computed once and kept on disk: an epoch then costs the head only.

Features are rounded through half precision whether they are kept or not, and always computed in chunks of
one size, so that a training with the cache and one without it end at the same weights.
"""

from fettle.feature_cache.pictures import TrainingPictures, recipe_key
from fettle.feature_cache.store import FeatureCache, half_precision

__all__ = ["FeatureCache", "TrainingPictures", "half_precision", "recipe_key"]
