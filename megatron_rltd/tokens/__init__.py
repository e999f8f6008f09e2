"""Which tokens a layer keeps, and how rows of the hidden states move. Knows of torch only."""
