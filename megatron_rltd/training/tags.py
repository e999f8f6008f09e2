"""Names of the values that we log next to Megatron's own. Plain strings, used to write and read."""

KEPT_TOKENS = "random-ltd kept tokens"
LAYER_TOKENS = "random-ltd layer tokens"
SHARE_OF_DENSE = "random-ltd share of dense"
MICRO_BATCHES = "random-ltd micro-batches per pass"
VS_LAYER_TOKENS = " vs layer tokens"
