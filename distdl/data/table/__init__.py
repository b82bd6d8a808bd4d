"""Rows read from mapped Arrow files, and views of them."""
