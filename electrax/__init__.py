"""electrax: pretrain and fine-tune ELECTRA text encoders in JAX."""
