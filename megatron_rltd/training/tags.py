"""Names of what we log, beside Megatron's own. Plain strings, for those who write and who read."""

KEPT_TOKENS = "random-ltd kept tokens"
LAYER_TOKENS = "random-ltd layer tokens"
SHARE_OF_DENSE = "random-ltd share of dense"
MICRO_BATCHES = "random-ltd micro-batches per pass"
VS_LAYER_TOKENS = " vs layer tokens"
