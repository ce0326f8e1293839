"""The parts of benchmarks/gpu.py: what is measured on a GPU, against what, and how it is known to be right."""
