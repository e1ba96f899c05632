"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

# Groups of commands in the help.
ENGINES, GENERATING, FLEET = "Engines", "Generating", "Many runtimes"
MACHINE, SECURITY = "This machine", "Security"

COMPILER, RUNTIME, GATEWAY = "127.0.0.1:7601", "127.0.0.1:7602", "127.0.0.1:7600"

Compiler = Annotated[
    str,
    typer.Option(
        "--compiler", metavar="HOST:PORT", envvar="MILLRACE_CLI_COMPILER", help="Compile daemon."
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="HOST:PORT", envvar="MILLRACE_CLI_RUNTIME", help="Runtime daemon."
    ),
]
Gateway = Annotated[
    str,
    typer.Option("--gateway", metavar="HOST:PORT", envvar="MILLRACE_CLI_GATEWAY", help="Gateway."),
]
HOME = Path("~/.millrace")
State = Annotated[
    Path,
    typer.Option(
        "--state",
        metavar="FOLDER",
        envvar="MILLRACE_CLI_STATE",
        help="Where the local stack keeps engines, its queue and logs.",
    ),
]
# Where an invocation's context says that its results on stdout, and so its failures, are JSON.
IS_JSON = "millrace.is_json"


def _keep_is_json(context: typer.Context, is_json: bool) -> bool:
    context.meta[IS_JSON] = is_json
    return is_json


AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, for programs.", callback=_keep_is_json)
]
Quant = Annotated[
    str,
    typer.Option(
        "--quant",
        "-q",
        metavar="SCHEME",
        help="bf16, int8, fp8, int4-awq, int4-g128, as-is ...",
    ),
]
OwnQuant = Annotated[
    str,
    typer.Option(
        "--quant",
        "-q",
        metavar="SCHEME",
        help="bf16, int8, fp8, int4-awq, int4-g128, as-is ...; unset: as the checkpoint is.",
    ),
]
AnyQuant = Annotated[
    str,
    typer.Option(
        "--quant", "-q", metavar="SCHEME", help="Which of the model's engines; unset: the only one."
    ),
]
Limit = Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="At most this many.")]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-m", metavar="N", min=0, help="Tokens to generate at most; 0: no limit."
    ),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", metavar="T", min=0, help="0 picks the likeliest token."),
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", help="Keep the likeliest up to this probability.")
]
TopK = Annotated[
    int, typer.Option("--top-k", metavar="K", min=0, help="Keep the k likeliest; 0: all.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Makes the answer repeatable.")
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="NAME=VALUE",
        help="A variable for the chat template, such as enable_thinking=false; repeatable.",
    ),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends it; repeatable.")
]
