"""LoRA adapters as programs other than peft name and store them; a module for each."""
