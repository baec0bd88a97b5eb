from . import legacy

__all__ = ["legacy"]
