"""How models of transformers, PEFT, bitsandbytes and torchao look."""
