"""Seeded disturbances of features, used in training only. `perturbation` says what they have in common."""
