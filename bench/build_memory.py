"""Peak anonymous memory of a build: it must not grow with the model.

    python bench/build_memory.py [--gigabytes 8] [--quant int8] [--arch cpu]

Builds a synthetic model (Llama 3's layer shapes, random weights, `random:` URI) in a build child,
as the compile daemon does, and samples the child's RssAnon. Prints one line of JSON; exits with 1
where the peak is beyond 2 GiB + twice the largest tensor.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.resolve import resolve
from shared.engine import QuantConfig

SAMPLE_INTERVAL_S = 0.005
ALLOWED_BYTES = 2 << 30

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def main() -> int:
    """Builds, prints what it took, and says by the exit status whether it was little enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--arch", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-build-memory-") as folder:
        result = measure(Path(folder), options.gigabytes, options.quant, options.arch)
    print(json.dumps(result))
    return 0 if result["peak_anonymous_bytes"] <= result["allowed_bytes"] else 1


def measure(folder: Path, gigabytes: float, quant: str, arch: str) -> dict[str, Any]:
    """Builds a model of about `gigabytes` (bf16) under `folder`; what that took."""
    (folder / "config.json").write_text(json.dumps(_config(gigabytes * 1e9)))
    uri = f"random:{folder / 'config.json'}?seed=1"
    tensors = open_checkpoint(uri).tensors.values()
    resolved = resolve(uri, [arch], QuantConfig(quant), "", folder)
    job = {
        "model_uri": uri,
        "model": resolved.model,
        "key": resolved.keys[arch].to_dict(),
        "store": str(folder / "store"),
        "cache_dir": str(folder),
    }
    started_s = time.monotonic()
    peak_bytes, num_samples = _run(job)
    largest = max(info.num_bytes for info in tensors)
    checkpoint = sum(info.num_bytes for info in tensors)
    duration_s = time.monotonic() - started_s
    return {
        "benchmark": "build_memory",
        "quant": quant,
        "arch": arch,
        "checkpoint_bytes": checkpoint,
        "largest_tensor_bytes": largest,
        "peak_anonymous_bytes": peak_bytes,
        "allowed_bytes": ALLOWED_BYTES + 2 * largest,
        "num_samples": num_samples,
        "duration_s": round(duration_s, 1),
        "megabytes_per_s": round(checkpoint / duration_s / 1e6),
    }


def _config(num_bytes: float) -> dict[str, Any]:
    hidden, ffn = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer_bytes = 2 * (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * ffn)
    outside_bytes = 2 * 2 * SHAPE["vocab_size"] * hidden
    layers = max(1, math.ceil((num_bytes - outside_bytes) / layer_bytes))
    return {**SHAPE, "num_hidden_layers": layers}


def _run(job: dict[str, Any]) -> tuple[int, int]:
    """Peak RssAnon of the child that does the job, and how often it was sampled."""
    child = subprocess.Popen(
        [sys.executable, "-m", "compiler_service.build_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None, "the child has no stdin"
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    peak, samples = 0, 0
    while child.poll() is None:
        peak, samples = max(peak, _anonymous_bytes(child.pid)), samples + 1
        time.sleep(SAMPLE_INTERVAL_S)
    if child.returncode != 0:
        raise RuntimeError(f"the build ended with {child.returncode}; its log is above")
    return peak, samples


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # the process has just ended and has no memory


if __name__ == "__main__":
    sys.exit(main())
