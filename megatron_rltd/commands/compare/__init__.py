"""``compare``: compare finished runs."""
