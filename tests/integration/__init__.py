"""Whole models, and what they are used together with."""
