"""Text out: sampling, generation token by token, decoding by CUDA graphs."""
