"""Self-refine instruction-tuning: losses, data, sampling, pairs, evaluation."""
