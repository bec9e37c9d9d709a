"""Hugging Face folders: the model as transformers knows it, writing such a folder, and taking one back."""
