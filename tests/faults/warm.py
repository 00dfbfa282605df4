"""Imported once by the process that all children are forked from: what is slow to load."""

import functools

import torch

import vitrine.cli.display
import vitrine.cli.train
import vitrine.data.sources
import vitrine.run

torch.set_num_threads(1)
vitrine.data.sources.load_shapes = functools.cache(vitrine.data.sources.load_shapes)
for part in ("train", "test"):
    vitrine.data.sources.load_shapes(part)
