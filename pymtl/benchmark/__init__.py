"""Measuring speed: contenders interleaved in one process, medians of ratios, and the machine's limits."""
