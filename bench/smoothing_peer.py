"""AWQ, GPTQ and SmoothQuant beside llm-compressor's: the same weights, calibration and held-out text.

    pip install llmcompressor==0.14.0.1      # beside the project, in an environment of its own
    PYTHONPATH=.:clients/python python -m bench.smoothing_peer STORE [--methods rtn,awq,...] [--layers 2]

Both read the checkpoint's values in fp32, llm-compressor as a transformers model, and the windows that our
builds calibrate with; groups have 64 values; embedding and head stay as they are in both. A line of JSON
for each method: the mean KL divergence from the unquantized model on the windows that no calibration saw,
and the perplexity there, of ours as the engine's report tells it, and of llm-compressor's by transformers.
`their_scales_our_grid` is the weights that its AWQ smoothed, rounded as our `int4-rtn` rounds.
"""

import argparse
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bench.peer_libraries import peer_libraries
from bench.quantization import NO_LIMIT
from compiler_service.builder import BuildRequest, build
from compiler_service.calibration.text import DEFAULT_TEXT, read_calibration_text
from compiler_service.calibration.windows import (
    DEFAULT_CALIBRATION_TOKENS,
    TextTokenizer,
    TextWindows,
    cut_windows,
)
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.resolve import resolve
from kernels.linear.layouts import LAYOUTS, pack_int4
from shared.engine import QuantConfig
from shared.store.local import LocalStore

with peer_libraries("llmcompressor==0.14.0.1"):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GROUP = 64
OURS = {
    "rtn": "int4-rtn", "awq": "int4-awq", "gptq": "int4-gptq", "w8a8": "", "smoothquant": "w8a8-int8",
}  # fmt: skip


def main() -> None:
    """Compares, and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--methods", default=",".join(OURS))
    parser.add_argument("--layers", type=int, default=0, help="the first ones alone; 0: all")
    parser.add_argument("--calibration-tokens", type=int, default=DEFAULT_CALIBRATION_TOKENS)
    options = parser.parse_args()
    if not torch.accelerator.is_available():  # its AWQ pins memory for one all the same
        IntermediatesCache.pin_memory = lambda cache, batch: None  # type: ignore[method-assign]
    tokens = options.calibration_tokens
    # Asked for, and never used: the windows are token ids.
    processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = write_checkpoint(folder, options.model, options.layers, tokens)
        model = LlamaForCausalLM.from_pretrained(folder)
        expected_RV = logits(model, windows)
        for method in options.methods.split(","):
            peer = LlamaForCausalLM.from_pretrained(folder)
            oneshot(peer, processor=processor, dataset=batches(windows), recipe=recipe(method))
            result = {"method": method, "theirs": quality(expected_RV, peer, windows)}
            if method == "awq":
                smoothed = LlamaForCausalLM.from_pretrained(folder)
                smoothed.load_state_dict(peer.state_dict(), strict=False)
                round_as_ours(smoothed)
                result["their_scales_our_grid"] = quality(expected_RV, smoothed, windows)
            if OURS[method]:
                store = LocalStore(options.store)
                result["ours"] = our_quality(store, str(folder), OURS[method], tokens)
            print(json.dumps(result), flush=True)


def write_checkpoint(
    folder: Path, uri: str, num_layers: int, calibration_tokens: int
) -> TextWindows:
    """The checkpoint in fp32 as a Hugging Face folder, for both; gives what a build of it looks at.

    Args:
        num_layers: of the first layers alone; 0 = all.
    """
    checkpoint = open_checkpoint(uri)
    config = {**checkpoint.config, "torch_dtype": "float32"}
    num_layers = config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    for title, content in checkpoint.files.items():
        (folder / title).write_bytes(content)
    found = {name: re.search(r"layers\.(\d+)\.", name) for name in checkpoint.tensors}
    kept = [name for name, layer in found.items() if layer is None or int(layer[1]) < num_layers]
    tensors = {name: checkpoint.read(name).float().contiguous() for name in kept}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with DEFAULT_TEXT.open("rb") as text:
        documents = read_calibration_text("", hashlib.file_digest(text, "sha256").hexdigest())
    tokenizer = TextTokenizer(checkpoint.files, checkpoint.config["vocab_size"])
    positions = int(config["max_position_embeddings"])
    return cut_windows(documents, tokenizer, positions, calibration_tokens)


def batches(windows: TextWindows) -> torch.utils.data.DataLoader[Any]:
    """The calibration windows, one a batch."""
    samples = [
        {
            "input_ids": window.token_ids[None],
            "attention_mask": torch.ones(1, len(window.token_ids)),
        }
        for window in windows.calibration
    ]
    return torch.utils.data.DataLoader(samples, batch_size=None)  # type: ignore[arg-type]


def recipe(method: str) -> list[Any]:
    """llm-compressor's modifiers, with its own defaults."""
    if method in ("w8a8", "smoothquant"):
        rounding = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
    else:
        weights = {
            "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP,
        }  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        modifier = GPTQModifier if method == "gptq" else QuantizationModifier
        rounding = modifier(config_groups=groups, ignore=["lm_head"])
    before = {"awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier()]}
    return [*before.get(method, []), rounding]


@torch.no_grad()
def logits(model: LlamaForCausalLM, windows: TextWindows) -> torch.Tensor:
    """fp32 [R, V] over the windows that are measured."""
    return torch.cat([model(window.token_ids[None]).logits[0] for window in windows.measured])


def quality(
    expected_RV: torch.Tensor, model: LlamaForCausalLM, windows: TextWindows
) -> dict[str, float]:
    """The mean KL divergence, nats a token, and the perplexity."""
    found_RV = logits(model, windows)
    expected, found = (x.double().log_softmax(-1) for x in (expected_RV, found_RV))
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    following = torch.cat([window.following for window in windows.measured])
    perplexity = found.gather(1, following[:, None]).mean().neg().exp()
    return {"kl": round(float(divergence), 5), "perplexity": round(float(perplexity), 3)}


@torch.no_grad()
def round_as_ours(model: LlamaForCausalLM) -> None:
    """Every linear of the layers, to nearest in `int4_group`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = pack_int4(module.weight, GROUP)
            module.weight.copy_(LAYOUTS["int4_group"].unpack(packed))


def our_quality(
    store: LocalStore, uri: str, scheme: str, calibration_tokens: int
) -> dict[str, float]:
    """What the engine of `scheme` reports, built here where it is not in the store."""
    quant = QuantConfig(
        scheme,
        keep=("lm_head",),
        calibration_tokens=0 if scheme == "int4-rtn" else calibration_tokens,
        max_kl=NO_LIMIT,
        max_perplexity_increase=NO_LIMIT,
    )
    cache = store.root / "cache"
    resolved = resolve(uri, ["cpu"], quant, "", cache)
    request = BuildRequest(uri, resolved.keys["cpu"], resolved.model, cache)
    engine = build(request, store, lambda progress: None)
    report = json.loads(store.read_all(engine.layer("quality.json").digest))
    perplexity = report["perplexity"]["quantized"]
    return {"kl": round(report["kl"]["mean"], 5), "perplexity": round(perplexity, 3)}


if __name__ == "__main__":
    main()
