"""Drop-in `torch.nn`: `import fastnn as nn`."""

__version__ = "0.1.0"
