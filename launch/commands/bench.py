"""`pldr bench CONFIG | decode CONFIG | train CONFIG | validate [CONFIG] | evaluate CONFIG|BUNDLE | data | startup | serve`: how
fast the model, decoding, training, validation, scoring, the data path, the command line and a server are."""

from __future__ import annotations

from typing import Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import ConfigError

# Options that only some benchmarks have; the others refuse them.
OPTIONS_OF = {
    "model": ("overrides", "steps", "batch", "compile"),
    "decode": ("overrides", "batch", "prompt", "tokens", "rounds", "threads", "cached", "key_rank"),
    "train": ("overrides", "steps", "batch"),
    "validate": ("overrides", "prompts"),
    "data": ("text", "tokenizer"),
    "startup": ("bundle", "repeats"),
    "evaluate": ("overrides", "batch", "questions", "repeats"),
    "serve": ("url", "bundle", "clients"),
}


def add_bench_verb(verbs: Verbs) -> None:
    """The verb `bench`."""
    sub = verbs.add(
        "bench",
        _bench,
        "time the model against its SDPA twin; decode: cached decoding, by format, batch and cached tokens; train: DeepSpeed "
        "and saving; validate: its parts; data: tokenizing, loading; evaluate: scoring against lm_eval; startup: pldr itself; "
        "serve: a running server",
    )
    sub.add_argument(
        "config",
        metavar="CONFIG|decode CONFIG|train CONFIG|validate [CONFIG]|evaluate CONFIG|BUNDLE|data|startup|serve",
        help="YAML of the run, after one of the words or not (validate alone: the papers' 110M; evaluate: also a bundle); or "
        "data, startup or serve",
    )
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--steps", type=int, help="with CONFIG: timed training steps of each model (10)")
    sub.add_argument("--compile", action="store_true", help="with CONFIG: also with compiled layers (minutes on a CPU)")
    sub.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help="with CONFIG: sequences in a training step (4); with decode: rows that decode together, one or several numbers "
        "(1 8 32); with evaluate: lm-eval's batch size (8)",
    )
    sub.add_argument("--prompt", type=int, nargs="+", metavar="N", help="with decode: cached tokens (16 512)")
    sub.add_argument(
        "--cached",
        type=int,
        nargs="*",
        metavar="N",
        help="with decode: long caches, full and low-rank keys (4096 16384)",
    )
    sub.add_argument("--tokens", type=int, help="with decode: steps that are timed as one (as many as take 30 ms)")
    sub.add_argument("--rounds", type=int, help="with decode: how often each is timed; the median counts (9)")
    sub.add_argument("--threads", type=int, help="with decode: of the CPU (1)")
    sub.add_argument("--key-rank", type=int, help="with decode: numbers of a key that low-rank keys keep (a quarter)")
    sub.add_argument("--questions", type=int, help="with evaluate: questions of each task (16)")
    sub.add_argument("--prompts", type=int, help="with validate: each part is timed with so many and twice as many (1)")
    sub.add_argument(
        "--text", metavar="FILE", help="with data: text to tokenize (what data.sources reads); else generated"
    )
    sub.add_argument("--tokenizer", metavar="MODEL", help="with data: a SentencePiece .model; else trained on the text")
    sub.add_argument(
        "--bundle",
        metavar="BUNDLE",
        help="with startup: a bundle folder, to time `pldr bundle verify` too; with serve: the bundle that is served",
    )
    sub.add_argument(
        "--repeats", type=int, help="with startup, evaluate: how often each is timed; the median counts (5, 3)"
    )
    sub.add_argument("--url", help="with serve: of the server (http://127.0.0.1:8000)")
    sub.add_argument("--clients", type=int, nargs="+", metavar="N", help="with serve: clients at once (1 8 64)")


def _bench(arguments: Any, report: Report) -> Result:
    what = arguments.config if arguments.config in OPTIONS_OF.keys() - {"model"} else "model"
    for option in dict.fromkeys(option for options in OPTIONS_OF.values() for option in options):
        if getattr(arguments, option) and option not in OPTIONS_OF[what]:
            other = next(name for name, options in OPTIONS_OF.items() if option in options).replace("model", "CONFIG")
            raise ConfigError(f"bench {what}: takes no {option}; that is for `pldr bench {other}`")
    if arguments.batch is not None and what != "decode":
        if len(arguments.batch) > 1:
            raise ConfigError(f"bench {what}: --batch takes one number; several are for `pldr bench decode`")
        arguments.batch = arguments.batch[0]
    run = {
        "model": _model,
        "decode": _decode,
        "train": _train,
        "validate": _validate,
        "data": _data,
        "startup": _startup,
        "evaluate": _evaluate,
        "serve": _serve,
    }[what]
    return run(arguments, report)


def _model(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from pldr_model.bench import bench

    try:
        result = bench(
            config.model,
            batch_size=arguments.batch or 4,
            steps=arguments.steps or 10,
            compiled=arguments.compile,
        )
    except ValueError as error:
        raise ConfigError(f"{arguments.config}: bench: {error}") from None
    for key, value in result.items():
        report(f"{key:<32} {_number(value)}")
    return result


def _decode(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config

    config = load_config(*_one_yaml("decode", arguments))
    sizes = {
        option: getattr(arguments, option)
        for option in OPTIONS_OF["decode"][1:]
        if getattr(arguments, option) is not None
    }
    for option, value in sizes.items():
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {_words(value)}: at least 1")
    from pipeline.bench.decode import bench

    try:
        return bench(config.model, **sizes, report=report)
    except ValueError as error:
        raise ConfigError(f"{config.name}: bench decode: {error}") from None


def _train(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config

    config = load_config(*_one_yaml("train", arguments))
    from pipeline.bench.train import bench
    from pipeline.network import free_port

    result = bench(config, port=free_port(), steps=arguments.steps or 20, batch=arguments.batch)
    for key, value in result.items():
        report(f"{key:<32} {_number(value)}")
    return result


def _one_yaml(what: str, arguments: Any) -> tuple[str, list[str]]:
    """CONFIG and its overrides, after the word that names the benchmark."""
    files = [word for word in arguments.overrides if "=" not in word]
    if len(files) != 1:
        raise ConfigError(f"bench {what}: name one YAML: pldr bench {what} CONFIG [key=value ...]")
    return files[0], [word for word in arguments.overrides if "=" in word]


def _validate(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config

    files = [word for word in arguments.overrides if "=" not in word]
    if len(files) > 1 or (arguments.overrides and not files):
        raise ConfigError("bench validate: name one YAML or none: pldr bench validate [CONFIG [key=value ...]]")
    prompts = 1 if arguments.prompts is None else arguments.prompts
    if prompts < 1:
        raise ConfigError(f"--prompts {prompts}: at least 1")
    config = load_config(files[0], [word for word in arguments.overrides if "=" in word]) if files else None
    from pipeline.bench.validate import PAPER_110M, bench, table
    from pipeline.config.post import PostConfig

    model, post = (PAPER_110M, PostConfig()) if config is None else (config.model, config.post)
    result = bench(model, post, prompts=prompts)
    for line in table(result):
        report(line)
    return result


def _number(value: Any) -> str:
    """Four digits of a measurement, and a count in full."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data(arguments: Any, report: Report) -> Result:
    from pipeline.bench.data import bench

    return bench(text=arguments.text, tokenizer=arguments.tokenizer, report=report)


def _startup(arguments: Any, report: Report) -> Result:
    from pipeline.bench.startup import bench

    repeats = 5 if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: at least 1")
    return bench(bundle=arguments.bundle, repeats=repeats, report=report)


def _evaluate(arguments: Any, report: Report) -> Result:
    sources = [word for word in arguments.overrides if "=" not in word]
    if len(sources) != 1:
        raise ConfigError("bench evaluate: name one model: pldr bench evaluate CONFIG|BUNDLE [key=value ...]")
    sizes = {
        option: getattr(arguments, option)
        for option in ("questions", "repeats", "batch")
        if getattr(arguments, option) is not None
    }
    for option, value in sizes.items():
        if value < 1:
            raise ConfigError(f"--{option} {value}: at least 1")
    from pipeline.bench.evaluate import bench

    if "repeats" in sizes:
        sizes["rounds"] = sizes.pop("repeats")
    return bench(sources[0], [word for word in arguments.overrides if "=" in word], **sizes, report=report)


def _serve(arguments: Any, report: Report) -> Result:
    from pipeline.bench.serve import bench

    clients = arguments.clients or [1, 8, 64]
    if min(clients) < 1:
        raise ConfigError(f"--clients {min(clients)}: at least 1")
    if arguments.bundle is None:
        raise ConfigError("bench serve: name the bundle that is served with --bundle")
    url = (arguments.url or "http://127.0.0.1:8000").removesuffix("/").removesuffix("/v1")
    return bench(url=url, bundle=arguments.bundle, clients=clients, report=report)
