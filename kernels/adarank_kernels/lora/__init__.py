"""LoRA linears that share an input, as one autograd node."""
