"""The names that parts of quantised weights have, in every format, and what module they say they belong to."""

from __future__ import annotations

import re

_PART = re.compile(
    r"(?P<module>.+?)[._](?:"
    r"qweight|qzeros|g_idx|scales|biases"  # GPTQ, AWQ, MLX
    r"|weight_(?:packed|scale(?:_inv|_2)?|zero_point|shape|g_idx|global_scale)|(?:input|output)(?:_global)?_scale"
    r"|qscale_(?:weight|act)|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"
    r"|SCB|weight_format|W_q|weight_(?:qdata|scale|zero_point)|weight\._(?:data(?:\._data)?|scale|shift)"
    r"|blocks"
    r"|weight\.(?:compressed|bitmask|row_offsets|shape)"
    r")"
)


def module_of_part(name: str) -> str | None:
    """The module of a tensor whose name says that it is a part of a quantised weight; None for other names."""
    matched = _PART.fullmatch(name)
    return matched["module"] if matched else None
