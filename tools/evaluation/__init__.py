"""Tools that evaluate exported models."""
