"""`pldr bench data`: how fast text becomes tokens, and tokens become batches.

Everything runs in one process, alternatives take turns, and medians are compared, so that a busy machine slows both sides
equally. If both sides run on one core, CPU time is compared: on a shared machine, wall time gave 0.55 one minute and 1.19 the
next for what is 0.93 (2026-11-24, two cores, load 3).

What is measured, with targets:

- tokenize_ratio_to_sentencepiece (0.90): one worker's full processing of a document shard (read and check the tar, encode,
  pack, write the token tar) against only SentencePiece encoding the same texts on one thread, both returning arrays; in CPU
  time.
  tokenize_ratio_by_the_clock is the same in wall time, with waiting for the disk.
- tokenize_scaling_2 (1.7): the job of stage `tokenize` with one worker against two, in wall time, including the start of the
  fork server and the workers. More text hides the start better; MEGABYTES is the amount used.
- loader_tokens_per_second (20 million): global batches from a local folder through order, reader and prefetch, per second of
  CPU time of all threads, i.e. per core.
- loader_flat_shards, loader_flat_sequences (0.8): that rate with 2,000 shards against 1 with as many sequences, and with 1
  shard against one with a sixteenth of its sequences. A shard is opened again for each of its blocks, which here have a quarter
  of the default size.
- loader_startup_seconds_2000_shards (1.0): from nothing to the first batch. Shards are hashed on first use.
- order_bytes: peak memory of computing 4,096 positions of an order of 1e12 sequences, next to that of 1e3.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.bench.data_input import read_text, write_documents, write_tokens
from pipeline.data.executor.jobs import run_tasks
from pipeline.data.loading.loader import TrainLoader
from pipeline.data.loading.order import Order
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex, dtype_for
from pipeline.data.tokens.tokenize import TokenizeShard
from pipeline.data.tokens.train_tokenizer import train
from pipeline.io.storage import publish_bytes
from pipeline.stages.still import Still
from pipeline.tokenizer import Tokenizer

Report = Callable[[str], None]
TARGETS = {
    "tokenize_ratio_to_sentencepiece": (0.90, "at least"),
    "tokenize_scaling_2": (1.7, "at least"),
    "loader_tokens_per_second": (20e6, "at least"),
    "loader_flat_shards": (0.8, "at least"),
    "loader_flat_sequences": (0.8, "at least"),
    "loader_startup_seconds_2000_shards": (1.0, "below"),
}
MEGABYTES = 128  # of text for the scaling; the ratio takes one shard of it
SHARDS = 16
TRAINER_BYTES = 3_000_000
VOCAB_SIZE = 4096
ROUNDS = 3
RATIO_ROUNDS = 11  # a shard takes a third of a second, and load from others comes in bursts
CONTEXT, BLOCK, BATCH = 1024, 64, 64  # for the loader; each of the many shards is one block
MANY_SHARDS = 2000


def bench(
    *,
    text: str | None = None,
    tokenizer: str | None = None,
    report: Report,
    megabytes: int = MEGABYTES,
    shards: int = MANY_SHARDS,
) -> dict[str, Any]:
    """Run everything (about a minute and a half). `text`: a file, `tokenizer`: a SentencePiece model; generated if None.

    Returns the numbers by the names above, and what they were measured on. Raises UserError for a text or model that cannot
    be read.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # before the measurements
    if load > 0.5:
        report(f"load {load:.1f} on {cores} cores: other processes are running, so two workers cannot be twice as fast")
    with tempfile.TemporaryDirectory(prefix="pldr-bench-") as folder:
        work = Path(folder)
        with Still("  the text and its tokenizer", report):
            texts, source = read_text(text, megabytes * 10**6)
            model = _tokenizer(texts, tokenizer, work)
        report(f"text: {source}, {megabytes} MB")
        report(f"tokenizer: {tokenizer or 'trained on the text'}, {model.vocab_size} pieces")
        result: dict[str, Any] = {"text": source, "load_average": round(load, 2), "cores": cores}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "tokenizing, one worker against two (about a minute)": lambda: bench_tokenize(
                work / "tokenize", texts, model
            ),
            f"loading, 1 shard against {shards:,} (half a minute)": lambda: bench_loader(work / "loader", many=shards),
            "the order of sequences": bench_order,
        }
        for name, part in parts.items():
            report(f"{name} ...")
            with Still("  measuring", report):
                numbers = part()
            result |= numbers
            report("\n".join(line(name, value) for name, value in numbers.items()))
    return result


def line(name: str, value: Any) -> str:
    """A number as a line of text, with its target."""
    shown = f"{value:,}" if isinstance(value, int) else f"{value / 1e6:,.1f} M" if value > 1e5 else f"{value:.3f}"
    if name not in TARGETS:
        return f"{name:<40} {shown:>12}"
    target, way = TARGETS[name]
    met = value >= target if way == "at least" else value < target
    wanted = f"{target / 1e6:g} M" if target > 1e5 else f"{target:g}"
    return f"{name:<40} {shown:>12}   target {way} {wanted}: {'met' if met else 'NOT met'}"


def _tokenizer(texts: list[str], given: str | None, work: Path) -> Tokenizer:
    if given is not None:
        return Tokenizer.load(given)
    share = min(1.0, TRAINER_BYTES / sum(map(len, texts)))
    path = work / "tokenizer.model"
    publish_bytes(path, train(texts, vocab_size=VOCAB_SIZE, share=share))
    return Tokenizer.load(path)


def bench_tokenize(work: Path, texts: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """One worker against SentencePiece alone on a shard, then one worker against two on all of them."""
    documents = work / "documents"
    index = write_documents(documents, texts, SHARDS)
    settings = {
        "context_length": CONTEXT,
        "block_sequences": BLOCK,
        "packing": "concat",
        "remainder": "drop",
        "boundaries": False,
        "dtype": dtype_for(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "documents_fingerprint": index["fingerprint"],
    }

    def step(folder: Path) -> TokenizeShard:
        return TokenizeShard(str(documents), tokenizer.path, str(folder / "tokens"), folder / "work", settings)

    mine = texts[::SHARDS]
    alone, ours = in_turn(
        lambda: tokenizer.encode_arrays(mine), lambda: _exhaust(step(work / "one").run(rank=0)), rounds=RATIO_ROUNDS
    )
    runs = iter(range(2 * ROUNDS))

    def stage(workers: int) -> None:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # each run starts its own, and the start is measured
        folder = work / f"run-{next(runs)}"
        run_tasks(
            [step(folder)],
            tasks=SHARDS,
            workers=workers,
            workers_key="",
            work=folder / "work",
            output=folder / "tokens",
        )

    one, two = in_turn(lambda: stage(1), lambda: stage(2), rounds=ROUNDS)
    size = sum(shard["text_bytes"] for shard in index["shards"])
    return {
        "tokenize_ratio_to_sentencepiece": _ratio(alone, ours, "cpu"),
        "tokenize_ratio_by_the_clock": _ratio(alone, ours, "wall"),
        "tokenize_scaling_2": _ratio(one, two, "wall"),
        "tokenize_text_bytes": size,
        "tokenize_bytes_per_second": index["shards"][0]["text_bytes"] / statistics.median(part.cpu for part in ours),
        "tokenize_stage_seconds_1": statistics.median(part.wall for part in one),
        "tokenize_stage_seconds_2": statistics.median(part.wall for part in two),
    }


def bench_loader(work: Path, *, many: int) -> dict[str, Any]:
    """Rates of a loader on one shard, on many with as many sequences, and on one with a sixteenth of them; startup time."""
    sequences = many * BLOCK
    sizes = {"one": (1, sequences), "many": (many, BLOCK), "few": (1, sequences // 16)}
    for name, (shards, size) in sizes.items():
        write_tokens(work / name, shards=shards, sequences=size, context_length=CONTEXT, block_sequences=BLOCK)
    ready = {name: _loader(work / name) for name in sizes}
    batches = sequences // BATCH
    for loader in ready.values():
        _exhaust(loader.micro_batches(0, limit=batches))  # reads, and so checks, every shard

    def run(name: str) -> Callable[[], None]:
        return lambda: _exhaust(ready[name].micro_batches(0, limit=batches))

    one, lots, few = in_turn(*(run(name) for name in sizes), rounds=2 * ROUNDS - 1)
    starts = [_seconds(lambda: next(_loader(work / "many").micro_batches(0))).wall for _ in range(ROUNDS)]
    return {
        "loader_tokens_per_second": batches * BATCH * CONTEXT / statistics.median(part.cpu for part in one),
        "loader_tokens_per_second_many_shards": batches
        * BATCH
        * CONTEXT
        / statistics.median(part.cpu for part in lots),
        "loader_flat_shards": _ratio(one, lots, "cpu"),
        "loader_flat_sequences": _ratio(few, one, "cpu"),
        f"loader_startup_seconds_{many}_shards": statistics.median(starts),
        "loader_sequences": sequences,
    }


def _loader(folder: Path) -> TrainLoader:
    reader = TokenReader(TokenIndex.load(folder), "train")
    return TrainLoader(reader, seed=0, global_batch=BATCH, micro_batch=BATCH // 4, rank=0, world_size=1)


def bench_order() -> dict[str, Any]:
    """Peak bytes of computing the same number of positions of a small and of a huge order."""
    peaks = {}
    for name, size in (("order_bytes_1e3", 10**3), ("order_bytes", 10**12)):
        order = Order(num_sequences=size, block_sequences=BLOCK, fingerprint="bench", seed=0)
        order.global_batch(0, 4096)
        tracemalloc.start()
        order.global_batch(size // 2, 4096)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peaks


class Seconds(NamedTuple):
    """Wall time, and CPU time of all cores."""

    wall: float
    cpu: float


def in_turn(*parts: Callable[[], Any], rounds: int) -> list[list[Seconds]]:
    """Seconds of each part in each round. The order is reversed in every other round."""
    seconds: list[list[Seconds]] = [[] for _ in parts]
    for number in range(rounds):
        order = range(len(parts)) if number % 2 == 0 else reversed(range(len(parts)))
        for part in order:
            seconds[part].append(_seconds(parts[part]))
    return seconds


def _seconds(part: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    part()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _ratio(one: list[Seconds], other: list[Seconds], clock: Literal["wall", "cpu"]) -> float:
    """The median of the rounds' ratios."""
    return float(statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in zip(one, other, strict=True)))


def _exhaust(items: Any) -> None:
    for _ in items:
        pass
