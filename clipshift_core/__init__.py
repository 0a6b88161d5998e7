"""The core of clipshift: everything the notebooks call, nothing that narrates."""

__version__ = "0.1.0"
