"""GPT-2: the model, its weights, training, sampling and the checks that compare it with HuggingFace's."""
