"""`millrace builds` and `millrace engines`: what there is, a line each."""

from itertools import islice

from millrace.cli import output
from millrace.cli.building import done_text, state_text
from millrace.cli.failures import NOT_FOUND, CommandFailed
from millrace.client import Client
from millrace.compiler.v1 import compiler_pb2
from millrace.engine.v1 import engine_pb2


def show_builds(client: Client, limit: int, as_json: bool) -> None:
    """Prints the newest builds."""
    builds = list(islice(client.list_builds(), limit))
    if as_json:
        output.print_json({"builds": [output.to_dict(build) for build in builds]})
        return
    output.print_table(
        ("build", "model", "arch", "quant", "state", "done", "asked"),
        [_build_row(build) for build in builds],
        "No builds yet; make one with: millrace build sample:smollm2-135m",
    )


def show_engines(client: Client, limit: int, as_json: bool) -> None:
    """Prints the newest engines."""
    engines = list(islice(client.list_engines(), limit))
    if as_json:
        output.print_json({"engines": [output.to_dict(engine) for engine in engines]})
        return
    output.print_table(
        ("engine", "model", "arch", "quant", "size", "built"),
        [_engine_row(engine) for engine in engines],
        "No engines yet; build one with: millrace build sample:smollm2-135m",
    )


def cancel_build(client: Client, name: str, *, as_json: bool) -> None:
    """Cancels the build of that name or first digits, and prints how it stands.

    Raises:
        CommandFailed: no build begins so, or several do.
    """
    digits = name.removeprefix("builds/")
    names = [
        b.name
        for b in client.list_builds()
        if digits and b.name.removeprefix("builds/").startswith(digits)
    ]
    if len(names) != 1:
        problem = "several builds begin" if names else "no build begins"
        raise CommandFailed(f"{problem} with {digits!r}; see `millrace builds`", NOT_FOUND)
    build = client.cancel_build(names[0])
    if as_json:
        output.print_json(output.to_dict(build))
        return
    output.print_line(f"{output.short_name(build.name)}  {state_text(build)}")


def quant_text(quant: engine_pb2.QuantConfig) -> str:
    """A quantization as people write it: `int4-g128`, `bf16-kv-fp8`."""
    group = f"-g{quant.group_size}" if quant.group_size else ""
    return f"{quant.scheme}{group}" + (f"-kv-{quant.kv_cache}" if quant.kv_cache else "")


def recipe_text(quant: engine_pb2.QuantConfig) -> str:
    """A quantization with what else its recipe says: `int4-awq-g64, keeps lm_head`."""
    parts = [quant_text(quant)]
    if quant.keep:
        parts.append(f"keeps {','.join(quant.keep)}")
    if quant.auto_keep:
        parts.append("keeps what its limits need")
    if quant.max_kl:
        parts.append(f"KL at most {quant.max_kl:g}")
    if quant.max_perplexity_increase:
        parts.append(f"perplexity at most {quant.max_perplexity_increase:+.0%}")
    if quant.no_act_order:
        parts.append("no act-order")
    if quant.skip_quality:
        parts.append("not measured")
    return ", ".join(parts)


def _build_row(build: compiler_pb2.Build) -> tuple[str, ...]:
    state = state_text(build)
    is_failed = build.state == compiler_pb2.BUILD_STATE_FAILED
    return (
        output.short_name(build.name),
        build.model_uri,
        build.key.arch,
        quant_text(build.key.quant),
        state,
        build.error.message if is_failed else done_text(build),
        output.age_text(build.create_time.seconds),
    )


def _engine_row(engine: engine_pb2.Engine) -> tuple[str, ...]:
    return (
        output.short_name(engine.name),
        engine.model,
        engine.key.arch,
        quant_text(engine.key.quant),
        output.bytes_text(sum(layer.size_bytes for layer in engine.layers)),
        output.age_text(engine.create_time.seconds),
    )
