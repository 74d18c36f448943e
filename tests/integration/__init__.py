"""Whole models, what they are used together with, several processes, and the examples."""
