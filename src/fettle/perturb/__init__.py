"""Seeded disturbances of features, used in training only. See `perturb.base` for their one interface."""
