"""Documentation: commands that it names parse, and those of the tutorial do what stands beside them."""
