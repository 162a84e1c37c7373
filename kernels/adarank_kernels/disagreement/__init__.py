"""How far apart the outputs of K variants are, without forming them."""
