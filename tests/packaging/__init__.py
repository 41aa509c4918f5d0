"""Wheel and sdist: built, installed in environments of their own, used from outside the checkout."""
