"""attnopt: a compiler pass that makes the attention of any PyTorch model cheaper."""

__version__ = "0.1.0"
