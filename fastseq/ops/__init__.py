"""The dispatcher ops, one module a family. Importing this registers them all."""

from . import layer_norm as layer_norm
