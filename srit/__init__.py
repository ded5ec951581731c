"""Self-refine instruction-tuning: make a small language model reason like a large one."""

__version__ = "0.1.0"
