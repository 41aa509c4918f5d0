"""A regular package: AutoGPTQ installs one named ``tests`` too, which would hide a folder without this file."""
