"""The embedded model `tiny-python`: its corpus, tokenizer, training, evaluation and export."""
