"""Rewrites a GGUF checkpoint in another number format, so that peers run the same weights as we do.

    python bench/peers/gguf_variants.py SOURCE.gguf OUT.gguf Q8_0|Q4_0|BF16

Matrices take the format; under Q4_0 the embedding (and tied LM head) keeps Q8_0, as llama.cpp's own
quantizer leaves it; norms stay fp32. Needs the `gguf` package only.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

FILE_TYPES = {
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "BF16": LlamaFileType.MOSTLY_BF16,
}
OWN_FIELDS = {
    "general.architecture",
    "general.file_type",
    "GGUF.version",
    "GGUF.tensor_count",
    "GGUF.kv_count",
}


def main(source: str, target: str, format_name: str) -> None:
    """Writes `target`."""
    reader = GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, architecture)
    writer.add_file_type(FILE_TYPES[format_name])
    for name, field in reader.fields.items():
        if name in OWN_FIELDS:
            continue
        if field.types[0] is GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = GGMLQuantizationType[format_name]
            if format_name == "Q4_0" and tensor.name == "token_embd.weight":
                kind = GGMLQuantizationType.Q8_0
        data = values if kind is GGMLQuantizationType.F32 else quantize(values, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
