"""Generation: sampling, decoding token by token with a cache and CUDA graphs, and text."""
