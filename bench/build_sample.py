"""Builds SmolLM2-135M into a store on disk, without daemons: what benchmarks of speed start from.
Nothing is measured of its quality: bench/quantization.py does that.

    python bench/build_sample.py STORE QUANT [MODEL_URI [MODEL_NAME [ARCH]]]
"""

import argparse
from pathlib import Path

from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from shared.store.local import LocalStore


def main() -> None:
    """Builds and prints the engine's name; a cache hit where it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("quant")
    parser.add_argument("model_uri", nargs="?", default="sample:smollm2-135m")
    parser.add_argument("model", nargs="?", default="", help="its name; else as its source has it")
    parser.add_argument("arch", nargs="?", default="cpu")
    options = parser.parse_args()
    cache = options.store / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    recipe = QuantConfig(options.quant, skip_quality=options.quant not in ("bf16", "fp32"))
    resolved = resolve(options.model_uri, [options.arch], recipe, options.model, cache)
    request = BuildRequest(options.model_uri, resolved.keys[options.arch], resolved.model, cache)
    print(build(request, LocalStore(options.store), lambda progress: None).name)


if __name__ == "__main__":
    main()
