"""Of `make bench-scale`: a million prompts like people's, and what reading, filtering and tokenising them costs.

They are real ones from ../shared/data, paired with style modifiers until there are enough; one in ten comes twice, so
that deduplication has work.
"""

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks import harness
from craftor import prompts
from craftor.diffuser import load as load_diffuser
from craftor.memory import peak_memory
from craftor.recipe import Data, Model

SHARED = Path(os.environ.get("CRAFTOR_SHARED_DATA", harness.ROOT.parent / "shared" / "data"))


def read_prompts(model: Model, folder: Path, number: int) -> dict[str, float]:
    """Read, filter, deduplicate and tokenise; the peak is that of this process and all of Ray's."""
    path = write_prompts(folder / "prompts.parquet", number)
    tokenizers = {}
    for name, tokenizer in load_diffuser(model).tokenizers.items():
        tokenizer.save_pretrained(folder / name)
        tokenizers[name.replace("text_encoder", "input_ids")] = str(folder / name)
    with peak_memory() as peak:
        begun = time.perf_counter()
        prepared = prompts.prepare(Data(path=str(path), max_chars=400), tokenizers, folder / "rows")
        seconds = time.perf_counter() - begun
    return {
        "read": number,
        "kept": prepared.num_rows,
        "seconds": seconds,
        "prompts_per_second": number / seconds,
        "peak_gib": peak.gib,
    }


def write_prompts(path: Path, number: int) -> Path:
    """Real prompts with one or two real modifiers each; in pieces, so that making them takes no memory either."""
    real = real_prompts()
    categories = json.loads((SHARED / "openprompts" / "modifiers.json").read_text())
    modifiers = [m["name"] for c in categories for s in c["subcategories"] for m in s["modifiers"]]
    random = np.random.default_rng(0)
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, number, 50_000):
            size = min(50_000, number - start)
            fresh = size - size // 10
            first, second = random.integers(len(modifiers), size=(2, fresh))
            chosen = random.integers(len(real), size=fresh)
            made = [f"{real[p]}, {modifiers[a]}, {modifiers[b]}" for p, a, b in zip(chosen, first, second, strict=True)]
            made += [made[i] for i in random.integers(fresh, size=size - fresh)]
            writer.write_table(pyarrow.table({"prompt": made}, schema=schema))
    return path


def real_prompts() -> list[str]:
    csv.field_size_limit(1 << 24)
    with (SHARED / "openprompts" / "openprompts_1k.csv").open(encoding="utf-8") as file:
        found = [row["prompt"] for row in csv.DictReader(file)]
    with (SHARED / "partiprompts" / "PartiPrompts.tsv").open(encoding="utf-8") as file:
        found += [row["Prompt"] for row in csv.DictReader(file, delimiter="\t")]
    found += (SHARED / "pickapic" / "pickapic_train.txt").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
