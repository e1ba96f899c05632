"""One folder per op: meaning, kernel, layout."""

# transformers looks for a distribution called `kernels` (Hugging Face's) and reads its version.
__version__ = "0.0.0"
