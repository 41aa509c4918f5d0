"""Calibration data, one layer's forward pass at a time, and the statistics that methods need."""
