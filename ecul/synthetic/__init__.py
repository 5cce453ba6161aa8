"""Rendered worlds of people before visible and infrared cameras."""

from ecul.synthetic.world import synthesize

__all__ = ["synthesize"]
