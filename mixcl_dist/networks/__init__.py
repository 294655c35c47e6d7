"""Backbones, one file each, and the heads on them."""
