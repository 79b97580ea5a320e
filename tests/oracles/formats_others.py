"""Checkpoints of torchao 0.18, optimum-quanto 0.2.7, MLX 0.32, Model Optimizer 0.47 and transformers 5.23.

`formats_others.py LIBRARY OUT`
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from formats_common import case, is_linear, llama, load, mixtral, save

LIBRARY, OUT = sys.argv[1], Path(sys.argv[2])
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bfloat16", F16: "float16", F32: "float32"}


def torchao():
    import torchao.quantization as ao
    from torchao.quantization.quant_primitives import dequantize_affine
    from transformers import AutoModelForCausalLM, TorchAoConfig

    def make(name, plain, how, limit="5GB"):
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            settings, dtype = TorchAoConfig(how), next(plain.parameters()).dtype
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, dtype=dtype, device_map="cpu"
            )
        model.save_pretrained(OUT / name / "model", max_shard_size=limit)
        native, wide = {}, {}
        for weight_name, parameter in model.named_parameters():
            data = parameter.data
            if not hasattr(data, "qdata"):
                continue
            native[weight_name] = data.dequantize()
            if "output_dtype" in data.dequantize.__code__.co_varnames:
                wide[weight_name] = data.dequantize(F32)
            else:
                scale, zero = data.scale.float(), data.zero_point
                wide[weight_name] = dequantize_affine(
                    data.qdata, data.block_size, scale, zero, torch.int8, -8, 7, output_dtype=F32
                )
        assert native
        case(OUT, name, native, wide)

    for dtype in NAMES:
        make(f"int8-{NAMES[dtype]}", llama(inner=151, dtype=dtype), ao.Int8WeightOnlyConfig(), "20KB")
        make(f"float8-{NAMES[dtype]}", llama(inner=151, dtype=dtype), ao.Float8WeightOnlyConfig())
    intx = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    make("intx4", llama(), intx)
    make("mixture", mixtral(), ao.Int8WeightOnlyConfig())


def quanto():
    from optimum.quanto import freeze, qfloat8, qfloat8_e5m2, qint2, qint4, qint8, quantization_map, quantize
    from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor

    for kind in (qint2, qint4, qint8, qfloat8, qfloat8_e5m2):
        for dtype in NAMES:
            model, name = llama(inner=192, dtype=dtype), f"{kind.name}-{NAMES[dtype]}"
            config = model.config.to_dict()
            quantize(model, weights=kind, exclude="lm_head")
            freeze(model)
            save(OUT / name / "model", model.state_dict(), {**config, "dtype": NAMES[dtype]}, shards=3)
            (OUT / name / "model/quanto_qmap.json").write_text(json.dumps(quantization_map(model)))
            native, wide = {}, {}
            for module_name, module in model.named_modules():
                weight = getattr(module, "weight", None)
                if not hasattr(weight, "qtype"):
                    continue
                native[f"{module_name}.weight"] = weight.dequantize()
                if isinstance(weight, WeightQBitsTensor):
                    about = weight.qtype, weight.axis, weight._group_size, weight.size(), weight.stride()
                    shift = weight._shift.float() if weight._shift.dtype.is_floating_point else weight._shift
                    made = WeightQBitsTensor(*about, weight._data, weight._scale.float(), shift).dequantize()
                else:
                    made = weight._data.float() * weight._scale.float()
                wide[f"{module_name}.weight"] = made
            case(OUT, name, native, wide)


def mlx():
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    kinds = {BF16: mx.bfloat16, F16: mx.float16, F32: mx.float32}

    def array(tensor):
        return mx.array(tensor.float().numpy()).astype(kinds[tensor.dtype])

    def back(made):
        found = torch.from_numpy(np.array(made.astype(mx.float32)))
        return found.to(next(t for t, kind in kinds.items() if kind == made.dtype))

    def make(name, bits, size, mode="affine", dtype=BF16, special=None):
        model = llama(hidden=128, inner=192, dtype=dtype)
        stored, native, wide, overrides = {}, {}, {}, {}
        for weight_name, weight in model.state_dict().items():
            if weight.ndim < 2:
                stored[weight_name] = array(weight)
                continue
            module = weight_name.removesuffix(".weight")
            found = (special or {}).get(module.rpartition(".")[2])
            how = dict(zip(("bits", "group_size"), found or (bits, size), strict=True)) | {"mode": mode}
            if found:
                overrides[module] = how
            packed, scales, *biases = mx.quantize(array(weight), **how)
            stored |= {weight_name: packed, f"{module}.scales": scales}
            stored |= {f"{module}.biases": bias for bias in biases}
            native[weight_name] = back(mx.dequantize(packed, scales, *biases, **how))
            exact = [part.astype(mx.float32) for part in (scales, *biases)] if biases else [scales]
            wide[weight_name] = back(mx.dequantize(packed, *exact, **how, **({} if biases else {"dtype": mx.float32})))
        folder = OUT / name / "model"
        folder.mkdir(parents=True)
        mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "mlx"})
        settings = {"group_size": size, "bits": bits, "mode": mode, **overrides}
        config = {**model.config.to_dict(), "dtype": NAMES[dtype], "quantization": settings}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        case(OUT, name, native, wide)

    for bits in (2, 3, 4, 5, 6, 8):
        for size in (32, 64):
            make(f"{bits}-bit-g{size}", bits, size)
        make(f"{bits}-bit-f16", bits, 32, dtype=F16)
        make(f"{bits}-bit-f32", bits, 64, dtype=F32)
    make("mixed", 4, 64, special={"down_proj": (8, 32), "lm_head": (6, 64), "k_proj": (3, 32)})
    for mode, bits, size in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)):
        make(mode, bits, size, mode)


def modelopt():
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    for name, how in (("fp8", mtq.FP8_DEFAULT_CFG), ("nvfp4", mtq.NVFP4_DEFAULT_CFG)):
        model = llama(inner=192, vocab=96)
        model.config.architectures = ["LlamaForCausalLM"]
        shapes = {n: p.shape for n, p in model.named_parameters()}
        mtq.quantize(model, how, lambda m: m(torch.arange(64).reshape(2, 32)))
        export_hf_checkpoint(model, dtype=BF16, export_dir=OUT / name / "model")
        stored, native, wide = load(OUT / name / "model"), {}, {}
        for weight_name, shape in shapes.items():
            scale, over = stored.get(f"{weight_name}_scale"), stored.get(f"{weight_name}_scale_2")
            if scale is None:
                continue
            weight = stored[weight_name]
            if over is None:
                made = FP8QTensor(shape, BF16, weight).dequantize(F32, scale=scale)
            else:
                quantised = NVFP4QTensor(shape, BF16, weight)
                made = quantised.dequantize(F32, scale=scale, double_scale=over, block_sizes={-1: 16})
            # Its own bfloat16 of FP8 rounds the scale first; the format is the product, rounded once.
            native[weight_name], wide[weight_name] = made.to(BF16), made
        case(OUT, name, native, wide)


def transformers():
    import transformers as library
    from transformers.integrations import finegrained_fp8 as fine
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    class Quantizer:
        def __init__(self, size):
            self.quantization_config = library.FineGrainedFP8Config(weight_block_size=size)

    def blocks(name, size, scales=F32):
        """Blocks whose last rows and columns are fewer, as DeepSeek's are; transformers itself leaves such weights."""
        stored, native, wide = {}, {}, {}
        for weight_name, weight in llama(hidden=160, inner=200).state_dict().items():
            stored[weight_name] = weight
            if not is_linear(weight_name, weight):
                continue
            (rows, columns), (height, width) = weight.shape, size
            grid = -(-rows // height), -(-columns // width)
            whole = torch.zeros(grid[0] * height, grid[1] * width)
            whole[:rows, :columns] = weight.float()
            tiles = whole.view(grid[0], height, grid[1], width)
            factors = (tiles.abs().amax(dim=(1, 3)) / 448).clamp(min=2.0**-100)
            if scales is torch.float8_e8m0fnu:
                factors = torch.exp2(torch.ceil(torch.log2(factors)))
            kept = factors.to(scales)
            codes = (tiles / kept.float()[:, None, :, None]).clamp(-448, 448).view(whole.shape)[:rows, :columns]
            codes = codes.to(torch.float8_e4m3fn).contiguous()
            stored |= {weight_name: codes, f"{weight_name}_scale_inv": kept}
            wide[weight_name] = fine._dequantize_fp8_weight(codes, kept.float(), list(size), F32)
            native[weight_name] = wide[weight_name].to(BF16)
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(size)}
        save(OUT / name / "model", stored, {"dtype": "bfloat16", "quantization_config": settings}, shards=3)
        case(OUT, name, native, wide)

    def own():
        """As transformers quantises; experts with it."""
        there, back = (kind(Quantizer((64, 32))) for kind in (fine.Fp8Quantize, fine.Fp8Dequantize))
        stored, native, wide = {}, {}, {}
        for weight_name, weight in mixtral().state_dict().items():
            made = {weight_name: weight}
            if is_linear(weight_name, weight) or (weight.ndim == 3 and "experts" in weight_name):
                made = there._quantize_one(weight_name, weight)
            stored |= made
            if len(made) == 2:
                codes, scales = made.values()
                native[weight_name] = back._dequantize_one(codes, scales, BF16)
                wide[weight_name] = back._dequantize_one(codes, scales, F32)
        assert any(weight.ndim == 3 for weight in wide.values())
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 32]}
        config = {"model_type": "mixtral", "dtype": "bfloat16", "quantization_config": settings}
        save(OUT / "own" / "model", stored, config, shards=2)
        case(OUT, "own", native, wide)

    def experts():
        """gpt-oss: every code, every exponent that a float32 can have."""
        generator = torch.Generator().manual_seed(0)
        packed = torch.randint(0, 256, (3, 50, 5, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(0, 250, (3, 50, 5), dtype=torch.uint8, generator=generator)
        name = "model.layers.0.mlp.experts.down_proj"
        settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": settings}
        save(OUT / "mxfp4/model", {f"{name}_blocks": packed, f"{name}_scales": scales}, config, shards=2)
        wide = {name: convert_moe_packed_tensors(packed, scales, dtype=F32)}
        case(OUT, "mxfp4", {name: convert_moe_packed_tensors(packed, scales)}, wide)

    blocks("tails-128", (128, 128))
    blocks("tails-64-32", (64, 32))
    blocks("tails-powers", (128, 128), torch.float8_e8m0fnu)
    blocks("tails-bf16", (128, 128), BF16)
    own()
    experts()


{"torchao": torchao, "quanto": quanto, "mlx": mlx, "modelopt": modelopt, "transformers": transformers}[LIBRARY]()
