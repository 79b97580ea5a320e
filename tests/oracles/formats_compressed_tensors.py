"""Checkpoints that compressed-tensors 0.20 compresses, and decompresses: `formats_compressed_tensors.py OUT`."""

import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from formats_common import case, llama, load, mixtral

OUT = Path(sys.argv[1])
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def scheme(preset=None, targets=("Linear",), inputs=None, **weights):
    if preset:
        parts = {k: v.model_copy() if v is not None else None for k, v in PRESET_SCHEMES[preset].items()}
    else:
        strategy = "group" if weights.get("group_size") else "channel"
        parts = {"weights": QuantizationArgs(type="int", **{"strategy": strategy, "symmetric": True, **weights})}
    if inputs:
        parts["input_activations"] = QuantizationArgs(**inputs)
    return QuantizationScheme(targets=list(targets), **parts)


def calibrate(module):
    """Scales and zero points by the library's rule for the smallest and largest value."""
    args, weight, extra = module.quantization_scheme.weights, module.weight.data, {}
    match getattr(args.strategy, "value", args.strategy):
        case "tensor":
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "block":
            height, width = args.block_structure
            rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
            whole = torch.zeros(rows * height, columns * width, dtype=weight.dtype)
            whole[: weight.shape[0], : weight.shape[1]] = weight
            grid = whole.reshape(rows, height, columns, width)
            low, high = grid.amin((1, 3)), grid.amax((1, 3))
        case _:
            grouped = weight.reshape(len(weight), -1, args.group_size)
            low, high = grouped.amin(-1), grouped.amax(-1)
    if hasattr(module, "weight_global_scale"):
        extra["global_scale"] = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(extra["global_scale"])
    scale, zero = calculate_qparams(low, high, args, **extra)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    if hasattr(module, "weight_zero_point"):
        zero = zero.to(module.weight_zero_point.dtype)
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(1.0)


def make(name, model, *schemes, limit="5GB"):
    groups = {f"group_{i}": each for i, each in enumerate(schemes)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    modules = {n: m for n, m in model.named_modules() if getattr(getattr(m, "quantization_scheme", None), "weights", 0)}
    for module in modules.values():
        calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = OUT / name / "model"
    model.save_pretrained(folder, max_shard_size=limit)
    compressor.update_config(folder)
    stored, native, wide = load(folder), {}, {}
    for module_name, module in modules.items():
        state = {k.removeprefix(f"{module_name}."): v for k, v in stored.items() if k.startswith(f"{module_name}.")}
        form = module.quantization_scheme.format.value
        kind = BaseCompressor.get_value_from_registry(form)
        native[f"{module_name}.weight"] = kind.decompress(dict(state), module.quantization_scheme)["weight"]
        if form == "nvfp4-pack-quantized":
            packed = state["weight_packed"]
            codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1]).float()
            scales, one = state["weight_scale"].float(), state["weight_global_scale"]
            args = module.quantization_scheme.weights
            wide[f"{module_name}.weight"] = dequantize(codes, scales, args=args, global_scale=one, dtype=torch.float32)
        elif not form.startswith("mx"):
            given = {**state, "weight_scale": state["weight_scale"].float()}
            wide[f"{module_name}.weight"] = kind.decompress(given, module.quantization_scheme)["weight"]
    case(OUT, name, native, wide)


for bits in range(2, 9):
    make(f"int{bits}-g32", llama(seed=bits), scheme(num_bits=bits, group_size=32), limit="20KB")
    make(f"int{bits}-row-asymmetric", llama(inner=151), scheme(num_bits=bits, symmetric=False))
make("int4-g32-asymmetric-f16", llama(dtype=torch.float16), scheme(num_bits=4, group_size=32, symmetric=False))
make("int4-f32", llama(dtype=torch.float32), scheme(num_bits=4, group_size=32))
make("w8a8", llama(inner=151), scheme(num_bits=8, inputs=TOKENS), limit="20KB")
make("w8a8-asymmetric", llama(inner=151), scheme(num_bits=8, symmetric=False, inputs=TOKENS))
for preset in ("FP8_DYNAMIC", "FP8", "FP8_BLOCK"):
    make(preset.lower(), llama(inner=151), scheme(preset))
for preset in ("NVFP4", "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"):
    make(preset.lower(), llama(), scheme(preset), limit="20KB")
mixed = scheme("FP8_DYNAMIC", ["re:.*self_attn.*"]), scheme(targets=["re:.*mlp.*"], num_bits=4, group_size=32)
make("mixed", llama(), *mixed, limit="20KB")
make("mixture", mixtral(), scheme(num_bits=4, group_size=32))
