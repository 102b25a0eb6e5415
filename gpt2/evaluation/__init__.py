"""Evaluation of a model: its loss on text, and HellaSwag."""
