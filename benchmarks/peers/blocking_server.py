"""The retriever service as published with ReSearch and, in its search, FlashRAG; the pattern, in our own words.

Async handlers take one of N retrievers from a semaphore and call its blocking search in the event loop: tokenise, encode in
float32, mean-pool, normalise; faiss flat index held in memory, one faiss thread; passages fetched row by row.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

_MOST_TOKENS = 128


class Retriever:
    """One copy of encoder, index and corpus."""

    def __init__(self, model: str, index: str, corpus: list[str]) -> None:
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
        self.index = faiss.read_index(index)
        self.tables = [pa.ipc.open_file(pa.memory_map(path)).read_all() for path in corpus]
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])

    @torch.no_grad()
    def encode(self, texts: list[str]) -> np.ndarray:
        inputs = self.tokenizer(texts, max_length=_MOST_TOKENS, padding=True, truncation=True, return_tensors="pt")
        hidden = self.model(**inputs, return_dict=True).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy().astype(np.float32, order="C")

    def search(self, texts: list[str], top_n: int) -> tuple[list[list[dict[str, str]]], list[list[float]]]:
        scores, rows = self.index.search(self.encode(texts), k=top_n)
        return [[self.passage(int(row)) for row in found] for found in rows], scores.tolist()

    def passage(self, row: int) -> dict[str, str]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        (found,) = self.tables[shard].slice(row - int(self.starts[shard]), 1).to_pylist()
        return {"id": str(found["id"]), "contents": found["contents"]}


class Query(BaseModel):
    """One query."""

    query: str
    top_n: int = 10
    return_score: bool = False


class Queries(BaseModel):
    """Several queries."""

    query: list[str]
    top_n: int = 10
    return_score: bool = False


def create_app(retrievers: list[Retriever]) -> FastAPI:
    app, free, slots = FastAPI(), deque(range(len(retrievers))), asyncio.Semaphore(len(retrievers))

    async def search(texts: list[str], top_n: int) -> tuple[list[Any], list[Any]]:
        async with slots:
            name = free.popleft()
            try:
                return retrievers[name].search(texts, top_n)
            finally:
                free.append(name)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "healthy", "retrievers": {"total": len(retrievers), "available": len(free)}}

    @app.post("/search")
    async def one(request: Query) -> Any:
        if not request.query.strip():
            raise HTTPException(400, "query is empty")
        documents, scores = await search([request.query], request.top_n)
        return (documents[0], scores[0]) if request.return_score else documents[0]

    @app.post("/batch_search")
    async def several(request: Queries) -> Any:
        documents, scores = await search(request.query, request.top_n)
        return (documents, scores) if request.return_score else documents

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    made = [Retriever(arguments.model, arguments.index, [str(path) for path in arguments.corpus])]
    print(json.dumps({"rows": made[0].index.ntotal, "cwd": str(Path.cwd())}), flush=True)
    uvicorn.run(create_app(made), host="127.0.0.1", port=arguments.port, log_level="warning")
