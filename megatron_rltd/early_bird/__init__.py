"""Early-Bird tickets: look for a smaller model inside the one that trains, and when it settles.

Sources: Early-Bird (arXiv 1909.11957), EarlyBERT (2101.00063), Early Transformers (2405.02353).
Nothing in here knows of token dropping; you can use both together.
"""
