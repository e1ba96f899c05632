"""The commands of engines and their builds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.cli.options import (
    COMPILER,
    ENGINES,
    HOME,
    AnyQuant,
    AsJson,
    Compiler,
    Limit,
    OwnQuant,
    Quant,
    State,
)

if TYPE_CHECKING:
    from millrace.builds import RecipeOptions

commands = typer.Typer()


@commands.command(
    rich_help_panel=ENGINES,
    epilog="Example: millrace build sample:smollm2-135m --arch cpu,sm_90 --quant int8",
)
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, a GGUF file, hf:org/name@revision, sample:smollm2-135m, "
            "or random:CONFIG.json?seed=N.",
        ),
    ],
    arch: Annotated[
        str,
        typer.Option(
            "--arch",
            "-a",
            metavar="ARCHS",
            help="cpu, sm_80, sm_90, ...; several with commas. auto: this machine's GPU, or cpu.",
        ),
    ] = "auto",
    quant: OwnQuant = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What runtimes call the model.")
    ] = "",
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="PATTERNS", help="Weights that stay in bf16: lm_head,layers.0.*"
        ),
    ] = "",
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text or .jsonl to calibrate and measure with; a small one is shipped.",
        ),
    ] = "",
    calibration_tokens: Annotated[
        int,
        typer.Option(
            "--calibration-tokens",
            metavar="N",
            min=0,
            show_default=False,
            help="Tokens of it to look at; 0: 4,096.",
        ),
    ] = 0,
    max_kl: Annotated[
        float,
        typer.Option(
            "--max-kl",
            metavar="NATS",
            min=0,
            show_default=False,
            help="Mean KL divergence allowed; 0: the scheme's own limit.",
        ),
    ] = 0.0,
    max_perplexity_increase: Annotated[
        float,
        typer.Option(
            "--max-perplexity-increase",
            metavar="N",
            min=0,
            show_default=False,
            help="Allowed, as a share: 0.05 is 5 %; 0: the scheme's own limit.",
        ),
    ] = 0.0,
    auto_keep: Annotated[
        bool, typer.Option("--auto-keep", help="Beyond the limits keep more weights in bf16.")
    ] = False,
    skip_quality: Annotated[
        bool, typer.Option("--no-quality", help="Skip measuring what quantizing cost.")
    ] = False,
    kv_cache: Annotated[
        str,
        typer.Option(
            "--kv-cache", metavar="fp8|int8", help="Keep keys and values in 8 bits: fp8 or int8."
        ),
    ] = "",
    probe_tokens: Annotated[
        int,
        typer.Option(
            "--probe-tokens",
            metavar="N",
            min=0,
            show_default=False,
            help="Longest context in which the quality report hides facts, in tokens; 0: 1,024.",
        ),
    ] = 0,
    no_act_order: Annotated[
        bool,
        typer.Option(
            "--no-act-order", help="int4-gptq: round columns as stored, not the most active first."
        ),
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it is queued.")
    ] = False,
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Build a model into engines, one per arch, and watch.

    Asking twice builds once.
    """
    from millrace.cli.building import build as run
    from millrace.cli.building import parse_keep, parse_quant
    from millrace.cli.connecting import client as connect
    from millrace.cli.machine import local_arch

    archs = [local_arch()] if arch == "auto" else [a.strip() for a in arch.split(",") if a.strip()]
    model = _daemon_path(model)
    scheme, group_size, named_kv_cache = parse_quant(quant)
    recipe: RecipeOptions = {
        "keep": parse_keep(keep),
        "calibration": _daemon_path(calibration),
        "calibration_tokens": calibration_tokens,
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "auto_keep": auto_keep,
        "skip_quality": skip_quality,
        "kv_cache": kv_cache or named_kv_cache,
        "probe_tokens": probe_tokens,
        "no_act_order": no_act_order,
    }
    with connect(compiler) as client:
        run(client, model, archs, scheme, group_size, name, recipe, detach=detach, as_json=as_json)


@commands.command(
    rich_help_panel=ENGINES, epilog="Example: millrace builds --json | jq .builds[0].state"
)
def builds(limit: Limit = 20, compiler: Compiler = COMPILER, as_json: AsJson = False) -> None:
    """List builds, newest first."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import show_builds

    with connect(compiler) as client:
        show_builds(client, limit, as_json)


@commands.command(rich_help_panel=ENGINES, epilog="Example: millrace cancel 3f9a52c01b7d")
def cancel(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="As `millrace builds` shows it.")],
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Cancel a build that has not ended."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import cancel_build

    with connect(compiler) as client:
        cancel_build(client, build, as_json=as_json)


@commands.command(rich_help_panel=ENGINES, epilog="Example: millrace engines")
def engines(limit: Limit = 50, compiler: Compiler = COMPILER, as_json: AsJson = False) -> None:
    """List the engines in the store, newest first."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.listing import show_engines

    with connect(compiler) as client:
        show_engines(client, limit, as_json)


@commands.command(rich_help_panel=ENGINES, epilog="Example: millrace delete 3f9a52c01b7d")
def delete(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    quant: AnyQuant = "",
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Delete an engine from the store.

    Runtimes that serve it go on. A bucket's space is freed by `millrace store sweep`.
    """
    from millrace.cli.connecting import client as connect
    from millrace.cli.deleting import delete_engine

    with connect(compiler) as client:
        delete_engine(client, engine, quant, as_json=as_json)


@commands.command(rich_help_panel=ENGINES, epilog="Example: millrace inspect 3f9a52 --graph")
def inspect(
    engine: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Model name, engine name, or its first digits.")
    ],
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph before and after the passes.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Show what quantizing cost, layer by layer.")
    ] = False,
    quant: AnyQuant = "",
    compiler: Compiler = COMPILER,
    as_json: AsJson = False,
) -> None:
    """Show what an engine is made of, or what quantizing it cost."""
    from millrace.cli.connecting import client as connect
    from millrace.cli.inspecting import inspect as run
    from millrace.cli.quality import show_quality

    with connect(compiler) as client:
        if quality:
            show_quality(client, engine, quant, as_json=as_json)
        else:
            run(client, engine, quant, with_graph=graph, as_json=as_json)


@commands.command(
    rich_help_panel=ENGINES,
    epilog="Example: millrace tune llama-3.1-8b --quant fp8 --store s3://models/engines",
)
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model name, or its digest.")],
    quant: Quant = "int8",
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="STORE",
            envvar="MILLRACE_STORE",
            help="Where engines are; empty: the local stack's.",
        ),
    ] = "",
    compiler: Annotated[
        str,
        typer.Option(
            "--compiler", metavar="HOST:PORT", help="Pull from, and publish to, this daemon too."
        ),
    ] = "",
    state: State = HOME,
    as_json: AsJson = False,
) -> None:
    """Measure an engine's kernels on this GPU, and keep the record.

    Nothing is compiled: only what the engine holds is chosen from. The GPU has to be free: stop the
    runtime that serves on it.
    """
    from millrace.cli.tuning import program, require_gpu
    from millrace.cli.tuning import tune as run

    require_gpu()
    folder = store or str(state.expanduser().resolve() / "store")
    run(program(model, quant, folder, compiler), as_json=as_json)


def _daemon_path(text: str) -> str:
    """`text`, absolute where it is a path here: the daemon's working folder is not ours."""
    path = Path(text)
    return str(path.resolve()) if text and path.exists() else text
