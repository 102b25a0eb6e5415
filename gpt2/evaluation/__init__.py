"""What a model is worth: loss on text, HellaSwag."""
