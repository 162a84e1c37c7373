"""How ranks are found: perturb a module, see how far the output moves."""
