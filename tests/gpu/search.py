"""GPU check b: encoding and exact search against the ceilings of this very device, measured first.

Usage: python tests/gpu/search.py [--toy] [--rows N]. Needs torch and numpy, no network, no checkout on the path. The exact scan
keeps bf16 vectors, takes the best candidates by bf16 scores block by block and rescores them in float32; its ids are compared with
a float32 scan. IVF is k-means in torch with nprobe lists a query. Prints one JSON line; asserts that ids are right.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DIM, TOP, CANDIDATES = 768, 5, 64
LAYERS, HEADS, INNER, TOKENS = 12, 12, 3072, 128


def main() -> None:
    """Run every part and print the figures."""
    parser = argparse.ArgumentParser(description="Encoding and exact search against measured ceilings.")
    parser.add_argument("--toy", action="store_true", help="20,000 rows on the processor")
    parser.add_argument("--rows", type=int, help="passages (default: 21,015,324, or as many as fit half of the GPU)")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.toy else "cuda")
    torch.manual_seed(0)
    rows = arguments.rows or (20_000 if arguments.toy else fitting(21_015_324))
    found: dict[str, Any] = {"check": "search", "toy": arguments.toy, "device": device_name(device), "rows": rows, "dim": DIM}
    found["ceiling"] = ceiling(device, arguments.toy)
    found["encode"] = encode(device, arguments.toy, found["ceiling"])
    scan_BD, queries_QD, wanted_Q = corpus(rows, device)
    found["exact"] = [exact(scan_BD, queries_QD, wanted_Q, batch, found["ceiling"]) for batch in (1, 8, 64, 256)]
    found["ivf"] = ivf(scan_BD, queries_QD, wanted_Q, lists=64 if arguments.toy else 16_384, probe=8 if arguments.toy else 32)
    print(json.dumps(found))


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fitting(rows: int) -> int:
    """Return `rows`, or as many as take half of the GPU's memory in bf16."""
    return min(rows, torch.cuda.get_device_properties(0).total_memory // 2 // (2 * DIM))


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of `work` after one run to warm up."""
    times: list[float] = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, toy: bool) -> dict[str, float]:
    """Return bytes/s of reading memory and FLOP/s of a bf16 matrix product, both measured here."""
    size = (64 if toy else 4096) << 20
    block = torch.ones(size // 4, device=device)
    read = size / seconds(lambda: block.sum(), device, 5)
    side = 1024 if toy else 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"bytes_per_s": read, "flop_per_s": 2 * side**3 / seconds(lambda: left @ right, device, 5)}


def encode(device: torch.device, toy: bool, limit: dict[str, float]) -> dict[str, float]:
    """Encode batches of full length with a model of e5-base's shape (random weights) in bf16."""
    layers, batch = (2, 4) if toy else (LAYERS, 256)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device, torch.bfloat16).eval()
    input_BTD = torch.randn(batch, TOKENS, DIM, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        taken = seconds(lambda: model(input_BTD), device, 5)
    flop = batch * TOKENS * layers * (2 * (4 * DIM * DIM + 2 * DIM * INNER) + 4 * TOKENS * DIM)
    return {
        "passages_per_s": batch / taken,
        "tokens_per_s": batch * TOKENS / taken,
        "share_of_matrix_rate": flop / taken / limit["flop_per_s"],
    }


def corpus(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return bf16 unit vectors in clusters, queries planted beside known rows, and those rows."""
    centres = nn.functional.normalize(torch.randn(max(16, rows // 1000), DIM, device=device), dim=1)
    scan_BD = torch.empty(rows, DIM, device=device, dtype=torch.bfloat16)
    for start in range(0, rows, 1 << 18):
        count = min(1 << 18, rows - start)
        part = centres[torch.randint(len(centres), (count,), device=device)] + 0.05 * torch.randn(count, DIM, device=device)
        scan_BD[start : start + count] = nn.functional.normalize(part, dim=1).to(torch.bfloat16)
    wanted_Q = torch.randint(rows, (256,), device=device)
    noise = 0.01 * torch.randn(256, DIM, device=device)
    return scan_BD, nn.functional.normalize(scan_BD[wanted_Q].float() + noise, dim=1), wanted_Q


def scan(scan_BD: Tensor, queries_QD: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the best rows of a bf16 scan, rescored in float32: scores and rows, each [queries, top]."""
    block = max(CANDIDATES, (1 << 29) // max(1, len(queries_QD)) // 2)
    short = queries_QD.to(torch.bfloat16)
    found: list[Tensor] = []
    for start in range(0, len(scan_BD), block):
        scores = short @ scan_BD[start : start + block].T
        found.append(scores.topk(min(CANDIDATES, scores.shape[1]), dim=1).indices + start)
    candidates_QC = torch.cat(found, dim=1)
    exact_QC = torch.einsum("qcd,qd->qc", scan_BD[candidates_QC].float(), queries_QD)
    best = exact_QC.topk(top, dim=1)
    return best.values, candidates_QC.gather(1, best.indices)


def reference(scan_BD: Tensor, queries_QD: Tensor, top: int) -> Tensor:
    """Return the best scores of a float32 scan, [queries, top]."""
    best = torch.full((len(queries_QD), top), -2.0, device=scan_BD.device)
    for start in range(0, len(scan_BD), 1 << 16):
        scores = queries_QD @ scan_BD[start : start + (1 << 16)].float().T
        best = torch.cat([best, scores], dim=1).topk(top, dim=1).values
    return best


def exact(scan_BD: Tensor, queries_QD: Tensor, wanted_Q: Tensor, batch: int, limit: dict[str, float]) -> dict[str, float]:
    """Time a batch against the bytes it must read and the products it must make; check it against the float32 scan."""
    queries = queries_QD[:batch]
    scores, rows = scan(scan_BD, queries, TOP)
    assert bool((rows[:, 0] == wanted_Q[:batch]).all()), "a planted neighbour is not the best row"
    worst = float((scores - reference(scan_BD, queries, TOP)).abs().max())
    assert worst < 1e-4, f"scores differ from the float32 scan by {worst}"
    taken = seconds(lambda: scan(scan_BD, queries, TOP), scan_BD.device, 5)
    read, product = scan_BD.numel() * 2 / limit["bytes_per_s"], 2 * batch * scan_BD.numel() / limit["flop_per_s"]
    return {"batch": batch, "ms": 1e3 * taken, "queries_per_s": batch / taken, "share_of_ceiling": max(read, product) / taken}


def ivf(scan_BD: Tensor, queries_QD: Tensor, wanted_Q: Tensor, lists: int, probe: int) -> dict[str, float]:
    """Split the rows by k-means, search `probe` lists a query; return time per query and the share of planted rows found."""
    device = scan_BD.device
    sample = scan_BD[torch.randperm(len(scan_BD), device=device)[: 64 * lists]].float()
    centres = sample[:lists].clone()
    for _ in range(8):
        nearest = assign(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres = nn.functional.normalize(torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, centres), dim=1)
    started = time.perf_counter()
    order = assign(scan_BD, centres)
    rows = order.argsort()
    ends = torch.bincount(order, minlength=lists).cumsum(0)
    synchronize(device)
    built = time.perf_counter() - started

    def search(query_D: Tensor) -> Tensor:
        chosen = (centres @ query_D).topk(probe).indices.tolist()
        parts = [rows[int(ends[number - 1]) if number else 0 : int(ends[number])] for number in chosen]
        inside = torch.cat(parts)
        return inside[(scan_BD[inside].float() @ query_D).argmax()]

    hits = sum(int(search(query) == wanted) for query, wanted in zip(queries_QD, wanted_Q, strict=True))
    assert hits >= 0.9 * len(queries_QD), f"IVF finds {hits} of {len(queries_QD)} planted rows"
    taken = seconds(lambda: [search(query) for query in queries_QD[:16]], device, 3) / 16
    return {"lists": lists, "probe": probe, "assign_s": built, "ms_per_query": 1e3 * taken, "found": hits / len(queries_QD)}


def assign(vectors: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre of each vector."""
    short = centres.to(vectors.dtype)
    return torch.cat([(part @ short.T).argmax(dim=1) for part in vectors.split(1 << 16)])


if __name__ == "__main__":
    main()
