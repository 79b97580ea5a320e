"""What training on several devices leaves where parameters were saved without gathering them first."""

HINT = (
    "DeepSpeed ZeRO-3 and FSDP save such where parameters were not gathered: save again with the whole of them, "
    "or join the parts (zero_to_fp32.py, accelerate merge-weights)"
)
"""For tensors without elements, or with one process's part of them."""
