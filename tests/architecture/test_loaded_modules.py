"""What a serving process loads, found by loading it: what libraries reach on their own counts too."""

import subprocess
import sys

import pytest

_HEAVY = ("triton", "transformers", "sympy", "torch._dynamo", "torch._inductor")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("runtime_service.engine_process, runtime_service.execution.loading", _HEAVY),
        # It hashes weights while torch is imported.
        (
            "runtime_service.engine_process, runtime_service.execution.loader",
            ("torch", "pydantic", "shared.channels", *_HEAVY),
        ),
        # It starts the engine process before it imports the daemon.
        ("runtime_service.__main__", ("asyncio", "grpc", "pydantic", "structlog", "torch")),
        # They can be ended before they import what takes long.
        (
            "runtime_service.gateway.__main__",
            ("asyncio", "grpc", "pydantic", "structlog", "aiohttp"),
        ),
        ("compiler_service.__main__", ("asyncio", "grpc", "pydantic", "structlog", "redis")),
        ("runtime_service.daemon", ("torch", *_HEAVY)),
        ("runtime_service.gateway.daemon", ("torch", *_HEAVY)),
    ],
)
def test_a_serving_process_loads_no_compiler(modules: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {modules}; print(*(m for m in {absent!r} if m in sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []
