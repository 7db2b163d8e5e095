"""What a Hugging Face export adds to the copied sources: configuration, model, tokenizer, a backbone in plain torch."""
