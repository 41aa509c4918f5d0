"""Running builds. For now: writing the dense model that a build stands for."""
