"""The module: engines agree with the reference, load from a checkpoint's names, and compile."""

from __future__ import annotations

import pytest
import torch
from gptq_layers import random_layer, random_x, relative_error
from torch import nn
from weightops_kernels import cpu, launch, planes, reference
from weightops_kernels.linear import QuantLinear

needs_triton = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


@pytest.mark.parametrize("engine", ["reference", "cpu", "auto", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("bits", reference.BITS)
def test_engines_give_the_product(engine: str, bits: int) -> None:
    layer = random_layer(256, 64, 64, bits, act_order=True)
    bias = torch.randn(64)
    module = QuantLinear.from_tensors(*layer.tensors, bits, bias=bias).prepare(engine)
    x = random_x(6, 256).view(2, 3, 256)
    found = module(x)
    assert found.dtype == torch.float16
    assert found.shape == (2, 3, 64)
    assert relative_error(found, x.double() @ layer.weight() + bias.double()) < 2e-3


@pytest.mark.skipif(not cpu.has_fast_int4(), reason="torch has no vectorised four-bit operator here")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [1, 256, 257])
def test_bfloat16_takes_the_four_bit_operator_for_few_rows(rows: int, act_order: bool) -> None:
    layer = random_layer(256, 64, 64, act_order=act_order)
    module = QuantLinear.from_tensors(*layer.tensors, 4).prepare(dtype=torch.bfloat16)
    assert module.engine == "cpu-int4"
    x = random_x(rows, 256).bfloat16()
    assert relative_error(module(x), x.double() @ layer.weight()) < 1e-2


def test_layers_that_the_four_bit_operator_cannot_hold_are_named() -> None:
    for layer, why in (
        (random_layer(256, 64, 64, 8), "it has 8 bits"),
        (random_layer(256, 40, 64), "40 outputs are no multiple of 16"),
        (random_layer(192, 64, 128), "found 64 to 128"),
        (random_layer(256, 64, 16), "found 16 to 16"),
    ):
        module = QuantLinear.from_tensors(*layer.tensors, layer.bits)
        assert module.choose(torch.bfloat16) == "cpu"
        with pytest.raises(ValueError, match=why):
            module.prepare("cpu-int4")


def test_float32_and_float64_are_computed_as_such() -> None:
    layer = random_layer(256, 64)
    module = QuantLinear.from_tensors(*layer.tensors, 4).prepare("cpu")
    x = random_x(2, 256).double()
    assert relative_error(module(x.float()), x @ layer.weight()) < 1e-6
    assert relative_error(module(x), x @ layer.weight()) < 1e-13


def test_buffers_have_the_names_and_shapes_of_a_checkpoint() -> None:
    layer = random_layer(200, 64, 128)
    state = dict(zip(("qweight", "qzeros", "scales", "g_idx"), layer.tensors, strict=True))
    module = QuantLinear(200, 64)
    module.load_state_dict(state)
    assert module.prepare("cpu").state_dict().keys() == state.keys()
    x = random_x(2, 200)
    assert relative_error(module(x), x.double() @ layer.weight()) < 2e-3


def test_a_model_in_another_type_keeps_its_scales() -> None:
    layer = random_layer(256, 64, 64)
    module = QuantLinear.from_tensors(*layer.tensors, 4).prepare("cpu")
    nn.Sequential(module).to(torch.bfloat16)
    assert torch.equal(module.scales, layer.scales)


@needs_triton
def test_a_released_layer_multiplies_but_is_not_prepared_again() -> None:
    layer = random_layer(128, 32)
    module = QuantLinear.from_tensors(*layer.tensors, 4).prepare("triton", release=True)
    x = random_x(2, 128)
    assert relative_error(module(x), x.double() @ layer.weight()) < 2e-3
    assert module.qweight.numel() == 0
    with pytest.raises(ValueError, match="were released"):
        module.prepare("cpu")


def test_engines_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="engine must be one of"):
        QuantLinear(32, 32, group_size=32).prepare("cuda")


@pytest.mark.parametrize("engine", ["reference", "cpu", "cpu-int4", pytest.param("triton", marks=needs_triton)])
def test_compiled_models_have_one_graph_and_the_same_values(engine: str) -> None:
    torch._dynamo.reset()
    layer = random_layer(256, 64, 64, act_order=True)
    dtype = torch.bfloat16 if engine == "cpu-int4" else torch.float16
    quantised = QuantLinear.from_tensors(*layer.tensors, 4, bias=torch.randn(64)).prepare(engine, dtype)
    model = nn.Sequential(quantised, nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 5, 80):
            x = random_x(rows, 256).to(dtype)
            assert torch.equal(compiled(x), model(x))


def test_the_operators_are_what_torch_expects_of_them() -> None:
    layer, x = random_layer(64, 32, 32), random_x(2, 64)
    for name in ("reference_matmul", "dequantize_matmul"):
        torch.library.opcheck(getattr(torch.ops.weightops_kernels, name).default, (x, *layer.tensors, 4, "gptq"))
    held = planes.arrange(layer.packed)
    assert held is not None
    arranged = (held.planes, held.zeros, held.scales, held.rows, 4, held.group_size, held.in_features)
    torch.library.opcheck(torch.ops.weightops_kernels.planes_matmul.default, (x, *arranged))
    int4 = cpu.prepare_int4(layer.packed)
    arguments = (x.bfloat16(), int4.packed, int4.scales_and_zeros, int4.rows, int4.group_size)
    torch.library.opcheck(torch.ops.weightops_kernels.int4_matmul.default, arguments)
