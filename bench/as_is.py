"""What keeping a checkpoint's own quantization costs and gives, beside quantizing it again.

    python -m bench.as_is STORE [--model URI] [--quants as-is,bf16,int8,int4-g32,int4] [--threads N]

The reference is the graph in fp32 over the checkpoint's dequantized values. Each engine reads the
same public-domain text twice on this CPU, as served: in one step (many rows: the prompt's kernels)
and 8 tokens a step (few rows: the kernels of decoding). Prints JSON lines: bytes of weights, mean KL
divergence from the reference in nats a token, how often both name the same next token, perplexity;
then decode speed of one stream, the engines taking turns.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bench.cpu_decode import generate
from compiler_service.builder import BuildRequest, build
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import lower_model
from compiler_service.resolve import resolve
from kernels.batch import StepBatch
from kernels.cpu_form import cpu_target
from kernels.reference import prompt_batch, run
from runtime_service.execution.cpu_executor import CpuExecutor
from runtime_service.execution.loading import load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.request import SamplingParams
from shared.engine import EngineManifest, QuantConfig
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader

# The opening of Pride and Prejudice, Jane Austen, 1813.
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of "
    "their daughters. “My dear Mr. Bennet,” said his lady to him one day, “have you heard that "
    "Netherfield Park is let at last?” Mr. Bennet replied that he had not. “But it is,” returned "
    "she; “for Mrs. Long has just been here, and she told me all about it.” Mr. Bennet made no "
    "answer. “Do not you want to know who has taken it?” cried his wife impatiently. “You want to "
    "tell me, and I have no objection to hearing it.” This was invitation enough. “Why, my dear, "
    "you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from "
    "the north of England; that he came down on Monday in a chaise and four to see the place, and "
    "was so much delighted with it that he agreed with Mr. Morris immediately; that he is to take "
    "possession before Michaelmas, and some of his servants are to be in the house by the end of "
    "next week.”"
)
FEW_TOKENS = 8
BLOCK_TOKENS = 16


def main() -> None:
    """Measures every engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--quants", default="as-is,bf16,int8,int4-g32,int4")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.model)
    tokenizer = Tokenizer.from_buffer(checkpoint.files["tokenizer.json"])
    tokens_T = torch.tensor(tokenizer.encode(TEXT).ids, dtype=torch.int32)
    expected_TV = _reference_logits(arguments.model, tokens_T)
    print(json.dumps({"tokens": len(tokens_T), "perplexity": _perplexity(expected_TV, tokens_T)}))
    store, names = LocalStore(arguments.store), arguments.quants.split(",")
    engines = {name: _built(arguments.model, name, arguments.store, store) for name in names}
    for name, engine in engines.items():
        line = {"quant": name, **_quality(store, engine, tokens_T, expected_TV)}
        print(json.dumps(line), flush=True)
    for name, step_s in _step_seconds(store, engines, arguments.rounds).items():
        print(json.dumps({"quant": name, "decode_tok_s": round(1 / step_s)}))


def _reference_logits(model_uri: str, tokens_T: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(model_uri)
    graph = lower_model(checkpoint.config, "float32")
    weights = {
        name: torch.cat([checkpoint.read(part) for part in weight.parts]).float()
        for name, weight in graph.weights.items()
    }
    return run(graph, weights, tokens_T, prompt_batch(graph, [len(tokens_T)]))["logits"]


def _built(model_uri: str, name: str, folder: Path, store: LocalStore) -> EngineManifest:
    scheme, _, group = name.partition("-g")
    quant = QuantConfig(scheme, int(group or 0))
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    resolved = resolve(model_uri, ["cpu"], quant, "", cache)
    request = BuildRequest(model_uri, resolved.keys["cpu"], resolved.model, cache)
    return build(request, store, lambda progress: None)


def _quality(
    store: LocalStore, engine: EngineManifest, tokens_T: torch.Tensor, expected_TV: torch.Tensor
) -> dict[str, object]:
    graph = Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())
    num_bytes = sum(b.size_bytes for b in engine.layers if b.title.startswith("weights/"))
    line: dict[str, object] = {"weight_mb": round(num_bytes / 1e6, 1)}
    num_blocks = len(tokens_T) // BLOCK_TOKENS + 1
    with WeightReader(store, engine) as reader:
        target = cpu_target(graph)
        executor = CpuExecutor(graph, reader.roles, target, num_blocks, BLOCK_TOKENS)
    for kind, step in (("many", len(tokens_T)), ("few", FEW_TOKENS)):
        found_TV = torch.cat(
            [
                executor.forward(chunk, _step(start, len(chunk), graph))
                for start, chunk in zip(
                    range(0, len(tokens_T), step), tokens_T.split(step), strict=True
                )
            ]
        )
        log_expected, log_found = expected_TV.log_softmax(-1), found_TV.log_softmax(-1)
        kl_T = (log_expected.exp() * (log_expected - log_found)).sum(-1)
        same_T = found_TV.argmax(-1) == expected_TV.argmax(-1)
        line |= {
            f"kl_{kind}": round(float(kl_T.mean()), 6),
            f"top1_{kind}": round(float(same_T.float().mean()), 4),
            f"perplexity_{kind}": _perplexity(found_TV, tokens_T),
        }
    return line


def _step_seconds(
    store: LocalStore, engines: dict[str, EngineManifest], rounds: int
) -> dict[str, float]:
    """Seconds of a decode step of one stream: the best round's median.

    Engines take turns, so that a busy moment of the machine is nobody's.
    """
    options = RunnerOptions(max_sequence_tokens=2048)
    loaded = {name: load_runner(store, engine, options) for name, engine in engines.items()}
    sampling = SamplingParams(temperature=0.0, seed=1)
    medians: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, runner in loaded.items():
            medians[name].append(statistics.median(generate(runner, 1, 64, 64, sampling)[1]))
    return {name: min(found) for name, found in medians.items()}


def _step(start: int, count: int, graph: Graph) -> StepBatch:
    """The next `count` tokens of the one sequence, in blocks from the first on."""
    batch = prompt_batch(graph, [start + count], block_tokens=BLOCK_TOKENS)
    batch.positions_T = batch.positions_T[start:]
    batch.slot_mapping_T = batch.slot_mapping_T[start:]
    batch.query_start_S1 = torch.tensor([0, count], dtype=torch.int32)
    batch.logit_rows_R = torch.arange(count, dtype=torch.int32)
    return batch


def _perplexity(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:].long())
    return round(float(loss.exp()), 4)


if __name__ == "__main__":
    main()
