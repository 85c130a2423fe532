"""hotdesk: a self-hosted runtime for customer-service chat in which all behaviour is plugins, swapped live."""

from importlib.metadata import version

__version__ = version("hotdesk")
__all__ = ["__version__"]
