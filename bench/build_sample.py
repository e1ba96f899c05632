"""Builds SmolLM2-135M into a store on disk, without daemons: what benchmarks of speed start from.
Nothing is measured of its quality: bench/quantization.py does that.

python bench/build_sample.py STORE QUANT [MODEL_URI [MODEL_NAME [ARCH]]]
"""

import sys
from pathlib import Path

from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from shared.store.local import LocalStore


def main(
    store: str,
    quant: str,
    model_uri: str = "sample:smollm2-135m",
    model: str = "",
    arch: str = "cpu",
) -> None:
    """Builds and prints the engine's name; a cache hit where it is there."""
    cache = Path(store) / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    recipe = QuantConfig(quant, skip_quality=quant not in ("bf16", "fp32"))
    resolved = resolve(model_uri, [arch], recipe, model, cache)
    request = BuildRequest(model_uri, resolved.keys[arch], resolved.model, cache)
    print(build(request, LocalStore(Path(store)), lambda progress: None).name)


if __name__ == "__main__":
    main(*sys.argv[1:])
