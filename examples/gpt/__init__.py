"""A byte-level GPT whose attention is exchangeable: what `train_gpt.py` and `generate.py` share."""
