"""`python -m tasks.local.kubernetes WORKSPACE [--image IMAGE] [--parts N]`: the retriever's manifests with memory from what it will serve.

Reads manifests and infra/k8s/base/retriever.yaml; asks no cluster. The request is what one replica needs to answer from memory:
the process, its encoder, and the pages of index and passages it maps. The limit adds a quarter.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from research_rl.errors import ResearchError
from research_rl.index.text import reads_vectors
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.terminal import say

__all__ = ["main", "memory_mib", "rendered"]

_TEMPLATE = CHECKOUT / "infra" / "k8s" / "base" / "retriever.yaml"
_MIB = 1 << 20
_PROCESS_MIB, _TORCH_MIB = 250, 500
_LIMIT = 1.25


def memory_mib(workspace: Workspace, parts: int = 1) -> int:
    """Return the MiB that a replica of one of `parts` equal parts needs. Raises ManifestError when a stage is missing."""
    corpus, embed, index = (manifest.load(workspace.folder(name), verify=False) for name in ("corpus", "embed", "index"))
    vectors = _bytes(embed, "vectors-") if reads_vectors(index) else 0
    encoder = _bytes(embed, "encoder/")
    torch = _TORCH_MIB if embed.facts["encoder"]["kind"] == "sentence" or vectors else 0
    # The index is shared out among the parts; every part holds all passages.
    mapped = (_bytes(index, "") + vectors) / parts + _bytes(corpus, "")
    return round(_PROCESS_MIB + torch + (2 * encoder + mapped) / _MIB)


def _bytes(artifact: Manifest, prefix: str) -> int:
    return sum(entry.size for entry in artifact.files if entry.path.startswith(prefix))


def rendered(workspace: Workspace, image: str | None = None, parts: int = 1) -> str:
    """Return the manifests as YAML: one set for each part. Raises ManifestError."""
    need = memory_mib(workspace, parts)
    documents = [item for number in range(1, parts + 1) for item in _part(number, parts)]
    for item in documents:
        if item["kind"] == "Deployment":
            (container,) = item["spec"]["template"]["spec"]["containers"]
            container["image"] = image or container["image"]
            container["resources"]["requests"]["memory"] = f"{need}Mi"
            container["resources"]["limits"]["memory"] = f"{round(_LIMIT * need)}Mi"
    return yaml.safe_dump_all(documents, sort_keys=False, width=140)


def _part(number: int, parts: int) -> list[dict[str, Any]]:
    """Return the template's documents for one part: the name `retriever` gets the part's number where there are several."""
    documents = list(yaml.safe_load_all(_TEMPLATE.read_text()))
    if parts == 1:
        return documents
    renamed = [_renamed(copy.deepcopy(item), f"retriever-{number}") for item in documents]
    for item in renamed:
        if item["kind"] == "Deployment":
            item["spec"]["template"]["spec"]["containers"][0]["args"] = ["--part", f"{number}/{parts}"]
    return renamed


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: name if item == "retriever" and key != "image" else _renamed(item, name) for key, item in value.items()}
    return [_renamed(item, name) for item in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the manifests; return the exit code."""
    parser = argparse.ArgumentParser("tasks.local.kubernetes", description="The retriever's Kubernetes manifests for a workspace.")
    parser.add_argument("workspace", type=Path, help="folder with artifacts/")
    parser.add_argument("--image", help="image of the retriever (default: research-rl/retriever:local)")
    parser.add_argument("--parts", type=int, default=1, help="Deployments among which the index is cut")
    options = parser.parse_args(arguments)
    try:
        say(rendered(Workspace(options.workspace.resolve()), options.image, options.parts), end="")
    except ResearchError as error:
        say(f"kubernetes: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
