"""Converters by theme. Every file here is loaded; a new file adds its operators."""
