"""LoRA adapters: which files, what adapter_config.json says, and what their tensors are called."""
