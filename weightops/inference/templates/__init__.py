"""Chat templates: what a conversation is as one text, for models that were trained on it."""
