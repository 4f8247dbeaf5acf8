"""From files to batches: sources, image operations, tokenizer, pipeline."""
