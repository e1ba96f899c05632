"""What the search for layers to keep measures is what the build then measures, to the last bit."""

from pathlib import Path

import pytest

from compiler_service.calibration.text import read_calibration_text
from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.quality.needle import most_tokens
from compiler_service.quality.probe import make_probe
from compiler_service.quality.report import Measurement
from compiler_service.quantization import scheme_named
from compiler_service.quantize import GraphQuantizer
from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("scheme", ["w8a8-int8", "int4-gptq"])
def test_windows_give_the_same_with_and_without_the_probe_beside_them(
    scheme: str, tmp_path: Path
) -> None:
    """Rounded activations tell last bits apart: what is proposed to keep would not pass by them."""
    sizes = {"hidden_size": 288, "intermediate_size": 416, "max_position_embeddings": 4096}
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=2, **sizes)
    quant = QuantConfig(scheme, 32 if scheme.startswith("int4") else 0)
    key = resolve(str(folder), ["cpu"], quant, "", tmp_path).keys["cpu"]
    checkpoint = open_checkpoint(str(folder))
    graph = plan(checkpoint, key, "tiny").graph
    tokenizer = TextTokenizer(checkpoint.files, 320)
    documents = read_calibration_text("", key.quant.calibration_digest)
    windows = cut_windows(documents, tokenizer, 4096, 1024)
    probe = make_probe(windows, tokenizer, 2048, 4096, most_tokens(graph))
    assert any(context.needles for context in probe.contexts)
    texts = [window.token_ids for window in windows.calibration]
    found: list[Measurement] = []
    for asked in (probe, probe.windows_alone()):
        quantizer = GraphQuantizer(checkpoint, graph, scheme_named(key.quant), {}, asked, texts)
        measurement = quantizer.run(None, lambda name: None)
        assert measurement is not None
        found.append(measurement)
    whole, alone = found
    assert (whole.kl_mean, whole.kl_p99) == (alone.kl_mean, alone.kl_p99)
    assert whole.perplexity_quantized == alone.perplexity_quantized
    assert whole.perplexity_unquantized == alone.perplexity_unquantized
    assert whole.kl_mean > 0
