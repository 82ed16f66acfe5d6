"""Stand-ins for modules that the compared libraries need to import beside one another.

Import this first, in the environment of `tools/make_peers.sh`.
"""

import contextlib
import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")

import torch

# The CPU build of torch stands beside a torchvision built for GPUs, whose operators do not load;
# two of them are declared, which is all that its import needs.
with contextlib.suppress(RuntimeError):
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# Overcomplete 0.3.0 asks matplotlib for a function that version 3.11 does not have any more.
with contextlib.suppress(ImportError):
    colour_maps = importlib.import_module("matplotlib.cm")
    if not hasattr(colour_maps, "get_cmap"):
        known = importlib.import_module("matplotlib").colormaps
        colour_maps.get_cmap = lambda name: known[name]  # pyright: ignore[reportAttributeAccessIssue]
