"""How the LLaMA family is laid out: names, rotary order, parameters, tokenizers; one module per layout."""
