"""DEDUP: images that are nearly alike, by the cosine of their embeddings.

What lies in the data many times is learned by heart: LavenderFlow's data was cleaned this way.
"""

import json
from pathlib import Path

import numpy as np

from cache import Shard, cell, open_shard, write_shard, write_whole


def duplicates(vectors: np.ndarray, threshold: float) -> dict[int, tuple[int, float]]:
    """Rows to drop → (the earlier row each of them repeats, cosine). vectors: (N, E), unit length.

    A row goes if an earlier one that stays is nearer than the threshold. With faiss in its range
    search, else by products of blocks; both are exact, and take a time that grows with N².
    """
    vectors, found = np.ascontiguousarray(vectors, np.float32), {}
    try:
        import faiss
    except ImportError:
        faiss = None
    index = None
    if faiss is not None:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
    for start in range(0, len(vectors), 1024):
        block = vectors[start : start + 1024]
        if index is not None:
            limits, cosines, others = index.range_search(block, threshold)
            queries = np.repeat(np.arange(len(block)), np.diff(limits.astype(np.int64)))
        else:
            products = block @ vectors[: start + len(block)].T
            queries, others = np.nonzero(products >= threshold)
            cosines = products[queries, others]
        order = np.lexsort((others, queries))
        for query, other, cosine in zip(queries[order], others[order], cosines[order], strict=True):
            row, other = start + int(query), int(other)
            if other < row and row not in found and other not in found:
                found[row] = (other, float(cosine))
    return found


def drop_duplicates(out: Path, shards: list[Shard], threshold: float) -> tuple[list[Shard], int]:
    """Shards without near-duplicates (rewritten under a new name), and how many rows went.

    duplicates.jsonl says which, and of what. Validation rows come first: they stay.
    """
    shards = sorted(shards, key=lambda s: (s.split == "train", s.file))
    vectors, where = [], []
    for k, shard in enumerate(shards):
        table = open_shard(out / shard.file)
        for i in range(shard.rows):
            vectors.append(np.frombuffer(cell(table, "embedding", i), np.float16))
            where.append((k, i, table.column("row")[i].as_py()))
    gone = duplicates(np.stack(vectors), threshold)
    report = [
        {"row": where[row][2], "repeats": where[other][2], "cosine": round(cosine, 4)}
        for row, (other, cosine) in gone.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in report)
    write_whole(out / "duplicates.jsonl", text.encode())
    lost: dict[int, set[int]] = {}
    for row in gone:
        lost.setdefault(where[row][0], set()).add(where[row][1])
    kept = []
    for k, shard in enumerate(shards):
        if k not in lost:
            kept.append(shard)
            continue
        rows = open_shard(out / shard.file).to_pylist()
        rows = [row for i, row in enumerate(rows) if i not in lost[k]]
        if rows:
            file = shard.file.replace(".arrow", ".unique.arrow")
            kept.append(write_shard(out, file, shard.split, shard.bucket, rows))
    return kept, len(gone)
