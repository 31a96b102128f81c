"""Networks: the tokenizer and its parts, the perceptual distance, the masked image model, dense prediction."""
