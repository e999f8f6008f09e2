"""``compare``: what finished runs say of each other."""
