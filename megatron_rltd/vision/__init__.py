"""Vision transformers: the classifier of `finetune_vit`, and the images that it reads."""
