"""Runs functions that a model wrote, where they can neither do harm nor pass for what they are not."""
