"""Sparse depthwise convolution: the taps are the points that happen to be there."""
