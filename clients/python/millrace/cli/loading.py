"""`millrace load`: has a runtime serve an engine of the store."""

import re
from collections.abc import Iterable

from millrace.cli import output
from millrace.cli.failures import NOT_FOUND, CommandFailed
from millrace.cli.listing import quant_text
from millrace.client import Client
from millrace.engine.v1 import engine_pb2
from millrace.runtime.v1 import runtime_pb2

_DIGITS = re.compile(r"[0-9a-f]{6,64}")


def load(client: Client, name: str, quant: str, *, as_json: bool) -> None:
    """Loads the engine that `name` means, and says what is served now."""
    wanted = find_engine(client, name, quant)
    served = serve(client, wanted)
    if as_json:
        output.print_json(output.to_dict(served))
    else:
        key = served.key
        output.print_line(f"serving {served.model}  {key.arch}  {quant_text(key.quant)}")
        output.say(startup_text(client.get_status().startup))


def serve(client: Client, engine: engine_pb2.Engine) -> engine_pb2.Engine:
    """Has the runtime serve the newest engine of `engine`'s selector; returns it."""
    key = engine.key
    with output.waiting(f"loading {engine.model} {quant_text(key.quant)}"):
        return client.load_engine(
            engine.model,
            key.quant.scheme,
            group_size=key.quant.group_size,
            kv_cache=key.quant.kv_cache,
            arch=key.arch,
        )


def startup_text(phases: Iterable[runtime_pb2.StartupPhase]) -> str:
    """Where a load's time went: `loaded in 4.12 s: import 2.31 s, ...`, the longest phase first."""
    spent = {phase.name: phase.duration.ToNanoseconds() / 1e9 for phase in phases}
    longest = sorted(spent, key=lambda name: -spent[name])
    parts = [
        f"{name} {output.duration_text(spent[name])}" for name in longest if spent[name] >= 0.01
    ]
    return f"loaded in {output.duration_text(sum(spent.values()))}: {', '.join(parts)}"


def _is_meant(text: str, quant: engine_pb2.QuantConfig) -> bool:
    """Claims that `text` means `quant`: in full, or without its group size; empty means any."""
    names = {quant_text(quant), quant.scheme}
    if quant.scheme == "int4-rtn":
        names |= {name.replace("int4-rtn", "int4") for name in names}
    return not text or text in names


def find_engine(client: Client, name: str, quant: str) -> engine_pb2.Engine:
    """The newest engine of a model, or the one of that name or digits.

    Args:
        quant: as people write it; empty for any.

    Raises:
        CommandFailed: there is none, or there are several that differ in arch or quant.
    """
    if name.startswith("engines/"):
        return client.get_engine(name).engine
    found = [
        engine
        for engine in client.list_engines()
        if engine.model == name and _is_meant(quant, engine.key.quant)
    ]
    kinds = {f"{engine.key.arch} {quant_text(engine.key.quant)}" for engine in found}
    if len(kinds) > 1:
        raise CommandFailed(
            f"{name!r} has several engines ({', '.join(sorted(kinds))}); say which by "
            "--quant, or by its digits, as `millrace engines` shows them"
        )
    if found:
        return found[0]
    if _DIGITS.fullmatch(name):
        return client.get_engine(f"engines/{name}").engine
    raise CommandFailed(f"no engine of {name!r}; `millrace engines` lists what there is", NOT_FOUND)
