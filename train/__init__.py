"""The stages: one readable script each, run with python or torchrun."""
