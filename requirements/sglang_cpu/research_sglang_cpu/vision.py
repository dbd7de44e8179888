"""Let torchvision's build for CUDA, the one that PyPI has, be imported beside torch's build for CPUs; its operators are never called.

SGLang imports torchvision when it starts. The line of a .pth file imports this module in every process of the environment, and the two
operators that torchvision's Python part refers to are declared just before it is imported.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from typing import Any

__all__: list[str] = []

_DECLARED: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # A declaration lasts as long as its library.
        _DECLARED.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
