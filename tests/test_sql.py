"""Soft Q-learning: what its losses are, what they lead to, and twins that must fail."""

from __future__ import annotations
