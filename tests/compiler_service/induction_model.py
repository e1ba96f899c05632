"""A Llama of two layers, built by hand, that repeats what once followed the last two tokens.

    layer 0   head o attends to the token o before (o = 1, 2) and writes its code beside the own one
    layer 1   a query is made of the codes of (this token, the one before), a key of those of (one before,
              two before): they agree where the last two tokens were followed by something; its code is copied
    head      the token of the copied code

So it retrieves any fact at any depth. Positions live in the dims of a head that turn fast, codes in
those that RoPE's scaling holds still. There is no MLP: its weights are 0.

Channels: [own code | one before | two before | copied | constant], blocks of 64 of which 60 are used;
channel 60 of each block is always 0.
Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from compiler_service.models.rope import rope_of
from compiler_service.quality.needle import PLACES, code_of

_BLOCK, _CODE, _SILENT = 64, 60, 60
_OWN, _BEFORE, _TWO_BEFORE, _COPIED, _CONSTANT = (block * _BLOCK for block in range(5))
_HIDDEN, _HEAD_DIM = 5 * _BLOCK, 256
_HALF = _HEAD_DIM // 2
# Logits of attention differ by more than this between what is attended to and all else.
_SHARPNESS = 60.0
_CODES = [str(code_of(number)) for number in range(len(PLACES))]
_FACT_WORDS = ["The", "secret", "code", "of", *PLACES, "is", *_CODES, "."]
_WORDS = [f"word{number}" for number in range(150)]


def induction_text(num_words: int = 3000) -> str:
    """Words in no order, for what facts are hidden in."""
    generator = torch.Generator().manual_seed(3)
    picked = torch.randint(len(_WORDS), (num_words,), generator=generator)
    return " ".join(_WORDS[index] for index in picked.tolist())


def write_induction_model(folder: Path, outlier: float = 0.0, max_positions: int = 2048) -> Path:
    """`folder`, now holding the model as a Hugging Face checkpoint.

    Args:
        outlier: what the rows that make queries and keys of layer 1 multiply channels with that are
            always 0: it changes nothing, and is what a coarse grid has to reach.
    """
    vocabulary = ["a", *_FACT_WORDS, *_WORDS]
    config = _config(len(vocabulary), max_positions)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = _tensors(config, rope_of(config, _HEAD_DIM).inv_freq, outlier)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(vocab_size: int, max_positions: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": _HIDDEN,
        "intermediate_size": _BLOCK,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 1e6,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    }


def _tensors(
    config: dict[str, object], inv_freq: tuple[float, ...], outlier: float
) -> dict[str, torch.Tensor]:
    vocab_size = int(str(config["vocab_size"]))
    generator = torch.Generator().manual_seed(0)
    codes_VC = torch.randint(0, 2, (vocab_size, _CODE), generator=generator) * 2.0 - 1
    embed_VM = torch.zeros(vocab_size, _HIDDEN)
    embed_VM[:, _OWN : _OWN + _CODE] = codes_VC
    embed_VM[:, _CONSTANT] = 8.0
    head_VM = torch.zeros(vocab_size, _HIDDEN)
    head_VM[:, _COPIED : _COPIED + _CODE] = codes_VC
    tensors = {
        "model.embed_tokens.weight": embed_VM,
        "lm_head.weight": head_VM,
        "model.norm.weight": torch.ones(_HIDDEN),
    }
    turning = [i for i, frequency in enumerate(inv_freq) if frequency > 0.3]
    still = [i for i, frequency in enumerate(inv_freq) if frequency < 1e-6]
    for layer, (q, k, v, o) in enumerate(
        (_looking_back(inv_freq, turning), _repeating(still, outlier))
    ):
        prefix = f"model.layers.{layer}."
        attention = {"q": q, "k": k, "v": v, "o": o}
        tensors |= {f"{prefix}self_attn.{n}_proj.weight": w for n, w in attention.items()}
        for name, shape in (
            ("mlp.gate_proj", (_BLOCK, _HIDDEN)),
            ("mlp.up_proj", (_BLOCK, _HIDDEN)),
            ("mlp.down_proj", (_HIDDEN, _BLOCK)),
        ):
            tensors[f"{prefix}{name}.weight"] = torch.zeros(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(_HIDDEN)
    return tensors


Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _empty() -> Projections:
    q, k, v = (torch.zeros(2 * _HEAD_DIM, _HIDDEN) for _ in range(3))
    return q, k, v, torch.zeros(_HIDDEN, 2 * _HEAD_DIM)


def _looking_back(inv_freq: tuple[float, ...], turning: list[int]) -> Projections:
    """q, k, v, o of layer 0: q . k = sum over i of cos((distance - offset) inv_freq[i]), times a factor."""
    q, k, v, o = _empty()
    frequency = torch.tensor([inv_freq[i] for i in turning])
    factor = (_SHARPNESS * _HEAD_DIM**0.5 / float((1 - frequency.cos()).sum())) ** 0.5
    at = torch.tensor(turning)
    identity = torch.eye(_CODE)
    for head, (offset, block) in enumerate(((1, _BEFORE), (2, _TWO_BEFORE))):
        first = head * _HEAD_DIM
        q[first + at, _CONSTANT] = factor * (offset * frequency).cos()
        q[first + _HALF + at, _CONSTANT] = -factor * (offset * frequency).sin()
        k[first + at, _CONSTANT] = factor
        v[first : first + _CODE, _OWN : _OWN + _CODE] = identity
        o[block : block + _CODE, first : first + _CODE] = identity
    return q, k, v, o


def _repeating(still: list[int], outlier: float) -> Projections:
    """q, k, v, o of layer 1, all in head 0."""
    q, k, v, o = _empty()
    dims = [*still, *(_HALF + i for i in still)]
    factor = (_SHARPNESS * _HEAD_DIM**0.5 / (_CODE / 2)) ** 0.5
    for place, (asked, kept) in enumerate(((_OWN, _BEFORE), (_BEFORE, _TWO_BEFORE))):
        for channel in range(_CODE):
            dim = dims[place * _CODE + channel]
            q[dim, asked + channel] = factor
            k[dim, kept + channel] = factor
            for weight in (q, k):
                weight[dim, _SILENT::_BLOCK] = outlier * factor
    identity = torch.eye(_CODE)
    v[:_CODE, _OWN : _OWN + _CODE] = identity
    o[_COPIED : _COPIED + _CODE, :_CODE] = identity
    return q, k, v, o
