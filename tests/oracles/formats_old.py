"""What compressed-tensors 0.12.2 and hqq 0.2.8 write, with transformers 4.57: `formats_old.py hqq|compressed OUT`."""

import sys
from pathlib import Path

import torch
from formats_common import case, is_linear, llama, save

LIBRARY, OUT = sys.argv[1], Path(sys.argv[2])


def hqq():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(name, bits, size, axis, dtype, hidden, inner):
        model = llama(hidden=hidden, inner=inner, dtype=dtype)
        stored, native, wide = {}, {}, {}
        for weight_name, weight in model.state_dict().items():
            module = weight_name.removesuffix(".weight")
            if not is_linear(weight_name, weight):
                stored[weight_name] = weight
                continue
            settings = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            made = HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")
            state = made.state_dict_encoded() if hasattr(made, "state_dict_encoded") else made.state_dict()
            stored |= {f"{module}.{part}": tensor for part, tensor in state.items() if torch.is_tensor(tensor)}
            native[weight_name] = made.dequantize()
            meta = made.meta
            made.meta = {
                **meta,
                "scale": meta["scale"].float(),
                "zero": meta["zero"].float(),
                "compute_dtype": torch.float32,
            }
            made.compute_dtype = torch.float32
            wide[weight_name] = made.dequantize()
        config = {**model.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
        save(OUT / name / "model", stored, {**config, "quantization_config": {"quant_method": "hqq"}}, shards=2)
        case(OUT, name, native, wide)

    for bits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            make(f"{bits}-bit-axis{axis}", bits, 64, axis, torch.float16, 64, 160)
        # 96 columns: groups of 64 that go on from row to row
        make(f"{bits}-bit-through", bits, 64, 1, torch.bfloat16, 96, 160)


def compressed():
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def write(name, stored, native, wide, settings):
        about = {"quant_method": "compressed-tensors", "version": compressed_tensors.__version__, **settings}
        save(OUT / name / "model", stored, {"torch_dtype": "bfloat16", "quantization_config": about}, shards=3)
        case(OUT, name, native, wide)

    def packed(name, *, ordered=False, inner=160, **how):
        args = QuantizationArgs(type="int", **how, **({"actorder": "group"} if ordered else {}))
        compressor = BaseCompressor.load_from_registry("pack-quantized", config=None)
        stored, native, wide = {}, {}, {}
        for weight_name, weight in llama(inner=inner).state_dict().items():
            if not is_linear(weight_name, weight):
                stored[weight_name] = weight
                continue
            rows, columns = weight.shape
            index = None
            if ordered:
                shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
                index = (torch.arange(columns) // args.group_size)[shuffled].to(torch.int32)
            sorted_weight = weight if index is None else weight[:, torch.argsort(index, stable=True)]
            grouped = sorted_weight.reshape(rows, -1, args.group_size or columns)
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            made = compressor.compress_weight(weight, scale, args, zero, index)
            made |= {"weight_scale": scale} | ({} if index is None else {"weight_g_idx": index})
            stored |= {f"{weight_name.removesuffix('weight')}{part}": tensor for part, tensor in made.items()}
            # It does not unpack zero points: what it packed stands for this.
            codes = quantize(weight, scale, zero, args, torch.int8, index)
            native[weight_name] = dequantize(codes, scale, zero, args, g_idx=index)
            wide[weight_name] = dequantize(codes, scale.float(), zero, args, g_idx=index)
            if args.symmetric:
                assert torch.equal(compressor.decompress_weight(made, args), native[weight_name])
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        config = QuantizationConfig(
            config_groups={"g": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
        )
        write(name, stored, native, wide, config.model_dump(exclude=["quant_method"], mode="json"))

    def sparse(name, form, settings):
        compressor = BaseCompressor.load_from_registry(form, config=settings)
        stored, native = {}, {}
        for weight_name, weight in llama().state_dict().items():
            if not is_linear(weight_name, weight):
                stored[weight_name] = weight
                continue
            kept = weight.clone()
            if form == "sparse-bitmask":
                kept[torch.rand(kept.shape) < 0.6] = 0
                kept[5] = 0
            else:
                places = kept.reshape(-1, 4).abs().float().topk(2, dim=1).indices
                mask = torch.zeros(kept.numel() // 4, 4, dtype=torch.bool).scatter_(1, places, True)
                kept = torch.where(mask.reshape(kept.shape), kept, torch.zeros_like(kept))
            made = compressor.compress_weight(weight_name, kept)
            stored |= made
            data = {part.rsplit(".", 1)[1]: tensor for part, tensor in made.items()}
            if form == "sparse-bitmask":
                data["shape"] = data["shape"].flatten().tolist()
            native[weight_name] = compressor.decompress_weight(data)
        about = {"format": "dense", "config_groups": {}, "ignore": [], "sparsity_config": {"format": form}}
        write(name, stored, native, {n: t.float() for n, t in native.items()}, about)

    for bits in range(2, 9):
        group = {"num_bits": bits, "strategy": "group", "group_size": 32}
        packed(f"int{bits}", symmetric=True, **group)
        packed(f"int{bits}-ordered", symmetric=True, ordered=True, **group)
        packed(f"int{bits}-row-asymmetric", symmetric=False, num_bits=bits, strategy="channel", inner=151)
    sparse("sparse", "sparse-bitmask", BitmaskConfig())
    sparse("sparse-24", "sparse-24-bitmask", Sparse24BitMaskConfig())


{"hqq": hqq, "compressed": compressed}[LIBRARY]()
