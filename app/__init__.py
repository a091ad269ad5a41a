"""The service around the model: HTTP in, tokens through the engine, text out."""

__version__ = "0.1.0"
