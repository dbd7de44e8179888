"""Stages, their manifests and resumable work: how an artifact comes into being and when it counts as current."""
